"""Files as others' tools leave them: what a player shows is what has a number."""

import json
import multiprocessing as mp
import os
import re
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import write_lines
from test_video import assert_read, decode_all, texture

import captions
import dataset
import eval as ev
import toy
import train

FINE = {"qmin": "1", "qmax": "1"}
NO_B_FRAMES = "bframes=2:b-adapt=1:b-bias=-100:scenecut=0"  # though they are allowed


def encode(path, greys, codec="libx264", **options):
    """A frame for each number."""
    frames = np.stack([np.full((64, 64, 3), 10 + 7 * i, np.uint8) for i in greys])
    toy.write_video(path, frames, fps=25, codec=codec, options=options)


def copy(source, target, *, first_key=0, change=lambda packet: packet):
    """Packets as they are, from a key frame on; change(packet) may alter them."""
    with av.open(str(source)) as inside, av.open(str(target), "w") as outside:
        stream, keys = outside.add_stream_from_template(inside.streams.video[0]), -1
        for packet in inside.demux(inside.streams.video[0]):
            keys += packet.is_keyframe and packet.size > 0
            if packet.size and keys >= first_key:
                packet = change(packet)
                packet.stream = stream
                outside.mux(packet)


def at(packet, time):
    packet.pts = packet.dts = time
    return packet


def numbers(path):
    """Which grey each frame is, all of them and every third by itself."""
    count = dataset.probe_video(path).frames
    clip = dataset.read_clip(path, range(count))
    assert torch.equal(dataset.read_clip(path, range(0, count, 3)), clip[::3])
    return [round((value - 10) / 7) for value in clip.float().mean((1, 2, 3)).tolist()]


def test_a_packet_that_is_never_shown(tmp_path):
    """VP8: 9 frames, of which the 5th is as the 4th; the packet of the 4th is made a hidden one,
    with a time just before the next."""
    plain, options = tmp_path / "plain.mkv", {"auto-alt-ref": "0", "lag-in-frames": "0"}
    encode(plain, (0, 1, 2, 3, 3, 4, 5, 6, 7), "libvpx", **options)
    seen = []

    def hide(packet):
        seen.append(packet.pts)
        if len(seen) != 4:
            return packet
        data = bytearray(bytes(packet))
        data[0] &= ~0x10
        hidden = av.Packet(bytes(data))
        hidden.pts = hidden.dts = packet.pts + 39  # of 40 ms
        hidden.time_base = packet.time_base
        return hidden

    copy(plain, tmp_path / "hidden.mkv", change=hide)
    assert len(numbers(plain)) == 9 and numbers(tmp_path / "hidden.mkv") == list(range(8))


X265 = "log-level=none:keyint=8:min-keyint=8:bframes=2:scenecut=0:b-adapt=0"


@pytest.mark.parametrize("codec, options, lost, containers", [
    ("mpeg2video", {"g": "6", "bf": "2", "qmin": "1", "qmax": "1"}, (3, 21), "ts mpg mkv mp4"),
    ("libx264", {"g": "8", "x264-params": "open-gop=1:bframes=2:scenecut=0:b-adapt=0"}, (8, 16),
     "ts mpg mkv mp4 flv"),
    ("libx265", {"x265-params": X265 + ":open-gop=1"}, (8, 16), "ts mkv mp4 flv"),
])  # fmt: skip
def test_leading_frames_of_a_cut_open_gop(tmp_path, codec, options, lost, containers):
    """What they refer to was cut off: the first frame is the key frame."""
    encode(tmp_path / "whole.ts", range(24), codec, **options)
    first, count = lost
    for container in containers.split():
        copy(tmp_path / "whole.ts", tmp_path / f"cut.{container}", first_key=1)
        assert numbers(tmp_path / f"cut.{container}") == list(range(first, first + count))


def test_leading_frames_that_can_be_decoded(tmp_path):
    """HEVC's RADL pictures come before the key frame, refer to nothing before it, and stay."""
    options = {"x265-params": X265 + ":open-gop=0:radl=2"}
    encode(tmp_path / "whole.ts", range(24), "libx265", **options)
    copy(tmp_path / "whole.ts", tmp_path / "cut.ts", first_key=1)
    with av.open(str(tmp_path / "cut.ts")) as container:
        times = [p.pts for p in container.demux(container.streams.video[0]) if p.size]
    assert min(times) < times[0]  # there are some
    assert numbers(tmp_path / "cut.ts") == list(range(24 - len(times), 24))


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv"])
def test_times_of_decoding(tmp_path, container):
    """An AVI with B-frames, copied: its times are in the order of decoding."""
    encode(tmp_path / "b.avi", range(24), g="12", bf="2")
    copy(tmp_path / "b.avi", tmp_path / f"copy.{container}", change=lambda p: at(p, p.dts))
    assert numbers(tmp_path / "b.avi") == list(range(24))
    assert numbers(tmp_path / f"copy.{container}") == list(range(24))


def test_times_that_go_back(tmp_path):
    """Two transport streams, joined, whose times overlap: 0 to 9, then 10 to 19."""
    encode(tmp_path / "a.ts", range(10), g="5", bf="0")
    encode(tmp_path / "b.ts", range(10, 20), g="5", bf="0")
    later = tmp_path / "later.ts"  # not the same times, else they would be doubles
    copy(tmp_path / "b.ts", later, change=lambda p: at(p, p.pts + 700))
    (tmp_path / "joined.ts").write_bytes((tmp_path / "a.ts").read_bytes() + later.read_bytes())
    assert numbers(tmp_path / "joined.ts") == list(range(20))


def test_variable_frame_rate(tmp_path):
    """Frame numbers are ranks; seconds are times, not numbers times a rate."""
    times = np.cumsum([10, 90, 20, 300, 30] * 6)  # ms
    left = iter(times.tolist())
    encode(tmp_path / "even.mkv", range(30), bf="0")
    copy(tmp_path / "even.mkv", tmp_path / "vfr.mkv", change=lambda p: at(p, next(left)))
    assert numbers(tmp_path / "vfr.mkv") == list(range(30))
    expected = np.searchsorted((times - times[0]) / 1000, (0.5, 1.2)).tolist()
    assert list(dataset.frame_range(tmp_path / "vfr.mkv", 0.5, 1.2)) == expected


def marked(packet):
    packet.is_keyframe = True
    return packet


@pytest.mark.parametrize("source, codec, options, target", [
    ("b.avi", "mpeg4", {"g": "12", "bf": "2"}, "b.mkv"),
    ("keys.mp4", "mpeg4", {"g": "12", "bf": "0"}, "copy.mp4"),
    ("keys.avi", "wmv2", {"g": "12"}, "copy.avi"),
    ("keys.mkv", "libx265", {"x265-params": "log-level=none:keyint=12"}, "copy.mp4"),
    ("keys.mkv", "libx264", {"g": "12"}, "copy.mov"),
    ("keys.mkv", "libvpx-vp9", {"g": "12", "deadline": "realtime"}, "copy.webm"),
    ("keys.mkv", "libvpx", {"g": "12"}, "copy.webm"),
])  # fmt: skip
def test_every_packet_is_marked_as_a_key_frame(tmp_path, source, codec, options, target):
    """As some muxers leave them: decoding from there would give grey rubbish."""
    toy.write_video(tmp_path / source, texture(24, 160, (2, 1)), codec=codec, options=options)
    copy(tmp_path / source, tmp_path / target, change=marked)
    assert_read(tmp_path / target, 24, range(24), *[[number] for number in range(24)])


@pytest.mark.parametrize("container", ["avi", "mkv"])
def test_packed_bitstream(footage, tmp_path, container):
    """XviD's, as in all of UCF101: the times in the file do not give the order."""
    path = footage / "odd/packed.avi"
    if container != "avi":
        path = tmp_path / f"copy.{container}"
        copy(footage / "odd/packed.avi", path)
    assert_read(path, 48, range(48), [47], range(3, 48, 7))
    assert dataset.frame_range(path, 0.4, 1.0) == (10, 25)
    whole, motion = dataset.read_clip(path, range(48), motion=True)
    some, of_some = dataset.read_clip(path, [20, 21], motion=True)
    assert torch.equal(some, whole[20:22]) and torch.equal(of_some[1], motion[21])


def every_frame(path):
    """Which grey each frame is, each read by itself, and all at once; None: cannot be read."""
    count, found = dataset.probe_video(path).frames, []
    for number in range(count):
        try:
            (value,) = dataset.read_clip(path, [number]).float().mean((1, 2, 3)).tolist()
            found.append(round((value - 10) / 7))
        except dataset.VideoError:
            found.append(None)
    return found


def without(source, target, *lost):
    """A copy in which the packets with these numbers are missing."""
    with av.open(str(source)) as inside, av.open(str(target), "w") as outside:
        stream = outside.add_stream_from_template(inside.streams.video[0])
        for number, packet in enumerate(inside.demux(inside.streams.video[0])):
            if packet.size and number not in lost:
                packet.stream = stream
                outside.mux(packet)


def replaced(source, target, number, data):
    """A copy in which that packet, and only that, has other bytes."""
    packets = iter(range(10_000))

    def change(packet):
        if next(packets) != number:
            return packet
        other = av.Packet(data)
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        return other

    copy(source, target, change=change)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_lost_packets_of_hevc(tmp_path, container):
    """The decoder gives nothing up to the next key frame: what stands on the screen."""
    options = X265 + ":open-gop=0"
    encode(tmp_path / "whole.mp4", range(24), "libx265", **{"x265-params": options})
    without(tmp_path / "whole.mp4", tmp_path / f"lost.{container}", 4)  # in order of decoding
    found = every_frame(tmp_path / f"lost.{container}")
    came = [*range(4), *range(8, 24)]
    assert len(found) == 23 and found[-16:] == came[-16:]  # the next key frame is number 8
    assert found[:7] == [0, 1, 2, 3, 3, 3, 3]
    without(tmp_path / "whole.mp4", tmp_path / f"begins.{container}", 0, 1)
    assert every_frame(tmp_path / f"begins.{container}") == list(range(8, 24))


def test_nothing_to_show_for_a_second(tmp_path):
    options = "log-level=none:keyint=50:min-keyint=50:bframes=0:scenecut=0"
    encode(tmp_path / "a.mp4", [i % 30 for i in range(60)], "libx265", **{"x265-params": options})
    without(tmp_path / "a.mp4", tmp_path / "lost.mkv", 5)  # of 25 frames a second
    found = every_frame(tmp_path / "lost.mkv")
    assert found == [*range(5), *[4] * 24, *[None] * 20, *range(20, 30)]


@pytest.mark.parametrize("container", ["avi", "mkv"])
def test_not_coded_pictures(tmp_path, container):
    """XviD writes a packet of a few bytes where nothing has changed, and no frame comes out."""
    encode(tmp_path / "plain.avi", range(24), "mpeg4", **FINE, g="12", bf="0")
    # Of type P, no further second, a mark, the time in five bits, a mark, not coded; stuffing.
    bits = "01" + "0" + "1" + f"{15:05b}" + "1" + "0" + "01111"
    picture = b"\0\0\1\xb6" + int(bits, 2).to_bytes(2, "big")
    replaced(tmp_path / "plain.avi", tmp_path / f"not-coded.{container}", 15, picture)
    with av.open(str(tmp_path / f"not-coded.{container}")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 23
    expected = [*range(15), 14, *range(16, 24)]
    assert every_frame(tmp_path / f"not-coded.{container}") == expected


def test_a_stream_that_goes_on_in_the_middle_of_a_group(tmp_path):
    """The first part's last frame stands until something can be decoded."""
    encode(tmp_path / "a.ts", range(10), g="5", bf="0")
    encode(tmp_path / "b.ts", range(10, 20), g="5", bf="0")
    without(tmp_path / "b.ts", tmp_path / "cut.ts", 0, 1)
    later = tmp_path / "later.ts"
    copy(tmp_path / "cut.ts", later, first_key=-1, change=lambda p: at(p, p.pts + 90_000))
    parts = [(tmp_path / name).read_bytes() for name in ("a.ts", "later.ts")]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    found = every_frame(tmp_path / "joined.ts")
    assert found[:12] == [*range(10), 9, 9] and found[13:] == [*range(15, 20)]


@pytest.mark.parametrize("codec, container, options", [
    ("libx264", "mp4", {"g": "12", "crf": "10"}), ("libx264", "ts", {"g": "12", "crf": "10"}),
    ("libx264", "mkv", {"g": "12", "crf": "10"}), ("libx264", "flv", {"g": "12", "crf": "10"}),
    ("mpeg4", "avi", {"g": "12"}), ("mpeg2video", "mpg", {"g": "12"}),
    ("libx265", "mp4", {"x265-params": "log-level=none:crf=8:keyint=8"}),
])  # fmt: skip
def test_an_interrupted_download(tmp_path, codec, container, options):
    """Half a packet at the end does not matter: its number shows the frame before."""
    clip = texture(40, 192, (2, 2))
    toy.write_video(tmp_path / "plain.mkv", clip, codec=codec, options={"bf": "2"} | options)
    with av.open(str(tmp_path / "plain.mkv")) as inside:
        path, fast = tmp_path / f"whole.{container}", {"movflags": "faststart"}
        with av.open(str(path), "w", options=fast if container == "mp4" else {}) as outside:
            stream = outside.add_stream_from_template(inside.streams.video[0])
            for packet in inside.demux(inside.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    outside.mux(packet)
    with av.open(str(path)) as file:
        times = [frame.pts for frame in file.decode(video=0)]
    whole, readable = decode_all(path), 0
    for share in (0.6, 0.7, 0.8, 0.9):
        cut = tmp_path / f"cut.{container}"
        cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with dataset.open_video(cut) as video:
            count, pts = dataset.frame_range(video)[1], video.index.pts
            frames = dataset.read_clip(video, range(count)).numpy().astype(int)
        places = range(count)  # in the whole file
        if pts is not None:
            places = [times.index(time) if time in times else -1 for time in pts]
        wrong = [i for i in range(count) if np.abs(frames[i] - whole[places[i]]).mean() > 1]
        assert len(wrong) <= 1, (share, wrong)
        assert all(np.array_equal(frames[i], frames[i - 1]) for i in wrong)
        readable += count
    assert readable > 90


@pytest.mark.parametrize("codec, container, share", [
    ("mpeg2video", "ts", 0.5), ("mpeg2video", "mpg", 0.5), ("libx264", "ts", 0.5),
    ("libx264", "mp4", 0.5), ("libx264", "mkv", 0.5), ("mpeg4", "avi", 0.5),
    ("libx264", "avi", 0.5), ("libx264", "mp4", 1.0), ("libx264", "avi", 1.0),
])  # fmt: skip
@pytest.mark.parametrize("place", [21, 23])  # right behind a key frame, and later
def test_damage_ends_at_a_key_frame(tmp_path, codec, container, share, place):
    """Noise in one packet, or in all of it: what refers to it is refused, the rest is right."""
    path, whole = tmp_path / f"whole.{container}", texture(100, 256, (1, 1))
    toy.write_video(path, whole, codec=codec, options={"g": "10", "bf": "2"} | FINE)
    whole = decode_all(path)
    with av.open(str(path)) as file:
        packet = [bytes(packet) for packet in file.demux(video=0) if packet.size][place]
    noise = np.random.default_rng(0).bytes(int(share * len(packet)))
    damaged = packet[: len(packet) - len(noise)] + noise
    replaced(path, tmp_path / f"damaged.{container}", place, damaged)
    right = wrong = 0
    for number in range(dataset.probe_video(tmp_path / f"damaged.{container}").frames):
        try:
            (frame,) = dataset.read_clip(tmp_path / f"damaged.{container}", [number]).numpy()
        except dataset.VideoError:
            continue
        fits = np.abs(frame.astype(int) - whole[number]).mean() < 1
        right, wrong = right + fits, wrong + (not fits)
    assert right >= 85 and wrong == 0


def test_one_size(tmp_path):
    """A recording that is turned in the middle: all frames have the first one's size."""
    for name, rows, cols in (("wide", 48, 64), ("tall", 64, 48)):
        frames = np.stack([np.full((rows, cols, 3), 40 * i, np.uint8) for i in range(6)])
        toy.write_video(tmp_path / f"{name}.webm", frames, codec="libvpx", options={"g": "3"})
    with av.open(str(tmp_path / "turned.webm"), "w") as outside:
        with av.open(str(tmp_path / "wide.webm")) as first:
            stream = outside.add_stream_from_template(first.streams.video[0])
            last = 0
            for name in ("wide", "tall"):
                with av.open(str(tmp_path / f"{name}.webm")) as inside:
                    for packet in inside.demux(video=0):
                        if packet.size:
                            packet.pts = packet.dts = last
                            packet.stream, last = stream, last + 80
                            outside.mux(packet)
    for frames in ([0], [9], [11], [2, 8], range(12)):
        clip = dataset.read_clip(tmp_path / "turned.webm", frames)
        assert clip.shape[1:3] == (48, 64)
        assert [round(v / 40) for v in clip.float().mean((1, 2, 3)).tolist()] == [
            number % 6 for number in frames
        ]
    assert dataset.probe_video(tmp_path / "turned.webm").size == (48, 64)
    # The header says 80 columns, which no frame has.
    data = (tmp_path / "wide.webm").read_bytes()
    (tmp_path / "header.webm").write_bytes(data.replace(b"\xb0\x81\x40", b"\xb0\x81\x50"))
    for frames in ([0], [4]):
        assert dataset.read_clip(tmp_path / "header.webm", frames).shape == (1, 48, 64, 3)


def rewritten(path, times, target, **more):
    """A copy with these times, in milliseconds."""
    left = iter(times)
    copy(path, target, change=lambda p: at(p, next(left)), **more)


def test_times_of_a_variable_rate(tmp_path):
    """30 frames a second for five seconds, then one a second; B-frames allowed, none used."""
    times = [round(1000 * i / 30) for i in range(150)] + [5000 + 1000 * i for i in range(20)]
    encode(
        tmp_path / "even.mkv", [i % 30 for i in range(170)], g="250", **{"x264-params": NO_B_FRAMES}
    )
    rewritten(tmp_path / "even.mkv", times, tmp_path / "vfr.mkv")
    with av.open(str(tmp_path / "vfr.mkv")) as container:
        assert container.streams.video[0].codec_context.has_b_frames
    assert dataset.frame_range(tmp_path / "vfr.mkv", 20, 30) == (165, 170)
    assert dataset.frame_range(tmp_path / "vfr.mkv", 0, 1) == (0, 30)
    assert numbers(tmp_path / "vfr.mkv") == [i % 30 for i in range(170)]


def test_two_frames_at_one_time(tmp_path):
    """Matroska's times are milliseconds: such frames keep their seconds, and both are shown."""
    encode(tmp_path / "even.mkv", range(30), bf="0")
    times = [40 * i for i in range(12)] + [40 * 11] + [40 * i for i in range(13, 30)]
    rewritten(tmp_path / "even.mkv", times, tmp_path / "double.mkv")
    assert dataset.frame_range(tmp_path / "double.mkv", 0.4, 0.8) == (10, 20)
    with dataset.open_video(tmp_path / "double.mkv") as video:
        assert video.index.order == "decoder"
    assert every_frame(tmp_path / "double.mkv") == list(range(30))


def test_times_of_joined_streams(tmp_path):
    """Where times go back, seconds go on."""
    for name, greys in (("a.ts", range(25)), ("b.ts", range(5, 30))):
        encode(tmp_path / name, greys, g="5", bf="0")
    parts = [(tmp_path / name).read_bytes() for name in ("a.ts", "b.ts")]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    assert dataset.frame_range(tmp_path / "joined.ts", 1.2, 1.6) == (30, 40)
    assert every_frame(tmp_path / "joined.ts") == [*range(25), *range(5, 30)]


def test_cropped_at_the_left(tmp_path):
    """H.264's SPS says so; libav rounds it, for speed, unless it is told not to."""
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 3, (4, 64, 64, 3))
    options = {"x264-params": "crop-rect=6,0,4,0", "crf": "1"}
    toy.write_video(tmp_path / "crop.mp4", columns, options=options)
    clip = dataset.read_clip(tmp_path / "crop.mp4", [2])
    assert clip.shape == (1, 64, 54, 3) and dataset.probe_video(tmp_path / "crop.mp4").size[1] == 54
    assert (clip[0].int() - torch.from_numpy(columns[0, :, 6:60].astype(int))).abs().max() < 4


def test_frame_numbers_of_any_kind(tmp_path):
    encode(tmp_path / "plain.mp4", range(24))
    expected = dataset.read_clip(tmp_path / "plain.mp4", [0, 4, 8])
    for kind in (torch.tensor([0, 4, 8]), np.array([0, 4, 8], np.uint8), range(0, 12, 4)):
        assert torch.equal(dataset.read_clip(tmp_path / "plain.mp4", kind), expected)
    with pytest.raises(TypeError, match="float"):
        dataset.read_clip(tmp_path / "plain.mp4", [0.0, 4.0])


def times_of_pieces(path, seconds):
    pieces = captions.segments({"video": path}, seconds)
    ends = [(piece.get("start", 0), piece.get("end")) for piece in pieces]
    for start, end in ends:  # none is empty
        dataset.frame_range(path, start, end)
    return ends


def test_pieces_of_a_recording_without_a_rate(tmp_path):
    """100 s of a screen, of which a frame is written where something has changed, cut by times."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.choice(100_000, 34, replace=False))
    times = np.sort([0, *times, *range(5000, 100_000, 10_000), 99_900]).tolist()
    encode(tmp_path / "even.webm", [i % 30 for i in range(len(times))], "libvpx")
    rewritten(tmp_path / "even.webm", times, tmp_path / "screen.webm")
    expected = [(10 * i, 10 * i + 10) for i in range(9)] + [(90, None)]
    assert times_of_pieces(tmp_path / "screen.webm", 10) == expected
    # Nothing happens for half a minute: that stretch belongs to the piece before.
    still = [time for time in times if not 40_000 <= time < 70_000]
    without(tmp_path / "even.webm", tmp_path / "few.webm", *range(len(still), len(times)))
    rewritten(tmp_path / "few.webm", still, tmp_path / "still.webm")
    pieces = times_of_pieces(tmp_path / "still.webm", 10)
    assert pieces == [*expected[:3], (30, 70), *expected[7:]]


def test_one_pass_in_decoder_order(tmp_path, monkeypatch):
    """`maps` reads a file that cannot be sought in once, not once for each piece."""
    encode(tmp_path / "old.avi", [i % 30 for i in range(90)], "mpeg4", bf="2")
    opened, plain = [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or plain(*a, **k))
    args = captions.parse_args(["maps", "m.jsonl", *"--every 1 --image-size 64 --force".split()])
    clips = {"a": {"path": tmp_path / "old.avi", "captions": ["a"]}}
    numbers, frames, size, order = captions.load_frames(args, "", clips, {}, "a")
    assert frames.shape == (90, 3, 64, 64) and len(numbers) == 90 and order == "decoder"
    assert len(opened) == 2  # to count the packets, and to decode


def test_maps_know_the_order_of_frames(world, tmp_path, monkeypatch):
    """One that does not, of a file whose frames had other numbers once, is made again."""
    monkeypatch.chdir(tmp_path)
    for name, codec in (("old.avi", "mpeg4"), ("new.mp4", "libx264")):
        encode(tmp_path / name, range(24), codec, bf="2")
        record = {"video": name, "captions": ["a circle\0"]}  # NumPy drops a zero at the end
        write_lines(tmp_path / f"{name}.jsonl", [record] * 2)
        maps = f"maps {name}.jsonl --image-size 64 --patch-size 8 --workers 0 --clip".split()
        captions.main([*maps, f"local-dir:{world / 'clip'}"])
        few = (
            f"--data {name}.jsonl --preset toy --mask tgm --epochs 1 --warmup-epochs 0 --workers 0"
        )
        few += " --batch-size 2 --stride 1 --no-resume --out run"
        train.main(few.split())
        for path in {record["map_path"] for record in dataset.read_manifest(f"{name}.jsonl")}:
            with np.load(path) as file:
                before = {key: file[key] for key in file if key != "order"}  # as it was made before
            np.savez(path, **before)
        if name == "new.mp4":  # the numbers are as they were
            train.main(few.split())
            continue
        with pytest.raises(SystemExit, match="old.*npz: .*numbered in another order; .*maps makes"):
            train.main(few.split())
        captions.main([*maps, f"local-dir:{world / 'clip'}"])
        train.main(few.split())


def test_each_bad_clip_of_a_long_video_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "long.mp4", range(24))
    parts = [{}, {"start": 5.0, "end": 6.0}, {"start": 7.0, "end": 8.0}]  # the file has one second
    write_lines(tmp_path / "d.jsonl", [{"video": "long.mp4"} | part for part in parts])
    few = "--preset toy --epochs 3 --warmup-epochs 0 --batch-size 3 --stride 1 --workers 0 --out r"
    train.main(["--data", "d.jsonl", *few.split()])
    listed = sorted(
        line.split("\t")[0] for line in Path("r/bad_videos.txt").read_text().splitlines()
    )
    assert listed == ["long.mp4, start 5.0 s, end 6.0 s", "long.mp4, start 7.0 s, end 8.0 s"]


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
    moving = np.stack([np.roll(picture, (0, 4 * i), (0, 1)) for i in range(4)])
    toy.write_video(tmp_path / "plain.mp4", moving, options={"bf": "0", "crf": "10"})
    data = bytearray((tmp_path / "plain.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer, volume
    for i, value in enumerate((a, b, 0, c, d, 0)):
        where = place + 4 * i
        data[where : where + 4] = round(value * 2**16).to_bytes(4, "big", signed=True)
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


def test_colours_of_a_tagged_file(tmp_path):
    """BT.709, as every HD video has it; taken for BT.601 these would be off by 20."""
    rgb = np.full((64, 64, 3), (200, 60, 90), np.uint8)
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = dataset.read_clip(tmp_path / "hd.mp4", [0, 3])
    assert (clip.int() - torch.from_numpy(rgb).int()).abs().max() <= 2


def test_a_side_of_one_pixel(tmp_path):
    line = np.zeros((4, 1, 64, 3), np.uint8)
    toy.write_video(tmp_path / "line.mkv", line, codec="ffv1", options={})
    with pytest.raises(dataset.VideoError, match="line.mkv: 64x1 pixels, .*too small to crop"):
        dataset.probe_video(tmp_path / "line.mkv")


# ----------------------------------------------------------------- names and annotation files


def index(root, out, *flags):
    captions.main(["index", *map(str, (*flags, root)), "--out", str(out)])
    return {r["video"]: r for r in map(json.loads, out.read_text().splitlines())}


def files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_a_manifest_in_a_linked_folder(tmp_path):
    """Its relative paths lead to the videos, from where it really is; a link keeps its name."""
    root = files(tmp_path / "videos", "wave/a.mp4")
    (root / "wave/b.mp4").symlink_to(root / "wave/a.mp4")
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "here").symlink_to(tmp_path / "far/away")
    found = index(root, tmp_path / "here/data.jsonl")
    assert len(found) == 2 and {name.rsplit("/", 1)[1] for name in found} == {"a.mp4", "b.mp4"}
    for record in dataset.read_manifest(tmp_path / "here/data.jsonl"):
        assert os.path.exists(record["path"])
    plain = index(root, tmp_path / "plain.jsonl").keys()
    assert plain == {"videos/wave/a.mp4", "videos/wave/b.mp4"}


def test_names_that_are_no_utf8(tmp_path, monkeypatch, capsys):
    """A bad one is listed, once, and the run goes on; eval.py names it, and draws a good one."""
    monkeypatch.chdir(tmp_path)
    encode("good.mp4", range(8))
    bad, odd = os.fsdecode(b"caf\xe9.mp4"), os.fsdecode(b"good-\xe9.mp4")
    try:
        open(bad, "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    os.link("good.mp4", odd)
    names = "good.mp4", bad, odd, "good.mp4"
    write_lines(tmp_path / "d.jsonl", [{"video": name, "label": name[0]} for name in names])
    few = "--preset toy --epochs 2 --warmup-epochs 0 --batch-size 2 --stride 1 --workers 0 --out r"
    train.main(["--data", "d.jsonl", *few.split()])
    listed = (tmp_path / "r/bad_videos.txt").read_bytes().splitlines()
    assert len(listed) == 1 and listed[0].startswith(b"caf\xe9.mp4\t")
    assert "2 times a video could not be read" in capsys.readouterr().out
    os.link("good.mp4", "other.mp4")
    sides = ("good.mp4", "train"), (odd, "train"), (bad, "test"), ("other.mp4", "test")
    lines = [{"video": name, "label": "a", "split": split} for name, split in sides]
    write_lines(tmp_path / "e.jsonl", lines)
    flags = "retrieve r/last.pt --data e.jsonl --views 1x1 --workers 0"
    ev.main(flags.split())
    assert "failed  caf\\udce9.mp4: " in capsys.readouterr().out
    ev.main(["show", "r/last.pt", "--video", odd, "--stride", "1"])
    assert "good-\N{REPLACEMENT CHARACTER}.mp4, frames" in capsys.readouterr().out


def test_long_names(world, tmp_path):
    """As long as the file system takes them. Maps are named by the start of the video's name."""
    long, short = "a" * 250 + ".mp4", "short.mp4"
    clip = dataset.read_manifest(world / "manifest.jsonl")[0]
    for name in (long, short):
        os.link(clip["path"], tmp_path / name)
    data = tmp_path / "d.jsonl"
    write_lines(data, [{"video": name, "captions": ["a"]} for name in (long, short)])
    flags = f"maps {data} --image-size 64 --patch-size 8 --every 8 --workers 0".split()
    flags += ["--clip", f"local-dir:{world / 'clip'}"]
    captions.main(flags)
    first, second = (json.loads(line) for line in data.read_text().splitlines())
    assert re.fullmatch("maps/../a{50}-.{14}.npz", first["maps"])
    assert re.fullmatch("maps/../short-.{14}.npz", second["maps"])
    assert (tmp_path / first["maps"]).exists() and (tmp_path / second["maps"]).exists()


def test_lists_of_three_columns(tmp_path):
    """path, number of frames, label; -1 is none. Labels of several words stay what they are."""
    root = files(tmp_path / "v", *(f"{i}.mp4" for i in range(5)))
    lines = "0.mp4 24 3", "1.mp4 0 -1", "2.mp4,17,waving", "3.mp4 riding a bike", "4.mp4 5"
    (root / "train.txt").write_text("\n".join(lines))
    found = index(root, tmp_path / "l.jsonl", "list")
    labels = [found[f"v/{i}.mp4"].get("label") for i in range(5)]
    assert labels == ["3", None, "waving", "riding a bike", "5"]
    assert found["v/0.mp4"]["class_id"] == 3 and "class_id" not in found["v/1.mp4"]


MARK = "\ufeff"  # byte order
NO_DATA = [  # what systems keep, and what holds no videos: counts for nothing
    *(f"{name}/x/a.mp4" for name in ("$RECYCLE.BIN", "#recycle", "@eaDir", "__MACOSX")),
    *(f"{name}/a.mp4" for name in ("lost+found", "~snapshot", "System Volume Information")),
    "$Recycle.Bin/a.mp4", ".Trash-1000/a.mp4", "docs/a.pdf",
]  # fmt: skip
SPLIT_OF = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "validate": "val", "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip


@pytest.mark.parametrize("found", [
    {"train/a.mp4": ("train", None), "val/b.mp4": ("val", None), "c.mp4": ("train", "c")},
    {"Train/wave/a.mp4": ("train", "wave"), "TEST/b.mp4": ("test", None)},
    {f"{word}/wave/{word}.mp4": (split, "wave") for word, split in SPLIT_OF.items()},
    {"valid/a.mp4": ("val", None)},
    {"wave/group/a.mp4": ("train", "wave"), "test/group/b.mp4": ("train", "test")},
    {"test/wave/group/take/a.mp4": ("test", "wave")},
])  # fmt: skip
def test_folders_are_splits_and_labels(tmp_path, found, capsys):
    """The first folder below ROOT, or below the split; splits only where no others are beside."""
    root = files(tmp_path / "v", *found, *NO_DATA)
    made = index(root, tmp_path / "f.jsonl")
    assert {name[2:]: (r["split"], r.get("label")) for name, r in made.items()} == found
    assert ("not taken as splits: test;" in capsys.readouterr().out) == (
        "wave/group/a.mp4" in found
    )


@pytest.mark.parametrize("dataset, count", [("folder", 7), ("k400", 5)])
def test_other_files_are_counted(tmp_path, dataset, count, capsys):
    """But for hidden ones; beside annotations not their kind either."""
    names = [f"waving/a_000001_{i:06d}.{s}" for i, s in enumerate("mts M2TS vob DivX".split())]
    root = files(tmp_path / "v", *names, "a.pdf", "b.jpg", "waving/a.rmvb", "waving/b", *NO_DATA)
    files(root, "notes.txt", "waving/a.json")
    lines = "".join(f"waving,a,1,{i},train\n" for i in range(4))
    (tmp_path / "train.csv").write_text(f"label,youtube_id,time_start,time_end,split\n{lines}")
    assert len(index(root, tmp_path / "o.jsonl", "--annotations", tmp_path, dataset)) == 4
    assert f"{count} other files were left out, such as a.pdf\n" in capsys.readouterr().out


@pytest.mark.parametrize("name, split", [
    *((f"{word}.txt", split) for word, split in SPLIT_OF.items()),
    ("testlist01.txt", "test"), ("TrainList02.CSV", "train"), ("ucf101_val_split_1.tsv", "val"),
    ("latest.txt", None), ("contest.csv", None), ("._test.txt", "no *.csv"),
    ("train_val_list.txt", "its name says train and val"), ("dev-test.csv", "dev and test"),
])  # fmt: skip
def test_names_of_lists(tmp_path, name, split, capsys):
    """A word for a split; without one it is train, and that is said; two are an error."""
    root = files(tmp_path / "v", "a.mp4", f"lists/{name}")
    (root / "lists" / name).write_text("a.mp4 1")
    flags = "--annotations", root / "lists", "list"
    if split in (None, *SPLIT_OF.values()):
        made = index(root, tmp_path / "l.jsonl", *flags)
        assert made["v/a.mp4"]["split"] == (split or "train")
        assert (f"{name}: train, since" in capsys.readouterr().out) == (split is None)
    else:
        with pytest.raises(SystemExit, match=re.escape(split)):
            index(root, tmp_path / "l.jsonl", *flags)


@pytest.mark.parametrize("line, path, label", [
    ('"b, c.mp4","riding, a bike"', "b, c.mp4", "riding, a bike"), ('"b, c.mp4" 3', "b, c.mp4", 3),
    ('a.mp4,"a ""big"" jump"', "a.mp4", 'a "big" jump'), ('"q ""r"".mp4",3', 'q "r".mp4', 3),
    ("a.mp4,10 pushups", "a.mp4", "10 pushups"), ('a.mp4 "10 pushups"', "a.mp4", "10 pushups"),
    ("my clip,riding a bike", "my clip", "riding a bike"), ("my clip\tjump", "my clip", "jump"),
    ("d.mp4 copy/e.mp4,riding a bike", "d.mp4 copy/e.mp4", "riding a bike"),
    ("b, c.mp4 riding a bike", "b, c.mp4", "riding a bike"), ("b, c.mp4,3", "b, c.mp4", 3),
    ("a.mp4 cooking, outdoors", "a.mp4", "cooking, outdoors"), ("my clip 3", "my clip", 3),
    ("a.mp4,cooking, outdoors", "a.mp4", "cooking, outdoors"), ("a.mp4 3,7", "a.mp4", "3,7"),
    ("a.mp4,24,riding a bike", "a.mp4", "riding a bike"), ("a.mp4 24 jump", "a.mp4", "jump"),
    ("a.mp4\t24\tPut x, y", "a.mp4", "Put x, y"), ("a.mp4 2 men dance", "a.mp4", "2 men dance"),
    ("a.mp4 3.0", "a.mp4", 3), ("a.mp4,24.0,3.0", "a.mp4", 3), ("a.mp4,-1.0", "a.mp4", None),
    *((line, None, "not `path label`") for line in (
        "a.mp4 0 120 3", "a.mp4,0,120,3", "a.mp4, 0, 120, 3", "a.mp4\t0\t120\tjump", "a.mp4",
        "a.mp4 0 120 riding a bike", "a.mp4 0.5 2.5 jump", "a.mp4,jump,train", "a.mp4,jump,",
        "a.mp4\tjump\ttrain", "a.mp4\tput x, y\ttrain", 'a.mp4,""', 'a.mp4 "big" jump')),
    ('a.mp4,"jump', None, "unexpected end of data"),
])  # fmt: skip
def test_lines_of_lists(tmp_path, line, path, label):
    """CSV by quotes, or by two columns; else words, as VideoMAE has them. A header is a missing
    video; columns that are none of ours are an error with file and line."""
    names = "a.mp4", "b, c.mp4", "d.mp4 copy/e.mp4", 'q "r".mp4', "my clip"
    root = files(tmp_path / "v", *names, "last.mp4")
    (root / "val.csv").write_bytes(f"{MARK}path,label\r\n{line}\r\nlast.mp4 1\r\n".encode())
    if path is None:
        with pytest.raises(SystemExit, match=f"val.csv:2: {label}"):
            index(root, tmp_path / "l.jsonl", "list")
    else:
        made = index(root, tmp_path / "l.jsonl", "list")
        assert made.keys() == {f"v/{path}", "v/last.mp4"}
        expected = {"class_id": label, "label": str(label)} if label == 3 else {"label": label}
        expected = {key: value for key, value in expected.items() if value is not None}
        assert made[f"v/{path}"] == {"video": f"v/{path}", "split": "val"} | expected


@pytest.mark.parametrize("line", [
    MARK + '{"video": "a.mp4"}',
    '{"video": "a.mp4", "split": null, "start": NaN, "end": null, "captions": null}',
])  # fmt: skip
def test_manifests_of_other_tools(tmp_path, line):
    """A byte order mark; of data frames null and NaN, which are absent."""
    (tmp_path / "m.jsonl").write_text(line + "\n", encoding="utf-8")
    (record,) = dataset.read_manifest(tmp_path / "m.jsonl", "train")
    assert record == {"video": "a.mp4", "path": str(tmp_path / "a.mp4")}


@pytest.mark.parametrize("name", ["Train", " train"])
def test_a_split_that_is_almost_the_wanted_one(tmp_path, name):
    lines = [{"video": "a.mp4", "split": "train"}, {"video": "b.mp4", "split": name}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(dataset.read_manifest(tmp_path / "m.jsonl")) == 2
    with pytest.raises(ValueError, match=f"m.jsonl:2: split '{name}' is spelled unlike 'train'"):
        dataset.read_manifest(tmp_path / "m.jsonl", "train")


def test_annotations_with_a_byte_order_mark(tmp_path):
    root = files(tmp_path / "s", "7.webm")
    entry = {"id": "7", "label": "pushing a cup", "template": "Pushing [something]"}
    contents = {"train": [entry], "validation": [], "labels": {"Pushing something": "1"}}
    for name, content in contents.items():
        (root / f"{name}.json").write_text(MARK + json.dumps(content), encoding="utf-8")
    assert index(root, tmp_path / "s.jsonl", "ssv2")["s/7.webm"]["class_id"] == 1


def test_hidden_files_and_folders(tmp_path):
    names = "wave/a.mp4", "wave/._a.mp4", ".ipynb_checkpoints/b.mp4", "wave/.thumbnails/c.mp4"
    root = files(tmp_path / ".cache" / "v", *names)  # what is above ROOT may be hidden
    assert index(root, tmp_path / "h.jsonl").keys() == {".cache/v/wave/a.mp4"}


def test_a_link_to_a_parent(tmp_path):
    """And one from a folder that was reached by a link; two links to one folder stay two."""
    root = files(tmp_path / "v", "wave/a.mp4", "jump/b.mp4")
    (root / "wave/up").symlink_to(root)
    (root / "jump/self").symlink_to(root / "jump")
    (root / "again").symlink_to(root / "wave")
    files(tmp_path / "other", "c.mp4")
    (root / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(root)
    videos = {"v/wave/a.mp4", "v/jump/b.mp4", "v/again/a.mp4", "v/other/c.mp4"}
    assert index(root, tmp_path / "p.jsonl").keys() == videos


def test_two_files_of_a_kinetics_clip(tmp_path):
    """The official replacements lie in a folder of their own: the larger file is the whole one."""
    name = "abc_000001_000011.mp4"
    root = files(tmp_path / "k", f"train/waving/{name}", f"replacement/{name}")
    (root / "replacement" / name).write_bytes(b"x" * 100)
    header = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(header + "waving,abc,1,11,train\n")
    assert index(root, tmp_path / "k.jsonl", "k400").keys() == {f"k/replacement/{name}"}


def test_a_manifest_is_a_sequence_of_its_records(tmp_path):
    """By number, slice and array, against json.loads of every line."""
    lines = [{"video": f"é{i}.mp4", "split": ("train", "test")[i % 2]} for i in range(10)]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=i % 3 > 0) for i, line in enumerate(lines))
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")  # ends without a newline
    expected = [line | {"path": str(tmp_path / line["video"])} for line in lines]
    records = dataset.read_manifest(tmp_path / "m.jsonl")
    assert list(records) == expected and len(records) == 10 and records[-1] == expected[-1]
    assert list(records[2:7:2]) == expected[2:7:2]
    assert list(records[[7, 1]]) == [expected[7], expected[1]]
    assert list(records[np.arange(10) > 7]) == expected[8:]
    assert list(dataset.read_manifest(tmp_path / "m.jsonl", "test")) == expected[1::2]
    with pytest.raises(IndexError):
        records[10]


@pytest.fixture
def many_lines(tmp_path):
    texts = [f"{i} a caption of a few words" for i in "abc"]
    lines = ({"video": f"{i}.mp4", "captions": texts} for i in range(20_000))
    return write_lines(tmp_path / "many.jsonl", lines)


def test_a_manifest_takes_little_more_than_its_file(many_lines):
    tracemalloc.start()
    records = dataset.read_manifest(many_lines)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 20_000 and peak < 1.5 * many_lines.stat().st_size


def test_loaders_share_the_manifest(many_lines):
    """A forked process that reads all records gets no copy of them, as it would of a list of
    dicts."""

    def grown(records):
        def private():
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

        def child():
            before = private()
            for record in records:
                record["captions"][0].lower()
            sender.send(private() - before)

        receiver, sender = mp.get_context("fork").Pipe(duplex=False)
        process = mp.get_context("fork").Process(target=child)
        process.start()
        process.join()
        return receiver.recv()  # kB

    records = dataset.read_manifest(many_lines)
    assert grown(records) < 2000 and grown(list(records)) > 5000
