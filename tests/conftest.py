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


def argv(*parts):
    """Flags, several in a string, paths and numbers -> the words of a command."""
    split = (part.split() if isinstance(part, str) else [str(part)] for part in parts)
    return [word for words in split for word in words]


def write_lines(path, records):
    """Writes JSON lines -> the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_equal(*pair):
    """Tensors, or dicts and lists of them: to the last bit."""
    torch.testing.assert_close(*pair, rtol=0, atol=0)


def assert_same_run(*folders):
    """Weights, moments and log, but for its times."""
    a, b = (torch.load(Path(folder) / "last.pt", weights_only=True) for folder in folders)
    assert a["step"] == b["step"]
    assert_equal(a["model"], b["model"])
    assert_equal(a["optimizer"]["state"], b["optimizer"]["state"])
    lines = zip(*map(log, folders), strict=True)
    times = dict.fromkeys(("clips_per_s", "wait"))
    assert all(one | times == other | times for one, other in lines)


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


def linked(folder, world):
    """A folder, in which data/toy is that world from now on."""
    (folder / "data").mkdir()
    (folder / "data/toy").symlink_to(world, target_is_directory=True)
    return folder


def main_command(folder, *flags):
    """torchrun train.py --mask tgm --vt -> last.pt."""
    command = argv("-m torch.distributed.run", ROOT / "train.py", "--mask tgm --vt", *flags)
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder / "runs/toy-tgm-vt/last.pt"


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """The checkpoint of the main command, of three steps on the small world."""
    few = "--epochs 1 --warmup-epochs 0 --workers 1"
    return main_command(linked(tmp_path_factory.mktemp("trained"), world), few)


@pytest.fixture(scope="session")
def fully_trained(full_world, tmp_path_factory):
    """The checkpoint of the main command, all of it. Three minutes, once."""
    return main_command(linked(tmp_path_factory.mktemp("fully"), full_world))


@pytest.fixture
def workdir(world, tmp_path, monkeypatch):
    """An empty working directory in which data/toy is the small world."""
    monkeypatch.chdir(linked(tmp_path, world))
    return tmp_path


@pytest.fixture
def full_workdir(full_world, tmp_path, monkeypatch):
    """The same with the full world."""
    monkeypatch.chdir(linked(tmp_path, full_world))
    return tmp_path


@pytest.fixture(scope="session")
def footage():
    if not FOOTAGE.is_dir():
        pytest.skip("no footage beside the repository")
    return FOOTAGE


@pytest.fixture
def manifest(world, tmp_path):
    """manifest(6, held=2) -> the path of one with 6 toy clips, and 2 of another split."""

    def make(clips, *, held=0, extra=(), name="some.jsonl"):
        lines = []
        records = dataset.read_manifest(world / "manifest.jsonl", "train")
        chosen = [*records[:clips], *records[20 : 20 + held]]  # of the same classes
        for i, record in enumerate(chosen):
            line = {"video": record["path"], "captions": record["captions"]}
            split = {"split": "train" if i < clips else "held"} if held else {}
            lines.append(line | {"label": record["label"]} | split)
        return write_lines(tmp_path / name, [*lines, *extra])

    return make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
