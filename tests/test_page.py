"""eval.py show --html: the numbers in the page, and what a browser makes of them."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import dataset
import eval as ev
import pictures
import tgmae

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTIONS = ["a red circle moving left", "the background with nothing on it"]


@pytest.fixture
def page(trained, workdir):
    """-> show.html of a test clip, with two captions, and the data in it."""
    flags = [flag for caption in CAPTIONS for flag in ("--caption", caption)]
    ev.main(["show", str(trained), "--html", "--no-amp", "--out", "show", *flags])
    text = Path("show.html").read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    return Path("show.html").resolve(), json.loads(data)


def test_numbers_are_those_of_the_maskers(page, trained, world, monkeypatch):
    data, c = page[1], tgmae.PRESETS["toy"]
    record = dataset.read_manifest(world / "manifest.jsonl", "test")[0]
    (numbers,) = ev.view_frames(0, 24, c.num_frames, 4, "dense", 1)
    frames, motion = dataset.read_clip(record["path"], numbers, motion=True)
    video = tgmae.normalize(frames.permute(3, 0, 1, 2)[None])
    clip, tokenizer = ev.weights.load_clip(f"local-dir:{world / 'clip'}", None, "cpu")
    text = tgmae.encode_text(clip, tokenizer, CAPTIONS)
    like = tgmae.text_scores(clip, video.expand(2, -1, -1, -1, -1), text, 8, 2)
    generator = torch.Generator().manual_seed(0)
    tube = tgmae.tube_scores(1, c.grid, generator=generator)
    mgm = tgmae.motion_scores(motion[None], c.grid, generator=generator)
    assert data["captions"] == CAPTIONS and data["grid"] == list(c.grid)
    assert data["scores"]["tube"] == tube.flatten(1).tolist()
    assert data["scores"]["mgm"] == mgm.flatten(1).tolist()
    torch.testing.assert_close(torch.tensor(data["scores"]["tgm"]), like.flatten(1).float())
    assert data["pictures"].keys() == {"clip", "reconstructed", "predicted"}
    assert data["layers"] == ["1 of 4", "2 of 4", "4 of 4"] and len(data["attention"]) == 3


def test_attention_in_the_page(page, trained):
    """Bytes of what each cube looks at, over its greatest; of a large model, every second cube."""
    for layer in page[1]["attention"]:
        attention = np.frombuffer(base64.b64decode(layer), np.uint8).reshape(128, 128)
        assert (attention.max(1) == 255).all()
    c = tgmae.Config(image_size=64, patch_size=4, num_frames=6)  # a grid of 3x16x16
    clip, attention = torch.zeros(6, 64, 64, 3, dtype=torch.uint8), torch.rand(1, 768, 768)
    text = pictures.explore(clip, {}, {}, attention, c)
    data = json.loads(re.search(r'"application/json">(.*?)</script>', text).group(1))
    assert data["every"] == 2
    found = np.frombuffer(base64.b64decode(data["attention"][0]), np.uint8).reshape(128, 128)
    some = [s * 256 + y * 16 + x for s in (0, 2) for y in range(0, 16, 2) for x in range(0, 16, 2)]
    expected = attention[0][some][:, some].numpy()
    np.testing.assert_allclose(found, 255 * expected / expected.max(1, keepdims=True), atol=0.51)


def test_markup_does_not_run(trained, workdir, world):
    """Neither in a caption nor in the name of a file."""
    record = dataset.read_manifest(world / "manifest.jsonl", "test")[0]
    name = "<img src=x onerror=alert(1)>.mp4"
    shutil.copy(record["path"], name)
    caption = "</script><script>alert(1)</script>"
    flags = ["--video", name, "--caption", caption, "--html", "--out", "show"]
    ev.main(["show", str(trained), *flags])
    text = Path("show.html").read_text()
    assert text.count("<script") == 2 and "<img" not in text
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert json.loads(data)["captions"] == [caption]
    assert json.loads(data)["title"].startswith(name)


def test_the_page_of_the_docs():
    """docs/explore.html is of this template."""
    data = r'(?<="application/json">).*(?=</script>)'
    template = (ROOT / "pictures.html").read_text()
    made = (ROOT / "docs/explore.html").read_text()
    assert re.sub(data, "{}", made) == template


def opened(page, address):
    """-> what #state says in a browser, and what its console says."""
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=30000 --dump-dom"
    command = [CHROMIUM, *flags.split(), "--enable-logging=stderr", f"file://{page}#{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (state,) = re.findall(r'<pre id="state">(.*?)</pre>', done.stdout, re.S)
    return json.loads(html.unescape(state)), re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("mask", tgmae.MASK_RATIOS)
@pytest.mark.parametrize("ratio", [0.1, 0.6, 0.9])
def test_a_browser_hides_the_same_cubes(page, mask, ratio):
    """As topk_mask, in each of nine addresses, of the second slice; the highest, and the lowest."""
    path, data = page
    scores = torch.tensor(data["scores"][mask][-1]).view(1, *data["grid"])
    for lowest in (0, 1):
        address = f"mask={mask}&ratio={ratio}&lowest={lowest}&frame=2&caption=1"
        state, console = opened(path, address)
        masked = tgmae.topk_mask(scores, ratio, bottom_k=bool(lowest)).view(*data["grid"][:1], -1)
        assert state["masked"] == masked[1].nonzero()[:, 0].tolist()
        assert (state["mask"], state["ratio"], state["lowest"]) == (mask, ratio, bool(lowest))
        assert (state["frame"], state["slice"], state["caption"]) == (2, 1, CAPTIONS[1])
        assert not console
