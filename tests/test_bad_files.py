"""Files as they come from the net: 200 damaged ones, and whole ones of unusual kinds. Each is read,
or said to be unreadable and why, in a process of its own that must neither crash nor hang nor
grow."""

import multiprocessing
import os
import resource
import traceback
import warnings
from multiprocessing.connection import wait

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from test_video import assert_read, decode_all, texture

import dataset
import toy

SECONDS = 20  # that a file may take, on a machine that is busy; seen: under 1


def read(path):
    """As training reads a clip."""
    with dataset.open_video(path, motion=True) as video, warnings.catch_warnings():
        warnings.simplefilter("ignore", dataset.NoMotionVectors)
        numbers = dataset.clip_indices(*dataset.frame_range(video), 8, 4)
        frames, motion = dataset.read_clip(video, numbers, motion=True)
    rows, cols = (-(-side // 8) for side in frames.shape[1:3])
    assert len(frames) == 8 and motion.shape == (8, rows, cols) and motion.isfinite().all()


def reader(pipe):
    """Reads files; for each, what became of it, and the memory at its height."""
    torch.set_num_threads(1)  # as in a loader: the other threads were not forked with it
    av.logging.set_level(av.logging.PANIC)
    while path := pipe.recv():
        try:
            read(path)
            outcome = "read"
        except dataset.VideoError as error:
            outcome = str(error)
        except Exception:
            outcome = traceback.format_exc()
        pipe.send((outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def read_in_a_process(paths):
    """-> [(outcome, MiB)] of each; fails if the process crashes or hangs."""
    context, found = multiprocessing.get_context("fork"), []
    ours, theirs = context.Pipe()
    process = context.Process(target=reader, args=(theirs,), daemon=True)
    process.start()
    try:
        for path in paths:
            ours.send(path)
            ready = wait([ours, process.sentinel], SECONDS)
            assert ready, f"{path}: took more than {SECONDS} s"
            assert ours in ready, f"{path}: ended the process"
            found.append(ours.recv())
    finally:
        process.kill()
        process.join()
    return found


def damaged(data, kind, rng):
    """Bytes of a file -> bytes of a damaged one."""
    data, size = bytearray(data), len(data)
    flips = {"head": (0, 2000), "tail": (size - 2000, size), "payload": (2000, size)}
    if kind in flips:  # a container's tables stand at either end
        low, high = flips[kind]
        low = max(0, min(low, size - 1))
        for place in rng.integers(low, min(high, size), rng.integers(1, 30)):
            data[place] ^= 1 << rng.integers(8)
        return data
    start, length = rng.integers(size), int(rng.integers(1, max(2, size // 4)))
    before, part, after = data[:start], data[start : start + length], data[start + length :]
    return {
        "cut": before,
        "no beginning": part + after,
        "zeros": before + bytes(len(part)) + after,
        "hole": before + after,
        "noise": before + rng.bytes(len(part)) + after,
        "twice": before + part + part + after,
    }[kind]


KINDS = "cut", "no beginning", "head", "tail", "payload", "zeros", "hole", "noise", "twice"


def sources_of(footage):
    return sorted(p for p in footage.rglob("*") if p.suffix in (".mp4", ".mkv", ".mov"))


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_files(footage, tmp_path, count):
    sources, rng, paths = sources_of(footage), np.random.default_rng(count), []
    for i in range(count):
        source, kind = sources[i % len(sources)], KINDS[i % len(KINDS)]
        wrong = rng.choice([".mkv", ".avi", ".ts", ".webm"])
        path = tmp_path / f"{i}-{kind.replace(' ', '-')}{source.suffix if i % 10 else wrong}"
        path.write_bytes(damaged(source.read_bytes(), kind, rng))
        paths.append(str(path))
    found = read_in_a_process(paths)
    for path, (outcome, _) in zip(paths, found):
        said = outcome.startswith(path) and "\n" not in outcome and len(outcome) > len(path) + 5
        assert outcome == "read" or said, f"{path}: {outcome}"
    whole = [outcome for outcome, _ in found].count("read")
    assert count // 10 < whole < count - count // 10  # the damage is neither nothing nor all
    # A second time, in a process that has seen them all: no more memory.
    again = read_in_a_process(paths + paths[:: max(1, count // 20)])
    (_, half), (_, end) = again[count - 1], again[-1]
    assert end - half < 64, (half, end)


def test_damaged_files_are_read_rightly(footage, tmp_path):
    """What is read of a damaged file is what a plain decode of the same bytes gives."""
    sources = [path for path in sources_of(footage) if "10bits" not in path.name]
    rng, alike = np.random.default_rng(1), []
    av.logging.set_level(av.logging.PANIC)
    for i in range(90):
        source, kind = sources[rng.integers(len(sources))], KINDS[i % len(KINDS)]
        path = tmp_path / f"{i}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), kind, rng))
        try:
            with dataset.open_video(path) as video:
                if video.index.pts is None:
                    continue
                numbers = dataset.clip_indices(*dataset.frame_range(video), 8, 4)
                frames, pts = dataset.read_clip(video, numbers).numpy(), video.index.pts[numbers]
            with av.open(str(path), **dataset._ODD_TITLES) as container:
                stream = container.streams.best("video")
                stream.codec_context.thread_count = 1
                whole = {frame.pts: frame for frame in container.decode(stream)}
        except (dataset.VideoError, av.FFmpegError):  # the second: something else in it is damaged
            continue
        off = []
        for time, ours in zip(pts, frames):
            if whole[time].is_corrupt:  # the file's last packet, half of it: the frame before
                assert time == video.index.last_pts
                continue
            theirs = whole[time].to_ndarray(format="rgb24").astype(int)
            off.append(np.abs(np.rot90(theirs, round(whole[time].rotation / 90)) - ours).mean())
        alike.append(max(off, default=0) < 2)
    # Where a payload is damaged without the decoder's knowledge, frames depend on where decoding
    # began.
    assert len(alike) > 20 and sum(alike) >= len(alike) - 1


# ------------------------------------------------------------------------ whole files, unusual ones


def write(path, frames, **more):
    toy.write_video(path, frames, options={"g": "5", "bf": "0"}, **more)
    return path.read_bytes()


def test_one_frame(tmp_path):
    write(tmp_path / "one.mp4", texture(1, 160, (0, 0)))
    assert_read(tmp_path / "one.mp4", 1, [0, 0, 0])
    read(tmp_path / "one.mp4")


def test_a_wrong_extension(tmp_path):
    write(tmp_path / "clip.mkv", texture(12, 160, (2, 0)))
    assert_read((tmp_path / "clip.mkv").rename(tmp_path / "clip.avi"), 12, [0, 5, 11])


def test_changing_resolution(tmp_path):
    """Two H.264 streams of different sizes, one after the other: all frames in the size of the
    first."""
    data = b""
    for name, size in (("a", 160), ("b", 96)):
        down, across = np.mgrid[:size, :size] * 255 / (size - 1)
        frames = [np.stack([across, down, np.full_like(down, 20 * i)], -1) for i in range(10)]
        data += write(tmp_path / f"{name}.h264", np.stack(frames).astype(np.uint8))
    (tmp_path / "both.h264").write_bytes(data)
    clip = dataset.read_clip(tmp_path / "both.h264", [2, 9, 10, 19])
    assert clip.shape == (4, 160, 160, 3)
    first, second = decode_all(tmp_path / "a.h264"), decode_all(tmp_path / "b.h264")
    assert np.array_equal(clip[1], first[9])
    small = torch.from_numpy(second[9]).permute(2, 0, 1)[None].float()
    enlarged = torch.nn.functional.interpolate(small, size=160, mode="bicubic")[0]
    assert (clip[3].permute(2, 0, 1) - enlarged).abs().mean() < 2


def test_the_best_stream_is_read(tmp_path):
    """As libav ranks them: not the cover, which comes first."""
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        sizes = {64: Disposition.attached_pic, 160: Disposition.default}
        streams = {size: container.add_stream("libx264", rate=12) for size in sizes}
        for size, stream in streams.items():
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            stream.disposition = sizes[size].value
        for _ in range(6):
            for size, stream in streams.items():
                container.mux(stream.encode(av.VideoFrame(size, size, "yuv420p")))
        for stream in streams.values():
            container.mux(stream.encode())
    assert dataset.probe_video(tmp_path / "two.mkv") == (6, 12.0, (160, 160))
    assert dataset.read_clip(tmp_path / "two.mkv", [0, 5]).shape == (2, 160, 160, 3)


def test_huge_frames_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "clip.mp4", texture(4, 160, (1, 0)))
    monkeypatch.setattr(dataset, "MAX_PIXELS", 150 * 150)
    with pytest.raises(dataset.VideoError, match="clip.mp4: 160x160 pixels, larger than 8K"):
        dataset.probe_video(tmp_path / "clip.mp4")
    # Where they come later than the header says, the decoder refuses.
    zeros = (np.zeros((40, size, size, 3), np.uint8) for size in (96, 160))
    data = b"".join(write(tmp_path / "part.h264", frames) for frames in zeros)
    (tmp_path / "both.h264").write_bytes(data)
    assert dataset.read_clip(tmp_path / "both.h264", [5]).shape == (1, 96, 96, 3)
    with pytest.raises(dataset.VideoError, match="both.h264"):
        dataset.read_clip(tmp_path / "both.h264", [60])
    # VP8 with 16383 x 16383 pixels in its first frame.
    monkeypatch.undo()
    path = tmp_path / "vp8.webm"
    toy.write_video(path, texture(4, 160, (1, 0)), codec="libvpx", options={})
    data = bytearray(path.read_bytes())
    place = data.index(b"\x9d\x01\x2a")
    data[place + 3 : place + 7] = (16383).to_bytes(2, "little") * 2
    path.write_bytes(data)
    ((outcome, _),) = read_in_a_process([str(path)])
    assert "vp8.webm" in outcome and "\n" not in outcome


def test_names_are_files_and_nothing_else(tmp_path, monkeypatch):
    """A pipe would wait for ever; a name that looks like a protocol of libav's is a file's all the
    same; text in a header that is no UTF-8 does not matter."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    for name, reason in (
        ("pipe.mp4", "not a file"), (".", "not a file"), ("gone.mp4", "No such file"),
        ("http://127.0.0.1:9/a.mp4", "No such file"),
    ):  # fmt: skip
        with pytest.raises(dataset.VideoError, match=f"{name}: {reason}"):
            dataset.probe_video(name)
    data = write(tmp_path / "title.mkv", texture(4, 160, (1, 0)))
    assert data.count(b"Lavf") > 0  # who has written it
    (tmp_path / "title.mkv").write_bytes(data.replace(b"Lavf", b"Lav\xe9"))
    (tmp_path / "concat:a|b.mp4").write_bytes(data)
    for name in ("title.mkv", "concat:a|b.mp4"):
        assert dataset.probe_video(name).frames == 4
