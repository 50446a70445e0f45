import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before torch loads
os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # no test needs a network, nor asks whether there is one

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOOTAGE = ROOT.parent / "shared" / "videos"
sys.path.insert(0, str(ROOT))

import tgmae  # noqa: E402
import toy  # noqa: E402

TINY = dict(
    image_size=32, patch_size=8, num_frames=4, embed_dim=48, depth=2, num_heads=3,
    decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3, text_dim=16,
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="the long forms of tests that have a short one"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: the long form of a test; run with --slow, in place of the short one"
    )
    config.option.reportchars += "s"  # what is skipped is said, and why
    config.addinivalue_line("markers", "short: the short form of a test that has a long one")


def pytest_collection_modifyitems(config, items):
    other = "short" if config.getoption("--slow") else "slow"
    config.hook.pytest_deselected(items=[item for item in items if other in item.keywords])
    items[:] = [item for item in items if other not in item.keywords]


@pytest.fixture
def config():
    return tgmae.Config(**TINY)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The toy world as train.py makes it by itself: 800 + 200 clips and the CLIP. A minute,
    once."""
    return toy.build(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """The checkpoint of the main command, all of it: torchrun train.py --mask tgm --vt. Three
    minutes, once."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    (folder / "data" / "toy").symlink_to(world, target_is_directory=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        str(ROOT / "train.py"),
        "--mask",
        "tgm",
        "--vt",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "toy-tgm-vt" / "last.pt"


@pytest.fixture
def workdir(world, tmp_path, monkeypatch):
    """An empty working directory in which data/toy is there already."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy").symlink_to(world, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def footage():
    if not FOOTAGE.is_dir():
        pytest.skip("no footage beside the repository")
    return FOOTAGE


@pytest.fixture
def manifest(world, tmp_path):
    """Makes a small manifest of toy clips: manifest(6, extra=[...]) -> its path."""

    def make(clips, *, extra=(), name="some.jsonl"):
        records = tgmae.read_manifest(world / "manifest.jsonl", "train")[:clips]
        lines = [
            {"video": r["path"], "captions": r["captions"], "label": r["label"]} for r in records
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *extra]))
        return path

    return make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
