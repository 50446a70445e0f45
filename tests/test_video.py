"""Reading: against a plain decode of the whole file, known motion, and files that are broken."""

import av
import numpy as np
import pytest
import torch

import dataset
import toy
from dataset import VideoError


def decode_all(path):
    """Every frame in order, as it is shown, the simplest way there is."""
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.best("video")))
        rgb = [frame.to_ndarray(format="rgb24") for frame in frames]
        return [np.rot90(one, round(frame.rotation / 90)) for one, frame in zip(rgb, frames)]


def assert_read(path, frames, *clips):
    """So many frames are found, and those of each list of numbers are a plain decode's."""
    whole = decode_all(path)
    assert dataset.probe_video(path).frames == len(whole) == frames
    for wanted in clips:
        clip = dataset.read_clip(path, wanted)
        assert clip.dtype == torch.uint8 and np.array_equal(clip, [whole[n] for n in wanted]), (
            wanted
        )


def needs_codec(codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")


def texture(frames, size, step, seed=0):
    """A textured square that moves by `step` (x, y) pixels a frame over a grey, still
    background."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    clip = np.full((frames, size, size, 3), 128, np.uint8)
    for i in range(frames):
        x, y = 24 + step[0] * i, 24 + step[1] * i
        clip[i, y : y + 48, x : x + 48] = coarse
    return clip


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """60 frames with B-frames and key frames every 12, for seeking."""
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    toy.write_video(path, texture(60, 160, (1, 0)), options={"g": "12", "bf": "2", "crf": "18"})
    return path


def test_frames_are_those_of_a_plain_decode(numbered):
    assert dataset.probe_video(numbered)[1:] == (pytest.approx(12), (160, 160))
    wanted = [0], [59], [30, 31, 31, 50], range(0, 60, 7), [11, 12, 13], [24], [59, 59]
    assert_read(numbered, 60, *wanted)
    for wrong in ([60], [-1], [3, 2], []):
        with pytest.raises(ValueError, match="numbered.mp4: frame numbers"):
            dataset.read_clip(numbered, wrong)


def test_only_what_is_needed_is_decoded(tmp_path):
    """A key frame every 12, then P and, unless wanted, none of the B frames, to which nothing
    refers."""
    options = {"g": "12", "bf": "2", "x264-params": "b-pyramid=none:b-adapt=0"}
    toy.write_video(tmp_path / "clip.mp4", texture(60, 160, (1, 0)), options=options)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        kinds = "".join("?IPB"[frame.pict_type] for frame in container.decode(video=0))
    assert kinds.startswith("IBBPBBPBBPBP" * 4)
    with dataset.open_video(tmp_path / "clip.mp4") as video:
        for wanted, references in (
            ([50, 52], [48, 51, 54]), ([3, 4, 5], [0, 6]), ([11, 12], [0, 3, 6, 9]),
            ([11, 14], [0, 3, 6, 9, 12, 15]), ([24], []),
            ([0, 59], [48, 51, 54, 57]), ([7, 46], [0, 3, 6, 9, 36, 39, 42, 45, 47]),
        ):  # fmt: skip
            decoded = [number for number, _ in dataset._decode_by_key(video, wanted)]
            assert decoded == sorted(set(wanted + references)), wanted


PYRAMID = "open-gop=1:b-pyramid=normal:bframes=5:scenecut=0"
LAYERS = "log-level=none:keyint=20:bframes=4:temporal-layers=3"


@pytest.mark.parametrize("codec, name, options", [
    ("libx264", "open-gop.mp4", {"g": "15", "x264-params": PYRAMID}),
    ("libx264", "refresh.mkv", {"g": "250", "x264-params": "intra-refresh=1"}),
    ("libx264", "fields.mp4", {"g": "20", "flags": "+ilme+ildct"}),
    ("libx264", "stream.ts", {"g": "20"}), ("libx264", "old.avi", {"g": "20"}),
    ("libx264", "flash.flv", {"g": "12"}),
    ("libx264", "no-times.h264", {"g": "5", "bf": "0"}),
    ("mpeg4", "no-times.avi", {"g": "6", "bf": "2"}),
    ("mpeg4", "b.mp4", {"g": "12", "bf": "2"}), ("mpeg2video", "dvd.mpg", {"g": "12", "bf": "2"}),
    ("libx265", "layers.mp4", {"x265-params": LAYERS}),
    ("libvpx-vp9", "vp9.webm", {"deadline": "realtime", "g": "20"}), ("libvpx", "vp8.mkv", {}),
    ("libsvtav1", "av1.mkv", {}), ("libaom-av1", "av1.mkv", {"cpu-used": "8"}),
])  # fmt: skip
def test_any_frames_of_any_codec_are_those_of_a_plain_decode(tmp_path, codec, name, options):
    needs_codec(codec)
    toy.write_video(tmp_path / name, texture(60, 192, (2, 1)), codec=codec, options=options)
    rng, clips = np.random.default_rng(0), []
    for _ in range(4):
        clips.append(sorted(rng.integers(0, 60, 6)))
        clips += [range(rng.integers(60), 60, rng.integers(1, 8)) for _ in range(2)]
    assert_read(tmp_path / name, 60, *clips)


def test_one_opening_for_range_and_clips(numbered, monkeypatch):
    opened, plain = [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or plain(*a, **k))
    with dataset.open_video(numbered, motion=True) as video:
        assert dataset.frame_range(video, 1.0, 3.0) == (12, 36)
        late, motion = dataset.read_clip(video, [40, 44], motion=True)
        early = dataset.read_clip(video, [3, 10])
    assert len(opened) == 1
    assert torch.equal(late, dataset.read_clip(numbered, [40, 44]))
    assert torch.equal(early, dataset.read_clip(numbered, [3, 10]))
    assert torch.equal(motion, dataset.read_clip(numbered, [40, 44], motion=True)[1])
    without = pytest.raises(ValueError, match="opened without motion")
    with dataset.open_video(numbered) as video, without:
        dataset.read_clip(video, [0], motion=True)


def test_motion_has_the_length_that_was_drawn(tmp_path):
    path, options = tmp_path / "square.mp4", {"refs": "1", "bf": "0", "g": "250", "crf": "10"}
    toy.write_video(path, texture(10, 128, (5, 3)), options=options)
    _, motion = dataset.read_clip(path, range(10), motion=True)
    assert motion.shape == (10, 16, 16) and motion.dtype == torch.float32
    # Rows 48 to 80, columns 56 to 88, where the square is at rows 36 to 84, columns 44 to 92.
    assert motion[4, 6:10, 7:11] == pytest.approx(np.hypot(5, 3), abs=0.01)
    assert motion[4, :3].max() == 0 and motion[4, :, :4].max() == 0  # the background stands still
    # The key frame has no vectors: it borrows from the nearest frame that has, which is the next.
    assert torch.equal(motion[0], motion[1]) and motion[0].max() > 4
    _, some = dataset.read_clip(path, [4, 4, 9], motion=True)
    assert torch.equal(some[:2, 6:10, 7:11], motion[[4, 4], 6:10, 7:11]) and some[2].max() > 4
    with pytest.warns(dataset.NoMotionVectors):
        assert dataset.read_clip(path, [0], motion=True)[1].eq(0).all()


def test_fill_missing_by_hand():
    none, one, two = ([[value, np.nan]] for value in (np.nan, 1, 2))
    for fields, filled in (
        ((none, one, none, none, two), [1, 1, 1, 2, 2]),  # the nearer one
        ((one, none, none), [1, 1, 1]),
        ((one, none, two), [1, 2, 2]),  # of two that are as near, the later
        ((None, one, None, two), [1, 1, 2, 2]),  # a key frame has no field at all
    ):
        made = dataset._fill_missing([f and np.array(f, np.float32) for f in fields])
        assert made[:, 0, 0].tolist() == filled and (made[:, 0, 1] == 0).all()


@pytest.mark.parametrize("codec, options", [
    ("libx264", {"g": "1"}), ("libx265", {"x265-params": "log-level=none"}),
    ("libvpx-vp9", {"deadline": "realtime"}),
])  # fmt: skip
def test_without_vectors_frames_are_compared(tmp_path, codec, options):
    needs_codec(codec)
    path = tmp_path / "clip.mkv"
    toy.write_video(path, texture(8, 128, (6, 0)), codec=codec, options=options)
    with pytest.warns(dataset.NoMotionVectors, match="clip.mkv"):
        frames, motion = dataset.read_clip(path, [0, 2, 4, 4], motion=True)
    grey = frames.float().mean(-1)
    expected = (grey[1] - grey[0]).abs().view(16, 8, 16, 8).mean((1, 3))
    torch.testing.assert_close(motion[1], expected)
    assert torch.equal(motion[0], motion[1]) and torch.equal(motion[2], motion[3])
    assert motion[1].max() > 5


def test_clip_indices():
    assert dataset.clip_indices(0, 7, 4, 2) == [0, 2, 4, 6]
    assert dataset.clip_indices(0, 3, 4, 2) == [0, 2, 2, 2]  # too short: the last frame again
    starts = {dataset.clip_indices(10, 20, 4, 2)[0] for _ in range(200)}
    assert starts == {10, 11, 12}


def test_frame_range(numbered):
    assert dataset.frame_range(numbered) == (0, 60)
    assert dataset.frame_range(numbered, 1.0, 2.5) == (12, 30)  # 12 frames a second
    with pytest.raises(VideoError, match="no frame between start=9"):
        dataset.frame_range(numbered, 9, 10)


def test_bad_files_are_named(tmp_path, numbered):
    with av.open(str(tmp_path / "sound.mka"), "w") as container:
        stream, silence = container.add_stream("aac", rate=16000), np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    (tmp_path / "cut.mp4").write_bytes(numbered.read_bytes()[:2000])
    readers = dataset.probe_video, dataset.frame_range, lambda path: dataset.read_clip(path, [0])
    for name, reason in (
        ("empty.mp4", ""), ("text.mp4", ""), ("cut.mp4", ""), ("missing.mp4", "No such file"),
        ("sound.mka", "no video stream"),
    ):  # fmt: skip
        for reader in readers:
            with pytest.raises(VideoError, match=f"{name}: {reason}") as error:
                reader(tmp_path / name)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, frames, size", [
    ("odd/av1_video.mkv", 125, (360, 640)), ("odd/bt709_full_range.mp4", 30, (720, 1280)),
    ("odd/h265_video.mp4", 10, (128, 128)), ("odd/nasa_13013.mp4", 390, (270, 480)),
    ("odd/unordered.mov", 4, (50, 50)),
    ("odd/video_90.mov", 3, (568, 320)), ("sports/baseball.mp4", 167, (360, 640)),
    ("sports/basketball.mp4", 214, (360, 640)),
    ("asl/eat.mkv", 47, (480, 640)),
])  # fmt: skip
def test_real_footage(footage, name, frames, size):
    assert dataset.probe_video(footage / name).size == size
    assert_read(footage / name, frames, [0, frames // 3, 2 * frames // 3, frames - 1])


@pytest.mark.parametrize("name", ["odd/h264_10bits.mp4", "odd/h265_10bits.mp4"])
def test_ten_bit_footage(footage, name):
    """Against the luma itself: BT.601's weights of our RGB give back the 10-bit Y, scaled to 8
    bits."""
    clip = dataset.read_clip(footage / name, [0, 15]).double()
    with av.open(str(footage / name)) as container:
        planes = [frame.planes[0] for frame in container.decode(video=0)]
        frames = [np.frombuffer(p, np.uint16).reshape(p.height, -1)[:, : p.width] for p in planes]
    luma = 16 + (clip @ torch.tensor([65.481, 128.553, 24.966]).double()) / 255
    for ours, theirs in zip(luma, (frames[0], frames[15])):
        assert np.abs(ours.numpy() - theirs / 4).mean() < 1.0


def test_corrupted_footage(footage):
    path = footage / "odd/corrupted.mp4"
    assert dataset.read_clip(path, [0, 20]).shape[0] == 2
    with pytest.raises(VideoError, match="corrupted.mp4"):
        dataset.read_clip(path, [0, 40])


def test_a_process_forked_after_reading_reads_too(tmp_path):
    """PyAV keeps scaling threads that a forked loader process does not have: it must not wait for
    them."""
    path, noise = (
        tmp_path / "clip.mp4",
        np.random.default_rng(0).integers(0, 256, (10, 256, 256, 3)),
    )
    toy.write_video(path, noise.astype(np.uint8))
    decode_all(path)

    def read(_):
        return dataset.read_clip(path, [0, 5, 9])

    here = read(path)
    loader = torch.utils.data.DataLoader([0], collate_fn=read, num_workers=1, timeout=60)
    assert torch.equal(next(iter(loader)), here)
