"""The toy world is what it says, the mask follows the words, and the paper's comparisons run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT

import captions
import dataset
import runs
import toy
import train


@pytest.mark.slow
def test_the_mask_follows_the_words(full_world, capsys):
    """The claim itself, over 200 test clips at ratio 0.25; docs/results.md has this table."""
    toy.main(["coverage", "--out", str(full_world)])
    said, page = capsys.readouterr().out, (ROOT / "docs/results.md").read_text()
    table, aucs = toy.coverage(full_world)
    for name, shares in table.items():
        assert f"| {name} | {shares[0]:.1%} | {shares[1]:.1%} |" in said
        row = re.search(rf"\| {name} \| ([\d.]+)% \| ([\d.]+)% \|", page)
        assert [float(share) / 100 for share in row.groups()] == pytest.approx(shares, abs=0.02)
    (actor, distractor), (other_actor, other_distractor) = list(table.values())[:2]
    assert actor >= 0.90 and distractor <= 0.50
    assert other_distractor >= 0.90 and other_actor <= 0.50  # by the distractor's words
    assert table["text, bottom-k"][0] <= 0.05 and min(aucs) >= 0.95
    assert all(abs(share - 0.25) <= 0.03 for share in table["tube"])
    assert max(table["motion"]) < 0.1


def test_auc_by_pairs():
    a, b = torch.rand(30), torch.rand(40) - 0.2
    pairs = (a[:, None] > b[None]).float().mean().item()
    assert toy.auc(a, b) == pytest.approx(pairs)


def test_world_is_what_it_says(world):
    path = world / "manifest.jsonl"
    train, test = (dataset.read_manifest(path, split) for split in ("train", "test"))
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
        first, last = (np.argwhere(mask).mean(0)[::-1] for mask in actor[[0, -1]])  # centres (x,y)
        moved = last - first
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
    (tmp_path / "clips").mkdir()
    files = []
    for seed in (3, 3, 4):
        record, _ = toy._clip_of(tmp_path, seed, clips=10, number=7)
        files.append((tmp_path / record["video"]).read_bytes())
    assert files[0] == files[1] != files[2]


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


def test_a_world_is_reused(world, capsys):
    before = (world / "manifest.jsonl").stat().st_mtime_ns
    toy.main(["--out", str(world), "--clips", "64"])
    assert "a world of 64 training clips, seed 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already; another --out"):
        toy.main(["coverage", "--out", str(world), "--clips", "16"])
    with pytest.raises(SystemExit, match="is there already; another --out"):
        toy.main(["--out", str(world), "--seed", "1"])
    toy.main(["--out", str(world)])
    assert "a world of 64 training clips, seed 0" in capsys.readouterr().out
    assert (world / "manifest.jsonl").stat().st_mtime_ns == before


def test_the_first_process_makes_the_default_world(monkeypatch):
    built, waited = [], []
    monkeypatch.setattr(toy, "build", built.append)
    monkeypatch.setattr(runs, "gather_objects", waited.append)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(runs, "rank_and_world", lambda: (rank, world))
        assert str(train.manifest_of("toy")) == "data/toy/manifest.jsonl"
    assert built == ["data/toy"] * 2 and len(waited) == 3
    assert str(train.manifest_of("x.jsonl")) == "x.jsonl"


# captions.py: label captions, and manifests with mistakes.


def caption(path, *flags):
    captions.caption(captions.parse_args(["caption", str(path), "--source", "label", *flags]))


def test_label_captions(manifest):
    path = manifest(0, extra=[{"video": "a.mp4", "label": "ApplyLipstick", "unknown": 7},
                              {"video": "b.mp4", "label": "apply_eye_makeup",
                               "captions": ["Mine."]}])  # fmt: skip
    for flags, second in ((), "Mine."), (["--force"], "Apply eye makeup."):
        caption(path, *flags)  # what is there stays, unless forced
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["captions"] for r in records] == [["Apply lipstick."], [second]]
        assert records[0]["unknown"] == 7 and "path" not in records[0]


@pytest.mark.parametrize("line, reason", [
    ("not json", "m.jsonl:2: not JSON"),
    ('{"label": "x"}', 'm.jsonl:2: no "video"'),
    ("[1]", 'm.jsonl:2: no "video"'),
    ('{"video": "a", "captions": [""]}', "m.jsonl:2: captions"),
    ('{"video": "a", "captions": "x"}', "m.jsonl:2: captions"),
    ('{"video": "a", "start": "0.5"}', "m.jsonl:2: start must be a number"),
    ('{"video": "a", "split": 1}', "m.jsonl:2: split must be a non-empty text"),
    ('{"video": "a", "split": ""}', "m.jsonl:2: split must be a non-empty text"),
    ('{"video": "a", "label": 1.5}', "m.jsonl:2: label must be a text or a whole number"),
    ('{"video": "a", "maps": 3}', "m.jsonl:2: maps"),
])  # fmt: skip
def test_bad_manifests_name_the_line(tmp_path, line, reason):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a.mp4"}\n' + line + "\n")
    with pytest.raises(ValueError, match=reason):
        dataset.read_manifest(path)


def test_manifests_without_what_is_asked_for(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a.mp4", "split": "train"}\n')
    with pytest.raises(ValueError, match="no clips of split 'test'"):
        dataset.read_manifest(path, "test")
    with pytest.raises(ValueError, match="all 1 clips failed, the first: a.mp4\tno label"):
        caption(path)
    with pytest.raises(SystemExit, match="no videos"):
        captions.main(["index", str(tmp_path), "--out", str(tmp_path / "new.jsonl")])


# The paper's comparisons.


@pytest.fixture
def small_world(world, tmp_path):
    """32 training and 16 test clips of the world, with text maps, which are of its own captions."""
    folder = tmp_path / "small"
    folder.mkdir()
    for path in world.iterdir():
        (folder / path.name).symlink_to(path)
    lines = (world / "manifest.jsonl").read_text().splitlines()
    lines = [json.loads(line) | {"maps": "a.npz"} for line in lines[:32] + lines[64:80]]
    (folder / "manifest.jsonl").unlink()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(world, folder, *words):
    """toy.py, in a process group of its own, with its runs in that folder."""
    flags = ["--out", world, "--runs", folder, "--seeds", "1", "--jobs", "2"]
    command = [sys.executable, ROOT / "toy.py", *words, *flags]
    return subprocess.Popen(
        command, cwd=folder.parent, start_new_session=True, stderr=subprocess.DEVNULL
    )


def wait_for(there, process=None, seconds=600):
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends and (process is None or process.poll() is None)
        time.sleep(0.1)


def test_the_rows_are_the_papers():
    def of(row):
        flags = ["--mask", row.mask, *toy.LOSSES[row.loss].split(), *row.flags.split()]
        args = train.parse_args(flags)
        return args.mask, args.mae, args.vt

    assert [of(row) for row in list(toy.TABLE2.values())[1:]] == [
        ("tube", True, False), ("tube", False, True), ("tube", True, True),
        ("mgm", True, False), ("mgm", False, True), ("mgm", True, True),
        ("tgm", True, False), ("tgm", True, True),
    ]  # fmt: skip
    rows = [row for rows in toy.COMPARISONS.values() for row in rows.values()]
    # Shared ones run once.
    assert len({row.name for row in rows}) == len(set(rows)) == 9 + 4 + 1 + 1 + 5 + 3


@pytest.mark.parametrize("words", ["ablate", "table2 ratio", "--clips 3", "table2 --seeds 0"])
def test_refused(words):
    with pytest.raises(SystemExit):
        toy.parse_args(words.split())


@pytest.mark.parametrize("source, expected", [
    ("frames", ["a red cross moving up", "the red cross goes up", "a cross in red drifts up"]),
    ("label", ["cross up"]),
    ("llm", ["a cross moving up", "the cross goes up", "a cross drifts up"]),
    ("frames-llm", ["a red cross moving up", "the red cross goes up", "a cross in red drifts up",
                    "a cross moving up", "the cross goes up", "a cross drifts up"]),
    ("stills", ["a red cross", "the red cross", "a cross in red"]),
])  # fmt: skip
def test_worlds_of_other_captions(small_world, tmp_path, source, expected):
    toy.make_world(small_world, tmp_path / "runs", source)
    path = tmp_path / "runs/worlds" / source / "data/toy/manifest.jsonl"
    made = dataset.read_manifest(path, "train")
    assert len(made) == 32 and not any("maps" in record for record in made)
    assert os.path.exists(made[0]["path"])
    (record, *_) = dataset.read_manifest(small_world / "manifest.jsonl", "train")
    assert made[0]["captions"] == toy.captions_from(source, record)
    words = {"shape": "cross", "colour": "red", "direction": "up"}
    record = {"label": "cross up", "captions": toy.captions_of(words)}
    assert toy.captions_from(source, record) == expected


WORKS = """
import json, pathlib, sys
words = sys.argv
with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
    print(words[1] if "--json" in words else "train", file=file)
if "--json" in words:
    result = {"rows": [{"top-1": 0.5, "R@1": 0.25}]}
    pathlib.Path(words[words.index("--json") + 1]).write_text(json.dumps(result))
else:
    (pathlib.Path(words[-1]) / "log.jsonl").write_text('{"epoch": 0, "vt": 1.5}')
"""


def test_what_has_its_json_is_done(world, tmp_path, monkeypatch, capsys):
    for script in ("train.py", "eval.py"):
        (tmp_path / script).write_text(WORKS)
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    runs, stages = tmp_path / "runs", sorted(["train", *toy.COLUMNS])

    def calls(words):
        (tmp_path / "calls").write_text("")
        toy.main([*words.split(), "--seeds", "1", "--out", str(world), "--runs", str(runs)])
        return sorted((tmp_path / "calls").read_text().split())

    assert calls("ablate num-captions") == sorted(2 * stages)
    assert "are reused" not in capsys.readouterr().err
    assert calls("ablate num-captions") == []
    assert "2 runs in" in capsys.readouterr().err
    (runs / "clips64-seed0-epochs0/tgm-mae-vt-frames-seed0/finetune.json").unlink()
    assert calls("ablate num-captions") == ["finetune"]
    assert calls("ablate bottom-k") == sorted(2 * stages)  # a row is there already
    assert calls("ablate num-captions --epochs 2") == sorted(2 * stages)
    (line, _) = (runs / "num-captions.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "row": "3 captions", "seed": 0, "linear": 0.5, "finetune": 0.5, "retrieve": 0.25,
        "vt": [1.5],
    }  # fmt: skip


FAILS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1])
def save(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "began").touch()
if "0.3" not in sys.argv:
    time.sleep(60)
while not any(folder.parent.glob("*0.45*/began")):
    time.sleep(0.01)
print("a word before", flush=True)
sys.exit("train.py: no luck")
"""


def test_a_failing_row_is_told_and_stops_the_others(world, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(FAILS)
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    flags = f"ablate ratio --seeds 1 --jobs 2 --out {world} --runs {tmp_path}/runs"
    reason = "0.3-frames-seed0/train.log: train.py ended with exit code 1: train.py: no luck$"
    with pytest.raises(SystemExit, match=reason):
        toy.main(flags.split())
    assert [path.parent.name for path in tmp_path.glob("runs/*/*/saved")] == [
        "tgm-mae-vt-mask-ratio-0.45-frames-seed0"
    ]
    assert len(list(tmp_path.glob("runs/*/*/began"))) == 2  # the others are given up


@pytest.mark.slow
def test_ablation_goes_on(small_world, tmp_path, capsys):
    """After table2, which is killed and goes on; an ablation takes over the rows that it shares."""
    runs, few = tmp_path / "runs", ("--epochs", "1")
    folder = runs / "clips64-seed0-epochs1"

    def evaluated():
        return {path: path.stat().st_mtime_ns for path in folder.glob("*/[!a]*.json")}

    process = start(small_world, runs, "table2", *few)
    wait_for(evaluated, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = evaluated()
    flags = ["--out", str(small_world), "--runs", str(runs), "--seeds", "1", "--jobs", "2", *few]
    for name, words in (("table2", ["table2"]), ("num-captions", ["ablate", "num-captions"])):
        toy.main([*words, *flags])
        head, _, *rows, _, how = capsys.readouterr().out.splitlines()
        assert how.startswith("`python toy.py ")
        assert head == "| pre-training | linear probe | fine-tuned | retrieval R@1 | seeds |"
        log = [json.loads(line) for line in (runs / f"{name}.jsonl").read_text().splitlines()]
        for title, line, row in zip(toy.COMPARISONS[name], log, rows, strict=True):
            shares = [line[column] for column in toy.COLUMNS]
            cells = [f"{100 * share:.1f}" for share in shares]
            assert row == f"| {title} | {' | '.join(cells)} | 1 |" and len(line["vt"]) == 1
            assert line["row"] == title and all(0 <= share <= 1 for share in shares)
        assert before.items() <= evaluated().items()
        before = evaluated()
    assert len(before) == 3 * (9 + 1)
    args = json.loads((folder / "tgm-mae-vt-num-captions-1-frames-seed0/args.json").read_text())
    assert (args["num_captions"], args["epochs"], args["mask"], args["vt"]) == (1, 1, "tgm", True)


def test_tables_and_plots(world, tmp_path):
    """Of made results: means and deviations, what is missing, and plots whose words are words."""
    rng, made = np.random.default_rng(0), {}
    for name in ("figure4", "table2"):
        for title in toy.COMPARISONS[name]:
            for seed in range(2 if title == "mgm, VT" else 3):  # one is not there yet
                shares = {column: round(float(rng.random()), 3) for column in toy.COLUMNS}
                made[name, title, seed] = shares | {"vt": rng.random(3).tolist()}
        args = toy.parse_args([name, "--report", str(tmp_path / "docs")])
        found = {key[1:]: value for key, value in reversed(made.items()) if key[0] == name}
        *lines, _, how = toy.report(args, name, found)
        assert how.startswith("`python toy.py ") and torch.__version__ in how
        for title, row in zip(toy.COMPARISONS[name], lines[2:], strict=True):
            runs = [value for key, value in made.items() if key[:2] == (name, title)]
            if name == "table2":
                columns, digits = [[100 * run[c] for run in runs] for c in toy.COLUMNS], 1
            else:
                columns, digits = [[run["vt"][i] for run in runs] for i in (0, -1)], 2
            cells = [f"{np.mean(c):.{digits}f} ± {np.std(c, ddof=1):.{digits}f}" for c in columns]
            assert row == f"| {title} | {' | '.join(cells)} | {len(runs)} |"
        log = (tmp_path / "docs" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in log] == [
            {"row": title, "seed": seed, **value}
            for (of, title, seed), value in made.items()
            if of == name
        ]
        plot = xml.etree.ElementTree.parse(tmp_path / "docs" / f"{name}.svg")
        words = "".join(plot.getroot().itertext())
        assert all(title in words for title in toy.COMPARISONS[name])


@pytest.mark.slow
def test_stopping_stops_what_runs(small_world, tmp_path):
    process = start(small_world, tmp_path / "runs", "figure4", "--epochs", "500")
    folder = tmp_path / "runs/clips64-seed0-epochs500/tube-mae-frames-seed0"
    log = folder / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, process)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (folder / "last.pt").exists()

    def gone():  # loaders end with their run
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True

    wait_for(gone)
