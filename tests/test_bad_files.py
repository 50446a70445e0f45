"""Files as they come from the net: 200 damaged ones, and whole ones of unusual kinds. Each is read,
or said to be unreadable and why, in a process of its own that must neither crash nor hang nor
grow."""

import multiprocessing
import os
import resource
import time
import traceback
import warnings

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from test_video import decode_all, texture

import dataset
import toy

SECONDS = 20  # that a file may take, on a machine that is busy; seen: under 1


def read(path):
    """As training reads a clip."""
    with dataset.open_video(path, motion=True) as video, warnings.catch_warnings():
        warnings.simplefilter("ignore", dataset.NoMotionVectors)
        numbers = dataset.clip_indices(*dataset.frame_range(video), 8, 4)
        frames, motion = dataset.read_clip(video, numbers, motion=True)
    assert (
        frames.dtype == torch.uint8 and len(frames) == len(motion) == 8 and motion.isfinite().all()
    )
    rows, cols = (-(-side // 8) for side in frames.shape[1:3])
    assert motion.shape[1:] == (rows, cols)


def reader(names, results):
    """Reads files until None comes; for each, what became of it, how long it took, and the memory
    at its height."""
    torch.set_num_threads(
        1
    )  # as in a loader: those of the process that was forked are not here, to be waited for
    av.logging.set_level(av.logging.PANIC)
    while (path := names.get()) is not None:
        began = time.perf_counter()
        try:
            read(path)
            outcome = "read"
        except dataset.VideoError as error:
            outcome = str(error)
        except Exception:
            outcome = traceback.format_exc()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        results.put((outcome, time.perf_counter() - began, peak))


def read_in_a_process(paths):
    """-> [(outcome, seconds, MiB)] of each; fails if the process crashes, hangs, or raises anything
    else."""
    context = multiprocessing.get_context("fork")
    names, results, found = context.SimpleQueue(), context.Queue(), []
    process = context.Process(target=reader, args=(names, results), daemon=True)
    process.start()
    try:
        for path in paths:
            names.put(path)
            ends = time.monotonic() + SECONDS
            while results.empty():
                assert process.is_alive(), f"{path}: the process ended with {process.exitcode}"
                assert time.monotonic() < ends, f"{path}: took more than {SECONDS} s"
                time.sleep(0.001)
            found.append(results.get())
    finally:
        process.kill()
        process.join()
    return found


def damaged(data, kind, rng):
    """Bytes of a file -> bytes of a damaged one."""
    data, size = bytearray(data), len(data)
    if kind == "cut":
        return data[: rng.integers(size)]
    if kind == "no beginning":
        return data[rng.integers(size) :]
    if kind in ("head", "tail", "payload"):  # a container's tables stand at either end
        low, high = {"head": (0, 2000), "tail": (size - 2000, size), "payload": (2000, size)}[kind]
        low = max(0, min(low, size - 1))
        for place in rng.integers(low, min(high, size), rng.integers(1, 30)):
            data[place] ^= 1 << rng.integers(8)
        return data
    start, length = rng.integers(size), int(rng.integers(1, max(2, size // 4)))
    if kind == "zeros":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == "hole":
        del data[start : start + length]
    elif kind == "noise":
        data[start : start + length] = rng.bytes(len(data[start : start + length]))
    elif kind == "twice":
        data[start:start] = data[start : start + length]
    return data


KINDS = "cut", "no beginning", "head", "tail", "payload", "zeros", "hole", "noise", "twice"


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_files(footage, tmp_path, count, capsys):
    sources = sorted(p for p in footage.rglob("*") if p.suffix in (".mp4", ".mkv", ".mov"))
    rng, paths = np.random.default_rng(count), []
    for i in range(count):
        source, kind = sources[i % len(sources)], KINDS[i % len(KINDS)]
        suffix = (
            rng.choice([".mkv", ".avi", ".ts", ".webm"]) if i % 10 == 0 else source.suffix
        )  # a wrong one
        path = tmp_path / f"{i}-{source.stem}-{kind.replace(' ', '-')}{suffix}"
        path.write_bytes(damaged(source.read_bytes(), kind, rng))
        paths.append(str(path))
    found = read_in_a_process(paths)
    for path, (outcome, _, _) in zip(paths, found):
        said = outcome.startswith(path) and "\n" not in outcome and len(outcome) > len(path) + 5
        assert outcome == "read" or said, f"{path}: {outcome}"
    outcomes = [outcome == "read" for outcome, _, _ in found]
    assert (
        count // 10 < sum(outcomes) < count - count // 10
    )  # the damage is neither nothing nor everything
    # A second time, in a process that has seen them all: no more memory.
    again = read_in_a_process(paths + paths[:: max(1, count // 20)])
    half, end = again[count - 1][2], again[-1][2]
    assert end - half < 64, (half, end)
    with capsys.disabled():
        slowest = max(seconds for _, seconds, _ in found)
        print(
            f"\n{count} damaged files: {sum(outcomes)} read, slowest {slowest:.2f} s, memory "
            f"{found[-1][2]} MiB"
        )


def test_damaged_files_are_read_rightly(footage, tmp_path):
    """What is read of a damaged file is what a plain decode of the same bytes gives."""
    sources = sorted(
        p
        for p in footage.rglob("*")
        if p.suffix in (".mp4", ".mkv", ".mov") and "10bits" not in p.name
    )
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
        plain = [whole[time] for time in pts]
        plain = [
            np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            for frame in plain
        ]
        alike.append(
            np.mean([np.abs(a.astype(int) - b).mean() < 2 for a, b in zip(frames, plain)]) == 1
        )
    # Where a payload is damaged without the decoder's knowledge, frames depend on where decoding
    # began.
    assert len(alike) > 20 and sum(alike) >= len(alike) - 1


# ------------------------------------------------------------------------ whole files, unusual ones


def write(path, frames, codec="libx264", *, pts=None, sizes=None, options=None, format=None):
    """frames (F,H,W,3) -> a file whose frames have the given times (1/100 s) or sizes (H,W)."""
    from fractions import Fraction

    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=100)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.time_base = 1, Fraction(1, 100)
        stream.options = options or {}
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = int(pts[i]) if pts is not None else i
            picture.time_base = Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def test_variable_frame_rate(tmp_path):
    """Frame numbers are ranks; seconds are times, not numbers times a rate."""
    frames, pts = texture(30, 160, (1, 0)), np.cumsum([1, 9, 2, 30, 3] * 6)
    write(tmp_path / "vfr.mkv", frames, pts=pts)
    whole = decode_all(tmp_path / "vfr.mkv")
    assert dataset.probe_video(tmp_path / "vfr.mkv").frames == 30
    clip = dataset.read_clip(tmp_path / "vfr.mkv", [3, 4, 17, 29])
    assert all(np.array_equal(frame, whole[n]) for frame, n in zip(clip, (3, 4, 17, 29)))
    seconds = (pts - pts[0]) / 100
    first, stop = dataset.frame_range(tmp_path / "vfr.mkv", 0.5, 1.2)
    assert first == np.searchsorted(seconds, 0.5) and stop == np.searchsorted(seconds, 1.2)


def test_one_frame(tmp_path):
    toy.write_video(tmp_path / "one.mp4", texture(1, 160, (0, 0)))
    assert dataset.read_clip(tmp_path / "one.mp4", [0, 0, 0]).shape == (3, 160, 160, 3)
    read(tmp_path / "one.mp4")


def test_changing_resolution(tmp_path):
    """Two H.264 streams of different sizes, one after the other: all frames in the size of the
    first."""
    for name, size in (("a", 160), ("b", 96)):
        across, down = np.meshgrid(np.linspace(0, 255, size), np.linspace(0, 255, size))
        frames = np.stack(
            [np.stack([across, down, np.full_like(down, 20 * i)], -1) for i in range(10)]
        )
        toy.write_video(
            tmp_path / f"{name}.h264", frames.astype(np.uint8), options={"g": "5", "bf": "0"}
        )
    both = (tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(both)
    clip = dataset.read_clip(tmp_path / "both.h264", [2, 9, 10, 19])
    assert clip.shape == (4, 160, 160, 3)
    first, second = decode_all(tmp_path / "a.h264"), decode_all(tmp_path / "b.h264")
    assert np.array_equal(clip[1], first[9])
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(second[9]).permute(2, 0, 1)[None].float(), size=160, mode="bicubic"
    )
    assert (clip[3].permute(2, 0, 1) - enlarged[0]).abs().mean() < 2


def test_no_timestamps(tmp_path):
    """A raw H.264 stream has none."""
    toy.write_video(tmp_path / "raw.h264", texture(20, 160, (1, 0)), options={"g": "5", "bf": "0"})
    whole = decode_all(tmp_path / "raw.h264")
    clip = dataset.read_clip(tmp_path / "raw.h264", [0, 7, 19])
    assert len(whole) == 20 and all(
        np.array_equal(frame, whole[n]) for frame, n in zip(clip, (0, 7, 19))
    )


def test_the_best_stream_is_read(tmp_path):
    """As libav ranks them: not the cover, which comes first."""
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = []
        for size in (64, 160):
            stream = container.add_stream("libx264", rate=12)
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            kind = Disposition.default if size == 160 else Disposition.attached_pic
            stream.disposition = kind.value
            streams.append((stream, texture(6, 160, (1, 0))[:, :size, :size]))
        for i in range(6):
            for stream, frames in streams:
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[i]), format="rgb24")
                    )
                )
        for stream, _ in streams:
            container.mux(stream.encode())
    assert dataset.probe_video(tmp_path / "two.mkv") == (6, 12.0, (160, 160))
    assert dataset.read_clip(tmp_path / "two.mkv", [0, 5]).shape == (2, 160, 160, 3)


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1", "libaom-av1", "libvpx-vp9", "libvpx"])
def test_other_codecs_and_wrong_extensions(tmp_path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"libx265": {"x265-params": "log-level=none"}, "libaom-av1": {"cpu-used": "8"}}.get(
        codec, {}
    )
    toy.write_video(tmp_path / "clip.mkv", texture(12, 160, (2, 0)), codec=codec, options=options)
    whole = decode_all(tmp_path / "clip.mkv")
    os.rename(tmp_path / "clip.mkv", tmp_path / "clip.avi")
    clip = dataset.read_clip(tmp_path / "clip.avi", [0, 5, 11])
    assert all(np.array_equal(frame, whole[n]) for frame, n in zip(clip, (0, 5, 11)))


def test_huge_frames_are_refused(tmp_path, monkeypatch):
    toy.write_video(tmp_path / "clip.mp4", texture(4, 160, (1, 0)))
    monkeypatch.setattr(dataset, "MAX_PIXELS", 150 * 150)
    with pytest.raises(dataset.VideoError, match="clip.mp4: 160x160 pixels, larger than 8K"):
        dataset.probe_video(tmp_path / "clip.mp4")
    # Where they come later than the header says, the decoder refuses.
    for name, size in (("a", 96), ("b", 160)):
        frames = np.zeros((40, size, size, 3), np.uint8)
        toy.write_video(tmp_path / f"{name}.h264", frames, options={"g": "5", "bf": "0"})
    (tmp_path / "both.h264").write_bytes(
        b"".join((tmp_path / f"{name}.h264").read_bytes() for name in "ab")
    )
    assert dataset.read_clip(tmp_path / "both.h264", [5]).shape == (1, 96, 96, 3)
    with pytest.raises(dataset.VideoError, match="both.h264"):
        dataset.read_clip(tmp_path / "both.h264", [60])
    # VP8 with 16383 x 16383 pixels in its first frame.
    monkeypatch.undo()
    toy.write_video(tmp_path / "vp8.webm", texture(4, 160, (1, 0)), codec="libvpx", options={})
    data = bytearray((tmp_path / "vp8.webm").read_bytes())
    place = data.index(b"\x9d\x01\x2a")
    data[place + 3 : place + 7] = (16383).to_bytes(2, "little") * 2
    (tmp_path / "vp8.webm").write_bytes(data)
    ((outcome, _, memory),) = read_in_a_process([str(tmp_path / "vp8.webm")])
    assert "vp8.webm" in outcome and "\n" not in outcome


def test_names_are_files_and_nothing_else(tmp_path, monkeypatch):
    """A pipe would wait for ever; a name that looks like a protocol of libav's is a file's all the
    same; text in a header that is no UTF-8 does not matter."""
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in (
        ("pipe.mp4", "not a file"),
        (".", "not a file"),
        ("gone.mp4", "No such file"),
    ):
        with pytest.raises(dataset.VideoError, match=reason):
            dataset.probe_video(tmp_path / name)
    with pytest.raises(dataset.VideoError, match="http://127.0.0.1:9/a.mp4: No such file"):
        dataset.probe_video("http://127.0.0.1:9/a.mp4")
    monkeypatch.chdir(tmp_path)
    toy.write_video(tmp_path / "clip.mp4", texture(4, 160, (1, 0)))
    os.rename("clip.mp4", "concat:a|b.mp4")
    assert dataset.probe_video("concat:a|b.mp4").frames == 4
    with av.open(str(tmp_path / "title.mkv"), "w") as container:
        container.metadata["title"] = "Caffe"
        stream = container.add_stream("libx264", rate=12)
        stream.height = stream.width = 160
        for frame in texture(4, 160, (1, 0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "title.mkv").read_bytes().replace(b"Caffe", b"Caff\xe9")
    (tmp_path / "title.mkv").write_bytes(data)
    assert dataset.probe_video(tmp_path / "title.mkv").frames == 4


def test_frames_are_torchcodecs(footage):
    """The same indices, another decoder: mean absolute difference under 2 of 255; 10 bits, HEVC,
    AV1, rotation."""
    paths = sorted(p for p in footage.rglob("*") if p.suffix in (".mp4", ".mkv", ".mov"))
    try:
        from torchcodec import decoders

        decoders.VideoDecoder(str(footage / "asl" / "eat.mkv"))
    except (ImportError, OSError, RuntimeError) as error:  # some import, and fail at the first file
        pytest.skip(f"torchcodec cannot be used: {str(error).strip().splitlines()[0]}")
    for path in paths:
        if path.name == "corrupted.mp4":
            continue
        theirs = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        count = dataset.probe_video(path).frames
        assert len(theirs) == count, path
        numbers = sorted({0, count // 3, count // 2, count - 1})
        ours = dataset.read_clip(path, numbers)
        assert (ours.float() - theirs.get_frames_at(numbers).data).abs().mean() < 2, path
