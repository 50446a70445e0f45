"""1, 2 and 3 gloo processes with the same 12 clips: the same losses, gradients and BatchNorm
statistics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def torchrun(processes, *args, cwd=HERE):
    agent = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    command = [sys.executable, *agent, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def results_of(processes, path):
    done = torchrun(processes, HERE / "ranks.py", path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results_of(1, tmp_path_factory.mktemp("ranks") / "one.pt")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_across_ranks(one, processes, tmp_path):
    many = results_of(processes, tmp_path / "many.pt")
    assert many.keys() == one.keys() and sum("predictor" in key for key in one) == 6
    torch.testing.assert_close(many, one, atol=1e-6, rtol=1e-6)  # names the key that differs
