"""docs/tour.ipynb: its cells run, from top to bottom, and its outputs are embedded."""

import json
import statistics
import sys

import matplotlib.pyplot as plt
import torch
from conftest import ROOT

PATH = ROOT / "docs" / "tour.ipynb"
CELLS = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]
CODE = ["".join(cell["source"]) for cell in CELLS]


def test_outputs_are_embedded():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    kinds = {output["output_type"] for cell in CELLS for output in cell["outputs"]}
    assert kinds == {"display_data", "stream"}  # no "error"
    assert PATH.stat().st_size < 1_000_000  # at 150 dpi


def test_plain_python():
    lines = "\n".join(CODE).splitlines()
    assert not [line for line in lines if line.lstrip().startswith(("%", "!"))]


def test_cells_run(workdir, monkeypatch):
    figures, names = [], {}

    def show():
        figures.extend(plt.get_fignums())
        plt.close("all")

    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # to which the notebook adds
    with plt.rc_context():
        for code in CODE:
            exec(code, names)
    pictures = [output for cell in CELLS for output in cell["outputs"] if "data" in output]
    assert len(figures) == len(pictures)  # those embedded are of this code
    for name, losses in names["log"].items():
        torch.testing.assert_close(names[name], names["out"][name])  # by hand, and the model's
        assert statistics.fmean(losses[-5:]) < statistics.fmean(losses[:5]) - 0.2
