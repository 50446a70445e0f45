"""1, 2 and 3 gloo processes with the same 12 clips: the same losses, gradients and BatchNorm
statistics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def torchrun(processes, *args, cwd=HERE):
    agent = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node".split(),
        processes,
    ]
    command = list(map(str, [*agent, *args]))
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "one.pt"
    done = torchrun(1, HERE / "ranks.py", path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_across_ranks(one, processes, tmp_path):
    done = torchrun(processes, HERE / "ranks.py", tmp_path / "many.pt")
    assert done.returncode == 0, done.stderr
    many = torch.load(tmp_path / "many.pt")
    assert many.keys() == one.keys() and sum("predictor" in key for key in one) == 6
    for key in one:
        torch.testing.assert_close(
            many[key], one[key], atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
