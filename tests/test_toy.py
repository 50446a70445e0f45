"""The toy world is what it says, and on it the mask follows the words."""

import json

import numpy as np
import pytest

import captions
import tgmae
import toy


def test_the_mask_follows_the_words(world):
    """The claim itself, over 200 test clips at ratio 0.25; toy.py coverage prints this table."""
    table, aucs = toy.coverage(world)
    actor, distractor = table["text"]
    assert actor >= 0.90 and distractor <= 0.50
    assert min(aucs) >= 0.95
    actor, distractor = table["text, the distractor's words"]
    assert distractor >= 0.90 and actor <= 0.50
    actor, distractor = table["text, bottom-k"]
    assert actor <= 0.05
    assert all(abs(share - 0.25) <= 0.03 for share in table["tube"])
    assert table["motion"][0] < table["text"][0] / 2


def test_auc_by_pairs():
    import torch

    a, b = torch.rand(30), torch.rand(40) - 0.2
    pairs = (a[:, None] > b[None]).float().mean().item()
    assert toy.auc(a, b) == pytest.approx(pairs)


def test_world_is_what_it_says(world):
    train, test = (tgmae.read_manifest(world / "manifest.jsonl", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (800, 200)
    labels = {record["label"] for record in train}
    assert len(labels) == 16 and labels == {record["label"] for record in test}
    truth = toy.read_truth(world)
    assert truth.keys() == {record["video"] for record in test}
    for record in test[::20]:
        shape, direction = record["label"].split()
        info = tgmae.probe_video(record["path"])
        assert info.size == (64, 64) and info.frames >= 16
        assert len(set(record["captions"])) == 3
        assert all(shape in c and direction in c for c in record["captions"])
        assert not any(other in record["distractor_captions"][0] for other in toy.ACTORS)
        # The actor moves where the label says, and the drawn colour is where the mask is.
        actor, distractor = truth[record["video"]]
        ys, xs = (np.array([c.mean() for c in axis]) for axis in zip(*(np.nonzero(m) for m in actor)))
        moved = np.array([xs[-1] - xs[0], ys[-1] - ys[0]])
        assert moved @ np.array(toy.DIRECTIONS[direction]) > 15 and abs(moved).min() < 3
        frame = tgmae.read_clip(record["path"], [12])[0].numpy()
        colour = next(c for c in toy.COLOURS if c in record["captions"][0])
        inside = frame[actor[12]].mean(0)
        closeness = {c: inside @ rgb / np.linalg.norm(rgb) for c, rgb in toy.COLOURS.items()}
        assert max(closeness, key=closeness.get) == colour
        # What moves most is the background, by the codec's own account.
        _, motion = tgmae.read_clip(record["path"], range(1, 12), motion=True)
        fills = actor[1:12].reshape(11, 8, 8, 8, 8).mean((2, 4))
        assert motion.numpy()[fills == 0].mean() > 2 * motion.numpy()[fills > 0.9].mean()


def test_same_seed_same_clips(tmp_path):
    paths = []
    for name in ("a", "b"):
        folder = tmp_path / name / "clips"
        folder.mkdir(parents=True)
        record, stills = toy._clip_of(tmp_path / name, 3, 10, 7)
        paths.append(tmp_path / name / record["video"])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = toy.make_clip(np.random.default_rng([4, 7]), 7)[0]
    assert not np.array_equal(other, toy.make_clip(np.random.default_rng([3, 7]), 7)[0])


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "train_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.build(tmp_path / "toy", clips=16)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine: exists and is not a toy world"):
        toy.build(tmp_path / "mine")
    with pytest.raises(SystemExit):
        toy.parse_args(["--clips", "3"])


def test_a_world_is_reused(world):
    before = (world / "manifest.jsonl").stat().st_mtime_ns
    assert toy.build(world, clips=16) == world and (world / "manifest.jsonl").stat().st_mtime_ns == before


# captions.py: index and label captions.


def run_captions(*argv):
    args = captions.parse_args([str(arg) for arg in argv])
    {"index": captions.index, "caption": captions.caption}[args.command](args)


def test_index_and_label_captions(tmp_path, capsys):
    for name in (
        "train/apply_eye_makeup/a.mp4",
        "train/ApplyLipstick/b.mp4",
        "test/ApplyLipstick/c.webm",
        "test/note.txt",
    ):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked into")
    out = tmp_path / "lists" / "data.jsonl"
    run_captions("index", tmp_path / "videos", "--out", out)
    records = tgmae.read_manifest(out)
    assert [(r["split"], r["label"]) for r in records] == [
        ("test", "ApplyLipstick"),
        ("train", "ApplyLipstick"),
        ("train", "apply_eye_makeup"),
    ]
    assert records[0]["video"] == "../videos/test/ApplyLipstick/c.webm"
    assert "test: 1 found, 0 missing, 0 unreadable; 1 labels" in capsys.readouterr().out
    run_captions("caption", out, "--source", "label")
    assert [r["captions"] for r in tgmae.read_manifest(out)] == [
        ["Apply lipstick."],
        ["Apply lipstick."],
        ["Apply eye makeup."],
    ]
    lines = out.read_text().splitlines()
    out.write_text(
        lines[0].replace("Apply lipstick.", "Mine.").replace('"split"', '"unknown": 7, "split"')
        + "\n"
        + lines[1]
    )
    run_captions("caption", out, "--source", "label")  # what is there stays
    first = json.loads(out.read_text().splitlines()[0])
    assert first["captions"] == ["Mine."] and first["unknown"] == 7 and "path" not in first
    run_captions("caption", out, "--source", "label", "--force")
    assert tgmae.read_manifest(out)[0]["captions"] == ["Apply lipstick."]


def test_index_names_are_labels(footage, tmp_path):
    run_captions("index", "folder", footage / "asl", "--out", tmp_path / "asl.jsonl")
    records = tgmae.read_manifest(tmp_path / "asl.jsonl", "train")
    assert (
        len(records) == 20
        and records[0]["label"] == "again"
        and tgmae.probe_video(records[0]["path"]).frames == 77
    )


def test_bad_manifests_name_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    for line, reason in (
        ("not json", "m.jsonl:2: not JSON"), ('{"label": "x"}', 'm.jsonl:2: no "video"'), ("[1]", 'm.jsonl:2: no "video"'),
        ('{"video": "a", "captions": [""]}', "m.jsonl:2: captions"), ('{"video": "a", "captions": "x"}', "m.jsonl:2: captions"),
    ):  # fmt: skip
        path.write_text('{"video": "a.mp4"}\n' + line + "\n")
        with pytest.raises(ValueError, match=reason):
            tgmae.read_manifest(path)
    path.write_text('{"video": "a.mp4", "split": "train"}\n')
    with pytest.raises(ValueError, match="no clips of split 'test'"):
        tgmae.read_manifest(path, "test")
    with pytest.raises(ValueError, match="all 1 clips failed, the first: a.mp4\tno label"):
        run_captions("caption", path, "--source", "label")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        run_captions("index", tmp_path / "nowhere", "--out", path)
    with pytest.raises(ValueError, match="no videos"):
        run_captions("index", tmp_path, "--out", tmp_path / "new.jsonl")
