"""Every command of the README: its flags parse, its files exist; the toy ones run elsewhere in the tests."""

import re
import shlex

import pytest
from conftest import ROOT

import bench
import captions
import eval as evaluation
import toy
import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)
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
