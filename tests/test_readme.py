"""Every command of the README: its flags parse, its files exist; the toy ones run elsewhere in the tests."""

import functools
import re
import shlex

import pytest
from conftest import ROOT

import bench
import captions
import eval as evaluation
import tgmae
import toy
import train

README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
BLOCKS = [text for language, text in FENCED if not language]
SNIPPETS = [text for language, text in FENCED if language == "python"]
COMMANDS = [c.strip() for block in BLOCKS for line in block.splitlines() for c in line.split("&&")]
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", README)


def test_there_are_commands():
    assert len(COMMANDS) >= 9 and "torchrun train.py --mask tgm --vt" in COMMANDS


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command_parses(command):
    words = shlex.split(command)
    if words[0] in ("#SBATCH", "srun") or "=$(" in words[0]:
        words = words[1:] if words[0] == "srun" else []
    if not words:
        return
    if words[0] == "pip":
        assert words == ["pip", "install", "-r", "requirements.txt"] and (ROOT / "requirements.txt").exists()
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


def test_headers_parse():
    """The commands in the scripts' own headers, too."""
    scripts = ("train.py", train), ("toy.py", toy), ("captions.py", captions), ("eval.py", evaluation)
    for script, module in scripts:
        found = [
            line.split("#")[0]
            for line in module.__doc__.splitlines()
            if script in line and line.startswith("    ")
        ]
        assert found
        for line in found:
            module.parse_args(shlex.split(line.split(script, 1)[1]))


@pytest.mark.parametrize("snippet", range(len(SNIPPETS)))
def test_snippet_runs(snippet, world, monkeypatch):
    """With the toy CLIP for the one that would be downloaded, RAFT without its weights, a shallow VideoMAE."""
    import torchvision
    import transformers

    load_clip, raft = tgmae.load_clip, torchvision.models.optical_flow.raft_small
    monkeypatch.setattr(tgmae, "load_clip", lambda: load_clip(f"local-dir:{world / 'clip'}"))
    monkeypatch.setattr(torchvision.models.optical_flow, "raft_small", lambda weights: raft())
    shallow = functools.partial(transformers.VideoMAEConfig, num_hidden_layers=1, decoder_num_hidden_layers=1)
    monkeypatch.setattr(transformers, "VideoMAEConfig", shallow)
    found = {}
    exec(compile(SNIPPETS[snippet], "README.md", "exec"), found)
    if "loss" in found:
        assert found["loss"].isfinite()
    assert found["mask"].float().mean() == pytest.approx({0: 0.597, 1: 0.9, 2: 0.75}[snippet], abs=1e-3)
    if "random_mask" in found:  # not the same number in each slice
        assert len(set(found["mask"].view(2, 8, 196).sum(-1).flatten().tolist())) > 3
