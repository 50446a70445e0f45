"""The flags of every command of README and docs/ parse; every snippet runs."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from unittest.mock import MagicMock

import bench
import pytest
import transformers
from conftest import ROOT, needs_transformers
from test_captions import blip2  # noqa: F401, a fixture
from test_faults import free_port
from test_tgmae import hf_config
from torchvision.models import optical_flow

import captions
import dataset
import eval as evaluation
import tgmae
import toy
import train
import weights

README, load_clip = (ROOT / "README.md").read_text(), tgmae.load_clip
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "exercises"]
ALL = "\n".join(
    [README, *(page.read_text() for page in PAGES)]
)  # exercises have a test of their own
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", ALL, re.S | re.M)
BLOCKS = [text for language, text in dict.fromkeys(FENCED) if not language]
SNIPPETS = [text for language, text in FENCED if language == "python"]
LINKS = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
DIFFS = [text for language, text in FENCED if language == "diff"]
COMMANDS = [c.strip() for block in BLOCKS for line in block.splitlines() for c in line.split("&&")]
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", ALL)
for script in (train, toy, captions, evaluation):  # their headers
    COMMANDS += re.findall(r"^    ((?:python|torchrun) [^#\n]*)", script.__doc__, re.M)
COMMANDS = sorted({" ".join(command.split()) for command in COMMANDS})


def test_links_lead_to_their_functions():
    for name, file in LINKS:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), name
    assert len(LINKS) >= 9
    for path in re.findall(r"\((docs/[\w.-]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch):
    monkeypatch.setattr(weights, "flags_of", lambda _: {"data": "toy"})
    words = shlex.split(command)
    if words[0] in ("#SBATCH", "srun") or "=$(" in words[0]:
        words = words[1:] if words[0] == "srun" else []
    if not words or "random" in words:  # which there is once the README's own diff is applied
        return
    if words[0] == "pip":
        assert (
            words == ["pip", "install", "-r", "requirements.txt"]
            and (ROOT / "requirements.txt").exists()
        )
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / "tests").is_dir()
    else:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        modules = {"train.py": train, "toy.py": toy, "captions.py": captions, "eval.py": evaluation}
        modules["tests/bench.py"] = bench
        if words[script] == "tests/soak.py":
            assert words[script + 1 :: 2] == ["--minutes"]
            return
        parse = modules[words[script]].parse_args
        if "--help" in words:
            with pytest.raises(SystemExit) as stop:
                parse(["--help"])
            assert stop.value.code == 0
        else:
            parse(words[script + 1 :])


RUN_HERE = [block for block in BLOCKS if re.search("k400.jsonl|videomae-base", block)]


@needs_transformers
@pytest.mark.slow
def test_commands_run(world, workdir, blip2):  # noqa: F811
    """The commands for datasets, many processes, nodes, Slurm and published weights, by a shell:
    with two processes for eight and one node for four, small models for those of the hub, a Slurm
    that runs what it is given."""
    from transformers import VideoMAEForPreTraining

    VideoMAEForPreTraining(hf_config(tgmae.PRESETS["toy"])).save_pretrained("videomae")
    for folder in ("bin", "VIDEOS", "CSVS"):
        os.mkdir(folder)
    for split in ("train", "val"):
        records = dataset.read_manifest(world / "manifest.jsonl", split.replace("val", "test"))[:4]
        rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for number, record in enumerate(records):
            rows.append(
                f"{record['label']},{split}{number},0,2,{split.replace('val', 'validate')},0"
            )
            os.symlink(record["path"], f"VIDEOS/{split}{number}_000000_000002.mp4")
        (workdir / "CSVS" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    python = f"exec {shlex.quote(sys.executable)}"
    for name, does in {
        "python": f'{python} "$@"', "torchrun": f'{python} -m torch.distributed.run "$@"',
        "srun": 'exec "$@"', "scontrol": "echo 127.0.0.1",
    }.items():  # fmt: skip
        path = workdir / "bin" / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    for script in ("captions.py", "train.py", "eval.py"):
        os.symlink(ROOT / script, script)
    few = "--epochs 1 --warmup-epochs 0 --batch-size 2 --workers 1"
    smaller = {
        "--nproc_per_node 8": "--nproc_per_node 2", "--nnodes 4": "--nnodes 1",
        "HOST:29500": f"127.0.0.1:{free_port()}",
        "$127.0.0.1": "127.0.0.1", "MCG-NJU/videomae-base": "videomae",
        "--source blip2": f"--source blip2 --model {blip2}",
        "maps k400.jsonl": "maps k400.jsonl --clip local-dir:data/toy/clip --image-size 64 "
        "--patch-size 8 --every 4",
        "--batch-size 16": "", "train.py": f"train.py --preset toy {few} --no-resume",
        "eval.py finetune": f"eval.py finetune {few} --views 1x1",
    }  # fmt: skip
    env = os.environ | {
        "PATH": f"{workdir / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-4]",
    }
    for block in RUN_HERE:
        for here, there in smaller.items():
            block = block.replace(here, there)
        done = subprocess.run(
            ["sh", "-ec", block], env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if "index" in block:  # what the other blocks begin with
            shutil.copy("k400.jsonl", "ssv2.jsonl")
            shutil.copytree("runs/k400-tgm-vt", "runs/toy-tgm-vt")
    record = json.loads((workdir / "k400.jsonl").read_text().splitlines()[0])
    assert len(record["captions"]) == 3 and (workdir / record["maps"]).exists()


@pytest.mark.parametrize("name", ["table2", "figure4", *toy.ABLATIONS])
def test_tables_are_those_of_the_logs(name):
    """docs/NAME.jsonl -> figures and plot in docs/results.md."""
    docs, results = ROOT / "docs", (ROOT / "docs/results.md").read_text()
    log = [json.loads(line) for line in (docs / f"{name}.jsonl").read_text().splitlines()]
    table = (toy.curve_table if name == "figure4" else toy.share_table)(log)
    rows = {"table2": toy.TABLE2, "figure4": toy.FIGURE4} | toy.ABLATIONS
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {title}" for title in rows[name]]
    assert f"]({name}.svg)" in results
    for line in table[2:]:
        assert line.rsplit(" ", 2)[0] in results, line  # all but the number of seeds


@pytest.mark.parametrize("snippet", range(len(SNIPPETS)))
def test_snippet_runs(snippet, trained, workdir, monkeypatch):
    """With the toy CLIP for the one that would be downloaded, a shallow VideoMAE, a small world."""
    monkeypatch.setattr(tgmae, "load_clip", functools.partial(load_clip, "local-dir:data/toy/clip"))
    shallow = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    shallow = functools.partial(transformers.VideoMAEConfig, **shallow)
    monkeypatch.setattr(transformers, "VideoMAEConfig", shallow)
    monkeypatch.setattr(
        optical_flow, "raft_small", functools.partial(optical_flow.raft_small, None)
    )
    os.makedirs("runs/toy-tgm-vt")
    os.symlink(trained, "runs/toy-tgm-vt/last.pt")
    os.symlink(trained.with_name("log.jsonl"), "runs/toy-tgm-vt/log.jsonl")
    board = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    text, found = SNIPPETS[snippet].replace("test-00805", "test-00069"), {}
    if "features.npz" in text:
        evaluation.main("features runs/toy-tgm-vt/last.pt --workers 0".split())
        shutil.copy("data/toy/manifest.jsonl", "windows.jsonl")
    exec(compile(text, "README.md", "exec"), found)
    if "loss" in found:
        found["loss"].backward()
        assert found["mask"].float().mean() == pytest.approx(0.597, abs=1e-3)
        encoder = found["model"].videomae.encoder.parameters()
        assert all(p.grad.isfinite().all() for p in encoder)
    if "head" in found:
        assert all(p.grad.any() for p in found["head"].parameters())
        assert found["seen"]["latent"].shape == (2, 8 * 79, 768)  # 117 of 196 are masked
        assert found["model"].videomae.layernorm is not None
    if "random_scores" in found:  # not the same number in each slice
        assert found["mask"].float().mean() == pytest.approx(0.9, abs=1e-3)
        assert len(set(found["mask"].view(2, 8, 196).sum(-1).flatten().tolist())) > 3
        top = tgmae.topk_mask(found["scores"], 0.6)
        agree = (top == found["sampled"]).float().mean()
        assert 0.7 < agree < 0.99  # chance is 0.52
    if "flow_scores" in found:
        assert found["mask"].float().mean() == pytest.approx(0.75)
    if "predicted" in found:
        assert found["predicted"].shape == (16,) and len(found["classes"]) == 16
    if "writer" in found:
        written = board.SummaryWriter().__enter__().add_scalar.call_args_list
        assert {call.args[0] for call in written} >= {"mae", "vt", "lr"} and len(written) > 20
    if "rows" in found:
        assert len(found["rows"]) == 80
    elif "features" in found:
        assert found["features"].shape == (1, 128)


def test_a_masker_of_ones_own_trains(workdir, manifest):
    """The README's functions, lines and diffs, in copies of the scripts; what it says in words of
    the masker that uses text."""
    for name in "tgmae dataset weights runs pictures toy train eval".split():
        shutil.copy(ROOT / f"{name}.py", f"{name}.py")
    shutil.copy(ROOT / "pictures.html", "pictures.html")
    (snippet,) = [text for text in SNIPPETS if "random_scores" in text]
    own = (
        "".join(re.findall(r"def \w+_scores.*?\n\n\n", snippet, re.S))
        + """
def block_scores(batch, grid, ratio, *, generator=None):
    assert 0 < ratio < 1
    return torch.rand(batch, *grid, generator=generator)


MASK_RATIOS |= {"blocks": 0.8, "still": 0.75, "sampled": 0.6}
"""
    )
    own += re.search(r"`(MASK_RATIOS\[.*?)`", README).group(1)
    changes = [("tgmae.py", "def tube_scores", f"{own}\n\n\ndef tube_scores")]
    for part in re.split("^--- ", "".join(DIFFS), flags=re.M)[1:]:
        name, *lines = part.splitlines()
        texts = ["".join(f"{x[1:]}\n" for x in lines if x[0] != sign) for sign in "+-"]
        changes.append((name.split(",")[0], *texts))
    of_text = 'elif args.mask == "tgm"', 'elif args.mask in ("tgm", "sampled")'
    changes.append(("train.py", *of_text))
    changes.append(("train.py", 'args.mask == "tgm" or', 'args.mask in ("tgm", "sampled") or'))
    sampled = "tgmae.sampled_scores(scores, generator=generator)"
    from_map = "            masks.append("
    also = f"            scores = {sampled} if args.mask == 'sampled' else scores\n{from_map}"
    changes.append(("train.py", from_map, also))
    for file, old, new in changes:
        text = (workdir / file).read_text()
        assert text.count(old) == 1, old
        (workdir / file).write_text(text.replace(old, new))

    def call(command):
        words = [sys.executable, *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    few = "--epochs 1 --warmup-epochs 0 --batch-size 16 --workers 1"
    assert "random, highest" in call(f"train.py --mask random --vt {few} --out run")
    assert len((workdir / "run/log.jsonl").read_text().splitlines()) == 4
    call("eval.py show run/last.pt --html")
    page = re.search(
        r'id="data"[^>]*>(.*?)</script>', (workdir / "run/show.html").read_text(), re.S
    )
    data = json.loads(page[1])
    assert data["mask"] in data["scores"]  # else the page could not begin
    shown = call("eval.py show run/last.pt --mask blocks --mask-ratio 0.5")
    for title in ("random mask 90%", "blocks mask 50%", "still mask 75%", "sampled mask 60%"):
        assert f"| {title} |" in shown
    maps = f"maps {manifest(16)} --clip local-dir:data/toy/clip --image-size 64 --patch-size 8"
    captions.main(maps.split())
    assert "text maps" in call(
        f"train.py --data some.jsonl --recipe toy --mask sampled {few} --out maps"
    )
