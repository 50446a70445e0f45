"""The toy world is what it says, and on it the mask follows the words."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import pytest
from conftest import ROOT

import captions
import dataset
import toy
import train


@pytest.mark.slow
def test_the_mask_follows_the_words(full_world, capsys):
    """The claim itself, over 200 test clips at ratio 0.25; the README has this table."""
    toy.main(["coverage", "--out", str(full_world)])
    said, readme = capsys.readouterr().out, (ROOT / "README.md").read_text()
    table, aucs = toy.coverage(full_world)
    for name, shares in table.items():
        assert f"| {name} | {shares[0]:.1%} | {shares[1]:.1%} |" in said
        row = re.search(rf"\| {name} \| ([\d.]+)% \| ([\d.]+)% \|", readme)
        assert [float(share) / 100 for share in row.groups()] == pytest.approx(shares, abs=0.02)
    actor, distractor = table["text"]
    assert actor >= 0.90 and distractor <= 0.50
    assert min(aucs) >= 0.95
    actor, distractor = table["text, the distractor's words"]
    assert distractor >= 0.90 and actor <= 0.50
    actor, distractor = table["text, bottom-k"]
    assert actor <= 0.05
    assert all(abs(share - 0.25) <= 0.03 for share in table["tube"])
    assert max(table["motion"]) < 0.1


def test_auc_by_pairs():
    import torch

    a, b = torch.rand(30), torch.rand(40) - 0.2
    pairs = (a[:, None] > b[None]).float().mean().item()
    assert toy.auc(a, b) == pytest.approx(pairs)


def test_world_is_what_it_says(world):
    train, test = (
        dataset.read_manifest(world / "manifest.jsonl", split) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (64, 16)
    labels = {record["label"] for record in train}
    assert len(labels) == 16 and labels == {record["label"] for record in test}
    truth = toy.read_truth(world)
    assert truth.keys() == {record["video"] for record in test}
    for record in test[::3]:
        shape, direction = record["label"].split()
        info = dataset.probe_video(record["path"])
        assert info.size == (64, 64) and info.frames >= 16
        assert len(set(record["captions"])) == 3
        assert all(shape in c and direction in c for c in record["captions"])
        assert not any(other in record["distractor_captions"][0] for other in toy.ACTORS)
        # The actor moves where the label says, and the drawn colour is where the mask is.
        actor, distractor = truth[record["video"]]
        ys, xs = (
            np.array([c.mean() for c in axis]) for axis in zip(*(np.nonzero(m) for m in actor))
        )
        moved = np.array([xs[-1] - xs[0], ys[-1] - ys[0]])
        assert moved @ np.array(toy.DIRECTIONS[direction]) > 15 and abs(moved).min() < 3
        frame = dataset.read_clip(record["path"], [12])[0].numpy()
        colour = next(c for c in toy.COLOURS if c in record["captions"][0])
        inside = frame[actor[12]].mean(0)
        closeness = {c: inside @ rgb / np.linalg.norm(rgb) for c, rgb in toy.COLOURS.items()}
        assert max(closeness, key=closeness.get) == colour
        # What moves most is the background, by the codec's own account.
        _, motion = dataset.read_clip(record["path"], range(1, 12), motion=True)
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


def test_a_world_is_reused(world, capsys):
    before = (world / "manifest.jsonl").stat().st_mtime_ns
    toy.main(["--out", str(world), "--clips", "64"])
    assert "a world of 64 training clips, seed 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already; another --out"):
        toy.main(["--out", str(world), "--clips", "16"])
    assert (world / "manifest.jsonl").stat().st_mtime_ns == before


def test_the_first_process_makes_the_default_world(monkeypatch):
    built, waited = [], []
    monkeypatch.setattr(toy, "build", built.append)
    monkeypatch.setattr(train, "gather_objects", lambda mine: waited.append(mine))
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, world))
        assert str(train.manifest_of("toy")) == "data/toy/manifest.jsonl"
    assert (
        built == ["data/toy"] * 2
        and len(waited) == 3
        and str(train.manifest_of("x.jsonl")) == "x.jsonl"
    )


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
    records = dataset.read_manifest(out)
    assert [(r["split"], r["label"]) for r in records] == [
        ("test", "ApplyLipstick"),
        ("train", "ApplyLipstick"),
        ("train", "apply_eye_makeup"),
    ]
    assert records[0]["video"] == "../videos/test/ApplyLipstick/c.webm"
    assert "test: 1 found, 0 missing, 0 unreadable; 1 labels" in capsys.readouterr().out
    run_captions("caption", out, "--source", "label")
    assert [r["captions"] for r in dataset.read_manifest(out)] == [
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
    assert dataset.read_manifest(out)[0]["captions"] == ["Apply lipstick."]


def test_index_names_are_labels(footage, tmp_path):
    run_captions("index", "folder", footage / "asl", "--out", tmp_path / "asl.jsonl")
    records = dataset.read_manifest(tmp_path / "asl.jsonl", "train")
    assert (
        len(records) == 20
        and records[0]["label"] == "again"
        and dataset.probe_video(records[0]["path"]).frames == 77
    )


def test_bad_manifests_name_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    for line, reason in (
        ("not json", "m.jsonl:2: not JSON"), ('{"label": "x"}', 'm.jsonl:2: no "video"'),
        ("[1]", 'm.jsonl:2: no "video"'),
        ('{"video": "a", "captions": [""]}', "m.jsonl:2: captions"),
        ('{"video": "a", "captions": "x"}', "m.jsonl:2: captions"),
        ('{"video": "a", "start": "0.5"}', "m.jsonl:2: start must be a number"),
        ('{"video": "a", "split": 1}', "m.jsonl:2: split must be a text"),
        ('{"video": "a", "label": 1.5}', "m.jsonl:2: label must be a text or a whole number"),
        ('{"video": "a", "maps": 3}', "m.jsonl:2: maps"),
    ):  # fmt: skip
        path.write_text('{"video": "a.mp4"}\n' + line + "\n")
        with pytest.raises(ValueError, match=reason):
            dataset.read_manifest(path)
    path.write_text('{"video": "a.mp4", "split": "train"}\n')
    with pytest.raises(ValueError, match="no clips of split 'test'"):
        dataset.read_manifest(path, "test")
    with pytest.raises(ValueError, match="all 1 clips failed, the first: a.mp4\tno label"):
        run_captions("caption", path, "--source", "label")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        run_captions("index", tmp_path / "nowhere", "--out", path)
    with pytest.raises(ValueError, match="no videos"):
        run_captions("index", tmp_path, "--out", tmp_path / "new.jsonl")


# The paper's comparisons.


def small_world(world, folder):
    """32 training and 16 test clips of the world."""
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("clips", "clip"))
    for name in ("clips", "clip"):
        (folder / name).symlink_to(world / name)
    lines = (world / "manifest.jsonl").read_text().splitlines()
    (folder / "manifest.jsonl").write_text("\n".join(lines[:32] + lines[64:80]) + "\n")
    return folder


def test_the_rows_are_the_papers():
    of = {}
    for title, row in toy.TABLE2.items():
        args = train.parse_args(["--mask", row.mask, *toy.LOSSES[row.loss], *map(str, row.flags)])
        of[title] = args.mask, args.mae, args.vt
    assert list(of.values())[1:] == [
        ("tube", True, False),
        ("tube", False, True),
        ("tube", True, True),
        ("mgm", True, False),
        ("mgm", False, True),
        ("mgm", True, True),
        ("tgm", True, False),
        ("tgm", True, True),
    ]
    rows = [
        row for rows in (toy.TABLE2, toy.FIGURE4, *toy.ABLATIONS.values()) for row in rows.values()
    ]
    assert (
        len({row.name for row in rows}) == len(set(rows)) == 9 + 4 + 1 + 1 + 5
    )  # shared ones run once
    with pytest.raises(SystemExit):
        toy.parse_args(["ablate"])
    with pytest.raises(SystemExit):
        toy.parse_args(["table2", "ratio"])


def test_captions_of_the_class():
    record = {"label": "cross up", "captions": ["a red cross moving up"]}
    of_class = ["a cross moving up", "the cross goes up", "a cross drifts up"]
    assert toy.CAPTION_SOURCES["llm"](record) == of_class
    assert toy.CAPTION_SOURCES["frames-llm"](record) == ["a red cross moving up", *of_class]
    words = {"shape": "cross", "colour": "red", "direction": "up"}
    stills = ["a red cross", "the red cross", "a cross in red"]
    assert toy.CAPTION_SOURCES["stills"]({"captions": toy.captions_of(words)}) == stills


def test_worlds_of_other_captions_have_no_maps(world, tmp_path):
    """Those that the user made are of the world's own captions."""
    small = small_world(world, tmp_path / "small")
    lines = [
        json.loads(line) | {"maps": "a.npz"}
        for line in (small / "manifest.jsonl").read_text().splitlines()
    ]
    (small / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = toy.parse_args(["table2", "--out", str(small), "--runs", str(tmp_path / "runs")])
    toy.Experiments(args).make_world("stills")
    made = dataset.read_manifest(tmp_path / "runs/worlds/stills/data/toy/manifest.jsonl", "train")
    assert len(made) == 32 and not any("maps" in record for record in made)
    assert made[0]["captions"] == [caption.rsplit(" ", 2)[0] for caption in lines[0]["captions"]]
    assert os.path.exists(made[0]["path"])


@pytest.mark.slow
def test_ablation_goes_on(world, tmp_path, monkeypatch, capsys):
    small = small_world(world, tmp_path / "small")
    flags = [
        "ablate", "num-captions", "--out", small, "--runs", tmp_path / "runs", "--seeds", 1,
        "--epochs", 1,
        "--jobs", 2,
    ]  # fmt: skip
    flags = list(map(str, flags))
    toy.main(flags)
    table = capsys.readouterr().out.split("\n")
    assert table[0] == "| num-captions | linear probe | fine-tuned | retrieval R@1 | seeds |"
    log = [
        json.loads(line) for line in (tmp_path / "runs/num-captions.jsonl").read_text().splitlines()
    ]
    assert [line["row"] for line in log] == ["3 captions", "1 caption"]
    for line, words in zip(log, table[2:]):
        assert (
            0 <= line["linear"] <= 1
            and words.endswith("| 1 |")
            and f"| {100 * line['linear']:.1f} |" in words
        )
    for folder, captions_ in (
        ("tgm-mae-vt-frames-seed0", 0),
        ("tgm-mae-vt-num-captions-1-frames-seed0", 1),
    ):
        folder = tmp_path / "runs" / folder
        args = json.loads((folder / "args.json").read_text())
        assert (
            args["num_captions"] == captions_
            and args["epochs"] == 1
            and args["vt"]
            and args["mask"] == "tgm"
        )
    lines = (folder / "stages.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == list(toy.STAGES)
    (folder / "stages.jsonl").write_text(
        "\n".join(lines[:-1]) + "\n"
    )  # as if stopped before its end
    called = []
    call = toy.Experiments.call
    monkeypatch.setattr(
        toy.Experiments, "call", lambda self, c, *a: called.append(c[1]) or call(self, c, *a)
    )
    toy.main(flags)
    first, *again = capsys.readouterr().out.split("\n")
    assert (
        called == ["finetune"]
        and again == table
        and first.startswith("7 of 8 stages are there already")
    )
    with pytest.raises(SystemExit, match="of another world or --epochs"):
        toy.main([*flags, "--epochs", "2"])
    (folder / "stages.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (folder / "last.pt").write_bytes(b"")
    with pytest.raises(
        SystemExit, match=r"finetune.log: eval.py ended with exit code 1: eval.py: .*last.pt"
    ):
        toy.main(flags)


def test_tables_and_plots(world, tmp_path, capsys):
    """Of made results: means and deviations, what is missing, and plots whose words are words."""
    flags = [
        "--out",
        world,
        "--runs",
        tmp_path / "runs",
        "--report",
        tmp_path / "docs",
        "--seeds",
        3,
    ]
    args_of = list(map(str, flags))
    args = toy.parse_args(args_of)
    experiments, rng, made = toy.Experiments(args), np.random.default_rng(0), {}
    for title, row in toy.TABLE2.items():
        for seed in range(2 if title == "mgm, VT" else 3):
            folder = experiments.folder(row, seed)
            folder.mkdir(parents=True)
            stages = [
                {"stage": stage, "seconds": 1, "of": experiments.settings} for stage in toy.STAGES
            ]
            (folder / "stages.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in stages)
            )
            vt = [
                {"step": i, "epoch": i // 4, "vt": float(v)} for i, v in enumerate(rng.random(12))
            ]
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in vt))
            for name, key in (("linear", "top-1"), ("finetune", "top-1"), ("retrieve", "R@1")):
                made[title, seed, name] = round(float(rng.random()), 3)
                rows = [{key: made[title, seed, name]}, {key: 0.0625}]
                (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))
            made[title, seed, "vt"] = [line["vt"] for line in vt]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.Experiments, "go", lambda *_: None)  # nothing is left to run
        toy.main([*args_of, "table2"])
        toy.main([*args_of, "figure4"])
    said = capsys.readouterr().out.split("\n")
    for title in toy.TABLE2:
        seeds = range(2 if title == "mgm, VT" else 3)
        cells = [
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
            for values in (
                [made[title, seed, name] for seed in seeds]
                for name in ("linear", "finetune", "retrieve")
            )
        ]
        assert f"| {title} | {' | '.join(cells)} | {len(seeds)} |" in said
    ends = [
        [statistics.fmean(made["tgm, MAE", seed, "vt"][part]) for seed in range(3)]
        for part in (slice(4), slice(8, 12))
    ]
    cells = [f"{np.mean(end):.2f} ± {np.std(end, ddof=1):.2f}" for end in ends]
    assert f"| tgm, watched | {' | '.join(cells)} | 3 |" in said
    for name in ("table2", "figure4"):
        text = "".join(
            xml.etree.ElementTree.parse(tmp_path / "docs" / f"{name}.svg").getroot().itertext()
        )
        assert all(title in text for title in (toy.TABLE2 if name == "table2" else toy.FIGURE4))
    assert len((tmp_path / "docs/table2.jsonl").read_text().splitlines()) == 26
    assert "table2" in (tmp_path / "docs/table2.md").read_text()


@pytest.mark.slow
def test_stopping_stops_what_runs(world, tmp_path):
    small = small_world(world, tmp_path / "small")
    command = [sys.executable, ROOT / "toy.py", "figure4", "--out", small, "--runs",
               tmp_path / "runs", "--seeds", "1",
               "--epochs", "500"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    log, ends = tmp_path / "runs/tube-mae-frames-seed0/log.jsonl", time.monotonic() + 100
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (log.parent / "last.pt").exists() and not (log.parent / "stages.jsonl").exists()
    while True:  # loaders end with their run
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < ends
        time.sleep(0.1)
