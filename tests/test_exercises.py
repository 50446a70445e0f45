"""docs/exercises.md: its commands parse, its masker does what it says, and its diff fits."""

import math
import re
import shlex

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import tgmae
import toy
import train
import weights

PAGE = (ROOT / "docs" / "exercises.md").read_text()
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S))
COMMANDS = sorted(set(re.findall(r"python (\w+)\.py\b([^`\n]*)", PAGE)))


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_command_parses(script, flags, monkeypatch):
    monkeypatch.setitem(tgmae.MASK_RATIOS, "change", 0.75)  # as the page's diff does
    monkeypatch.setattr(weights, "flags_of", lambda _: {"data": "toy"})
    {"train": train, "toy": toy, "eval": evaluation}[script].parse_args(shlex.split(flags))


def test_masker():
    exec(BLOCKS["python"], names := {})  # the last one
    video, truth = torch.zeros(2, 3, 8, 64, 64), torch.zeros(2, 4, 8, 8)
    for t in range(4):  # a square of 2x2 cubes jumps by its own width from slice to slice
        video[:, :, 2 * t : 2 * t + 2, 16:32, 16 * t : 16 * t + 16] = 1
        now = 2 * max(t, 1)
        truth[:, t, 2:4, now - 2 : now + 2] = 1  # where it was, and where it is
    scores = names["change_scores"](video, (4, 8, 8))
    torch.testing.assert_close(scores, truth)
    assert (tgmae.topk_mask(scores, 0.75).view(2, 4, 64).sum(-1) == 48).all()


def test_diffs_fit():
    diffs = "".join(re.findall(r"```diff\n(.*?)```", PAGE, re.S))
    old = re.findall(r"--- (\w+\.py).*\n[ -](.*)", diffs)  # each part's first line
    assert [(ROOT / name).read_text().count(line) for name, line in old] == [1, 1, 1, 1]


def test_the_bound_of_exercise_3():
    """No vectors have a lower loss; a regular simplex has this one."""
    B, temperature = 5, 0.5
    bound = math.log(1 + (B - 1) * math.exp(-B / (B - 1) / temperature))
    simplex = torch.eye(B, dtype=torch.float64) - 1 / B
    assert tgmae.info_nce(simplex, simplex, temperature).item() == pytest.approx(bound)
    torch.manual_seed(0)
    pairs = torch.randn(2, B, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([pairs], lr=0.05)
    for _ in range(300):
        loss = tgmae.info_nce(*pairs, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() > bound - 1e-9
    assert loss.item() == pytest.approx(bound, abs=1e-3)
