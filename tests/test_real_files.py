"""Files as others' tools leave them: what a player shows is what has a number."""

import av
import numpy as np
import pytest
import torch

import dataset


def grey(i):
    return np.full((64, 64, 3), 10 + 7 * i, np.uint8)


def encode(path, frames, codec="libx264", options=None, format=None):
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.thread_count, stream.options = 1, options or {}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def copy(source, target, *, first_key=0, change=None):
    """Packets as they are, from a key frame on; change(packet) may alter them."""
    with av.open(str(source)) as inside, av.open(str(target), "w") as outside:
        stream, keys = outside.add_stream_from_template(inside.streams.video[0]), -1
        for packet in inside.demux(inside.streams.video[0]):
            keys += packet.is_keyframe and packet.size > 0
            if packet.size and keys >= first_key:
                packet = change(packet) if change else packet
                packet.stream = stream
                outside.mux(packet)


def numbers(path):
    """Which grey each frame is, all of them and every third by itself."""
    count = dataset.probe_video(path).frames
    clip = dataset.read_clip(path, range(count))
    assert torch.equal(dataset.read_clip(path, range(0, count, 3)), clip[::3])
    return [round((value - 10) / 7) for value in clip.float().mean((1, 2, 3)).tolist()]


def test_a_packet_that_is_never_shown(tmp_path):
    """VP8: 9 frames, of which the 5th is as the 4th; the packet of the 4th is made a hidden one,
    with a time just before the next."""
    shades = [grey(i) for i in (0, 1, 2, 3, 3, 4, 5, 6, 7)]
    options = {"auto-alt-ref": "0", "lag-in-frames": "0"}
    encode(tmp_path / "plain.mkv", shades, "libvpx", options)

    def hide(packet, seen=[]):  # noqa: B006
        seen.append(packet.pts)
        if len(seen) != 4:
            return packet
        data = bytearray(bytes(packet))
        data[0] &= ~0x10
        hidden = av.Packet(bytes(data))
        hidden.pts = hidden.dts = packet.pts + 39  # of 40 ms
        hidden.time_base = packet.time_base
        return hidden

    copy(tmp_path / "plain.mkv", tmp_path / "hidden.mkv", change=hide)
    assert len(numbers(tmp_path / "plain.mkv")) == 9
    assert numbers(tmp_path / "hidden.mkv") == list(range(8))


X265 = "log-level=none:keyint=8:min-keyint=8:bframes=2:scenecut=0:b-adapt=0"


@pytest.mark.parametrize("codec, options, lost", [
    ("mpeg2video", {"g": "6", "bf": "2", "qmin": "1", "qmax": "1"}, (3, 21)),
    ("libx264", {"g": "8", "x264-params": "open-gop=1:bframes=2:scenecut=0:b-adapt=0"}, (8, 16)),
    ("libx265", {"x265-params": X265 + ":open-gop=1"}, (8, 16)),
])  # fmt: skip
@pytest.mark.parametrize("container", ["ts", "mpg", "mkv", "mp4", "flv"])
def test_leading_frames_of_a_cut_open_gop(tmp_path, codec, options, lost, container):
    """What they refer to was cut off: the first frame is the key frame."""
    if container == "flv" and codec == "mpeg2video" or container == "mpg" and codec == "libx265":
        pytest.skip(f"{container} holds no {codec}")
    encode(tmp_path / "whole.ts", [grey(i) for i in range(24)], codec, options)
    copy(tmp_path / "whole.ts", tmp_path / f"cut.{container}", first_key=1)
    first, count = lost
    assert numbers(tmp_path / f"cut.{container}") == list(range(first, first + count))


def test_leading_frames_that_can_be_decoded(tmp_path):
    """HEVC's RADL pictures come before the key frame, refer to nothing before it, and stay."""
    options = {"x265-params": X265 + ":open-gop=0:radl=2"}
    encode(tmp_path / "whole.ts", [grey(i) for i in range(24)], "libx265", options)
    copy(tmp_path / "whole.ts", tmp_path / "cut.ts", first_key=1)
    with av.open(str(tmp_path / "cut.ts")) as container:
        times = [p.pts for p in container.demux(container.streams.video[0]) if p.size]
    assert min(times) < times[0]  # there are some
    assert numbers(tmp_path / "cut.ts") == list(range(24 - len(times), 24))


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv"])
def test_times_of_decoding(tmp_path, container):
    """An AVI with B-frames, copied: its times are in the order of decoding."""

    def timed(packet):
        packet.pts = packet.dts
        return packet

    encode(tmp_path / "b.avi", [grey(i) for i in range(24)], options={"g": "12", "bf": "2"})
    copy(tmp_path / "b.avi", tmp_path / f"copy.{container}", change=timed)
    assert numbers(tmp_path / "b.avi") == list(range(24))
    assert numbers(tmp_path / f"copy.{container}") == list(range(24))


def test_times_that_go_back(tmp_path):
    """Two transport streams, joined, whose times overlap: 0 to 9, then 10 to 19."""
    for name, first in (("a.ts", 0), ("b.ts", 10)):
        shades = [grey(first + i) for i in range(10)]
        encode(tmp_path / name, shades, options={"g": "5", "bf": "0"})

    def later(packet):  # not the same times, else they would be doubles
        packet.pts, packet.dts = packet.pts + 700, packet.dts + 700
        return packet

    copy(tmp_path / "b.ts", tmp_path / "later.ts", change=later)
    joined = (tmp_path / "a.ts").read_bytes() + (tmp_path / "later.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(joined)
    assert numbers(tmp_path / "joined.ts") == list(range(20))


ONE = 1 << 16


@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0), (0.97, 0.26, -0.26, 0.97),
])  # fmt: skip
def test_all_orientations(tmp_path, a, b, c, d):
    """Every pixel goes where the display matrix says: (x,y) -> (ax + cy, bx + dy), and so does
    motion; an angle in between is the nearest right one."""
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:24, :40] = 200
    picture[:24, 40:] = 120
    moving = [np.roll(picture, (0, 4 * i), (0, 1)) for i in range(4)]
    encode(tmp_path / "plain.mp4", moving, options={"bf": "0", "crf": "10"})
    data = bytearray((tmp_path / "plain.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer, volume
    for i, value in enumerate((a, b, 0, c, d, 0)):
        where = place + 4 * i
        data[where : where + 4] = round(value * ONE).to_bytes(4, "big", signed=True)
    (tmp_path / "turned.mp4").write_bytes(data)
    plain, still = dataset.read_clip(tmp_path / "plain.mp4", [0, 2], motion=True)
    shown, moved = dataset.read_clip(tmp_path / "turned.mp4", [0, 2], motion=True)
    a, b, c, d = (round(value) for value in (a, b, c, d))
    for before, after in ((plain[1], shown[1]), (still[1], moved[1])):
        rows, cols = before.shape[:2]
        y, x = np.mgrid[:rows, :cols]
        right, down = a * x + c * y, b * x + d * y
        expected = torch.zeros_like(after)
        expected[down - down.min(), right - right.min()] = before
        assert torch.equal(after, expected)
    assert dataset.probe_video(tmp_path / "turned.mp4").size == tuple(shown.shape[1:3])
