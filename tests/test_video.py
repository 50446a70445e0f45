"""Reading: against a plain decode of the whole file, known motion, and files that are broken."""

import av
import numpy as np
import pytest
import torch

import tgmae
import toy
from tgmae import VideoError


def decode_all(path):
    """Every frame in order, the simplest way there is."""
    with av.open(str(path)) as container:
        return [
            frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.best("video"))
        ]


def texture(frames, size, step, seed=0):
    """A textured square that moves by `step` (x, y) pixels a frame over a grey, still background."""
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
    whole = decode_all(numbered)
    info = tgmae.probe_video(numbered)
    assert info.frames == len(whole) == 60 and info.size == (160, 160) and info.fps == pytest.approx(12)
    for wanted in ([0], [59], [30, 31, 31, 50], range(0, 60, 7), [11, 12, 13], [24], [59, 59]):
        clip = tgmae.read_clip(numbered, wanted)
        assert clip.dtype == torch.uint8 and clip.shape == (len(wanted), 160, 160, 3)
        assert all(np.array_equal(clip[i], whole[n]) for i, n in enumerate(wanted)), wanted


def test_seek_decodes_only_what_it_needs(numbered, monkeypatch):
    seen = []
    original = tgmae._to_rgb
    monkeypatch.setattr(
        tgmae, "_to_rgb", lambda frame, *size: seen.append(frame.pts) or original(frame, *size)
    )
    decoded = []
    plain = tgmae._numbered_frames
    monkeypatch.setattr(tgmae, "_numbered_frames", lambda *a: (decoded.append(x[0]) or x for x in plain(*a)))
    tgmae.read_clip(numbered, [50, 52])
    assert len(seen) == 2 and decoded == [50, 51, 52]  # numbered from what the seek landed on, not from 0


def test_motion_has_the_length_that_was_drawn(tmp_path):
    path = tmp_path / "square.mp4"
    toy.write_video(path, texture(10, 128, (5, 3)), options={"refs": "1", "bf": "0", "g": "250", "crf": "10"})
    _, motion = tgmae.read_clip(path, range(10), motion=True)
    assert motion.shape == (10, 16, 16) and motion.dtype == torch.float32
    inside = motion[
        4, 6:10, 7:11
    ]  # rows 48..80, columns 56..88; the square is at rows 36..84, columns 44..92
    assert inside == pytest.approx(np.hypot(5, 3), abs=0.01)
    assert (
        motion[4, :3].max() == 0 and motion[4, :, :4].max() == 0
    )  # above and left the background stands still
    # The key frame has no vectors: it borrows from the nearest frame that has, which is the next.
    assert torch.equal(motion[0], motion[1]) and motion[0].max() > 4
    _, alone = tgmae.read_clip(path, [4], motion=True)
    assert alone.shape == (1, 16, 16)


def test_fill_missing_by_hand():
    nan = np.nan
    motion = np.array([[nan, nan], [1, nan], [nan, nan], [nan, nan], [2, nan]], np.float32)[:, None]
    assert tgmae._fill_missing(motion)[:, 0, 0].tolist() == [
        1,
        1,
        1,
        2,
        2,
    ]  # number 2: 1 is nearer; number 3: 2
    assert tgmae._fill_missing(motion[1:4])[:, 0, 0].tolist() == [1, 1, 1]
    assert tgmae._fill_missing(np.stack([motion[1], motion[0], motion[4]]))[1, 0, 0] == 2  # a tie: the later
    assert (tgmae._fill_missing(motion)[:, 0, 1] == 0).all()


@pytest.mark.parametrize(
    "codec, options",
    [
        ("libx264", {"g": "1"}),
        ("libx265", {"x265-params": "log-level=none"}),
        ("libvpx-vp9", {"deadline": "realtime"}),
    ],
)
def test_without_vectors_frames_are_compared(tmp_path, codec, options):
    path = tmp_path / "clip.mkv"
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    toy.write_video(path, texture(8, 128, (6, 0)), codec=codec, options=options)
    with pytest.warns(tgmae.NoMotionVectors, match="clip.mkv"):
        frames, motion = tgmae.read_clip(path, [0, 2, 4, 4], motion=True)
    grey = frames.float().mean(-1)
    expected = (grey[1] - grey[0]).abs().view(16, 8, 16, 8).mean((1, 3))
    torch.testing.assert_close(motion[1], expected)
    assert torch.equal(motion[2], motion[3]) and torch.equal(motion[0], motion[1]) and motion[1].max() > 5


def test_clip_indices():
    assert tgmae.clip_indices(0, 7, 4, 2) == [0, 2, 4, 6]
    assert tgmae.clip_indices(0, 3, 4, 2) == [0, 2, 2, 2]  # too short: the last frame again
    starts = {tgmae.clip_indices(10, 20, 4, 2)[0] for _ in range(200)}
    assert starts == {10, 11, 12}


def test_frame_range(numbered):
    assert tgmae.frame_range(numbered) == (0, 60)
    assert tgmae.frame_range(numbered, 1.0, 2.5) == (12, 30)  # 12 frames a second
    with pytest.raises(VideoError, match="no frame between start=9"):
        tgmae.frame_range(numbered, 9, 10)


def test_bad_files_are_named(tmp_path, numbered):
    cases = {"empty.mp4": b"", "text.mp4": b"not a video" * 100, "cut.mp4": numbered.read_bytes()[:2000]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        for call in (tgmae.probe_video, lambda path: tgmae.read_clip(path, [0]), tgmae.frame_range):
            with pytest.raises(VideoError, match=name) as error:
                call(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(VideoError, match="missing.mp4: No such file"):
        tgmae.probe_video(tmp_path / "missing.mp4")
    with av.open(str(tmp_path / "sound.mka"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="sound.mka: no video stream"):
        tgmae.probe_video(tmp_path / "sound.mka")
    for wanted in ([60], [-1], [3, 2], []):
        with pytest.raises(ValueError, match="numbered.mp4: frame numbers"):
            tgmae.read_clip(numbered, wanted)


def test_files_without_timestamps(tmp_path):
    """MPEG-4 with B-frames in AVI: packets have no presentation times, frames are counted."""
    path = tmp_path / "old.avi"
    toy.write_video(path, texture(20, 128, (2, 0)), codec="mpeg4", options={"bf": "2", "g": "6"})
    whole = decode_all(path)
    assert tgmae.probe_video(path).frames == len(whole) == 20
    clip = tgmae.read_clip(path, [3, 9, 19])
    assert all(np.array_equal(clip[i], whole[n]) for i, n in enumerate([3, 9, 19]))


@pytest.mark.parametrize("name, frames, size", [
    ("odd/av1_video.mkv", 125, (360, 640)), ("odd/bt709_full_range.mp4", 30, (720, 1280)),
    ("odd/h265_video.mp4", 10, (128, 128)), ("odd/nasa_13013.mp4", 390, (270, 480)), ("odd/unordered.mov", 4, (50, 50)),
    ("odd/video_90.mov", 3, (568, 320)), ("sports/baseball.mp4", 167, (360, 640)), ("asl/eat.mkv", 47, (480, 640)),
])  # fmt: skip
def test_real_footage(footage, name, frames, size):
    path = footage / name
    info = tgmae.probe_video(path)
    assert (info.frames, info.size) == (frames, size)
    whole = decode_all(path)
    assert len(whole) == frames
    wanted = sorted({0, frames // 3, 2 * frames // 3, frames - 1})
    clip = tgmae.read_clip(path, wanted)
    turned = [np.rot90(whole[n], -1) if name == "odd/video_90.mov" else whole[n] for n in wanted]
    assert all(np.array_equal(a, b) for a, b in zip(clip, turned))


@pytest.mark.parametrize("name", ["odd/h264_10bits.mp4", "odd/h265_10bits.mp4"])
def test_ten_bit_footage(footage, name):
    """Against the luma itself: BT.601's weights of our RGB give back the 10-bit Y, scaled to 8 bits."""
    clip = tgmae.read_clip(footage / name, [0, 15]).double()
    with av.open(str(footage / name)) as container:
        planes = [frame.planes[0] for frame in container.decode(video=0)]
        frames = [np.frombuffer(p, np.uint16).reshape(p.height, -1)[:, : p.width] for p in planes]
    luma = 16 + (clip @ torch.tensor([65.481, 128.553, 24.966]).double()) / 255
    for ours, theirs in zip(luma, (frames[0], frames[15])):
        assert np.abs(ours.numpy() - theirs / 4).mean() < 1.0


def test_corrupted_footage(footage):
    path = footage / "odd/corrupted.mp4"
    assert tgmae.read_clip(path, [0, 20]).shape[0] == 2
    with pytest.raises(VideoError, match="corrupted.mp4"):
        tgmae.read_clip(path, [0, 40])


class _OneClip(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return tgmae.read_clip(self.path, [0, 5, 9])


def test_a_process_forked_after_reading_reads_too(tmp_path):
    """PyAV keeps scaling threads that a forked loader process does not have: it must not wait for them."""
    path = tmp_path / "clip.mp4"
    toy.write_video(path, np.random.default_rng(0).integers(0, 256, (10, 256, 256, 3)).astype(np.uint8))
    with av.open(str(path)) as container:
        next(container.decode(video=0)).to_ndarray(format="rgb24")
    here = _OneClip(path)[0]
    loader = torch.utils.data.DataLoader(_OneClip(path), batch_size=None, num_workers=1, timeout=60)
    assert torch.equal(next(iter(loader)), here)
