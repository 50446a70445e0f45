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

import captions
import dataset
import eval as ev
import toy
import train


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
    flags = "retrieve r/last.pt --data d.jsonl --test-split train --views 1x1 --workers 0"
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
