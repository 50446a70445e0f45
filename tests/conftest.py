import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before torch loads
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network, or asks for one

import pytest
import torch
import transformers

import dataset
import tgmae
import toy

ROOT = Path(__file__).resolve().parents[1]
FOOTAGE = ROOT.parent / "shared" / "videos"
# From 5.0 to 5.15 transformers sets VideoMAE's query and value biases to zero.
needs_transformers = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason=f"transformers {transformers.__version__}: older than 5.18",
)
TINY = dict(
    image_size=32, patch_size=8, num_frames=4, embed_dim=48, depth=2, num_heads=3,
    decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3, text_dim=16,
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes long, too")


def pytest_configure(config):
    config.option.reportchars += "s"  # what is skipped is said, and why


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture
def config():
    return tgmae.Config(**TINY)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world of 64 + 16 clips, whose CLIP has seen a few steps. Seconds, once."""
    return toy.build(tmp_path_factory.mktemp("small") / "toy", clips=64, clip_steps=20)


@pytest.fixture(scope="session")
def full_world(tmp_path_factory):
    """The toy world as train.py makes it: 800 + 200 clips and the CLIP. A minute, once."""
    return toy.build(tmp_path_factory.mktemp("full") / "toy")


def main_command(world, folder, *flags):
    """torchrun train.py --mask tgm --vt in a folder, where data/toy is that world -> last.pt."""
    (folder / "data").mkdir()
    (folder / "data" / "toy").symlink_to(world, target_is_directory=True)
    words = ["-m", "torch.distributed.run", ROOT / "train.py", "--mask", "tgm", "--vt", *flags]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "toy-tgm-vt" / "last.pt"


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """The checkpoint of the main command, of three steps on the small world."""
    few = "--epochs", 1, "--warmup-epochs", 0, "--workers", 1
    return main_command(world, tmp_path_factory.mktemp("trained"), *few)


@pytest.fixture(scope="session")
def fully_trained(full_world, tmp_path_factory):
    """The checkpoint of the main command, all of it. Three minutes, once."""
    return main_command(full_world, tmp_path_factory.mktemp("fully"))


def in_a_folder_of_its_own(world, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy").symlink_to(world, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def workdir(world, tmp_path, monkeypatch):
    """An empty working directory in which data/toy is the small world."""
    return in_a_folder_of_its_own(world, tmp_path, monkeypatch)


@pytest.fixture
def full_workdir(full_world, tmp_path, monkeypatch):
    """An empty working directory in which data/toy is the full world."""
    return in_a_folder_of_its_own(full_world, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def footage():
    if not FOOTAGE.is_dir():
        pytest.skip("no footage beside the repository")
    return FOOTAGE


@pytest.fixture
def manifest(world, tmp_path):
    """Makes a small manifest of toy clips: manifest(6, extra=[...]) -> its path."""

    def make(clips, *, extra=(), name="some.jsonl"):
        records = dataset.read_manifest(world / "manifest.jsonl", "train")[:clips]
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
