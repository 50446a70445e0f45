"""The method against things that no one here wrote: transformers, nn.MultiheadAttention, naive
loops."""

import argparse
import json
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, replace
from fractions import Fraction

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import assert_equal, needs_transformers
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import dataset
import pictures
import runs
import tgmae
import weights
from tgmae import TGMAE, Config


def hf_config(c, **more):
    same = "image_size patch_size num_frames tubelet_size layer_norm_eps".split()
    return VideoMAEConfig(
        hidden_size=c.embed_dim,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        intermediate_size=int(c.embed_dim * c.mlp_ratio),
        decoder_hidden_size=c.decoder_embed_dim,
        decoder_num_hidden_layers=c.decoder_depth,
        decoder_num_attention_heads=c.decoder_num_heads,
        decoder_intermediate_size=int(c.decoder_embed_dim * c.mlp_ratio),
        use_mean_pooling=False,
        **{name: getattr(c, name) for name in same} | more,
    )


def random_inputs(c, batch=2, ratio=0.6):
    video = torch.randn(batch, 3, c.num_frames, c.image_size, c.image_size)
    return video, tgmae.topk_mask(torch.rand(batch, *c.grid), ratio)


CONFIGS = [
    dict(image_size=32, patch_size=8, num_frames=8, embed_dim=48, depth=3, num_heads=4,
         decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2),
    dict(image_size=64, num_frames=4, embed_dim=96, depth=2, num_heads=3, decoder_embed_dim=48,
         decoder_depth=3, decoder_num_heads=4),
    dict(image_size=48, num_frames=6, tubelet_size=3, embed_dim=32, depth=1, num_heads=2,
         decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=1, mlp_ratio=2.0),
]  # fmt: skip


@torch.no_grad()
def randomise(model):
    for p in model.parameters():
        p.normal_(std=0.1)


def official(model):
    """Weights as VideoMAE's own code saves them: our names, Conv3d's shape, no predictor."""
    c, state = model.config, model.state_dict()
    state = {name: v for name, v in state.items() if not name.startswith("predictor.")}
    cubes = state["encoder.patch_embed.proj.weight"]
    conv = cubes.view(-1, c.tubelet_size, c.patch_size, c.patch_size, 3).permute(0, 4, 1, 2, 3)
    return state | {"encoder.patch_embed.proj.weight": conv}


def fine_tuned(state):
    return {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}


@needs_transformers
@pytest.mark.parametrize("sizes", CONFIGS)
def test_equals_transformers_both_ways(sizes):
    c = Config(**sizes)
    theirs, ours = VideoMAEForPreTraining(hf_config(c)).eval(), TGMAE(c).eval()
    video, mask = random_inputs(c)

    def compare():
        a, b = theirs(video.transpose(1, 2), mask), ours(video, mask)
        torch.testing.assert_close(b["pred"], a.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(b["mae"], a.loss, atol=1e-4, rtol=0)
        hidden = theirs.videomae(video.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(ours.encode(video), hidden, atol=1e-4, rtol=0)
        return b["mae"].item()

    randomise(theirs)
    loaded = ours.load_state_dict(weights.from_videomae(theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("predictor.") for name in loaded.missing_keys)
    first = compare()
    randomise(ours)
    theirs.load_state_dict(weights.to_huggingface(ours))  # strict
    assert compare() != first


def test_official_names(config):
    """Pre-training and fine-tuned names of the official code lead to the same weights."""
    model, video = TGMAE(config), torch.randn(1, 3, 4, 32, 32)
    state = official(model)
    ours = {name: model.state_dict()[name] for name in state}
    assert_equal(weights.from_videomae(state), ours)
    head = {"fc_norm.weight": torch.ones(48), "head.weight": torch.ones(5, 48)}
    encoder = {name: v for name, v in ours.items() if name.startswith("encoder.")}
    assert_equal(weights.from_videomae(fine_tuned(state) | head), encoder | head)
    # And the product with the cubes is the convolution.
    conv, bias = (state[f"encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    expected = F.conv3d(video, conv, bias, stride=(2, 8, 8)).flatten(2).transpose(1, 2)
    made = model.encoder.patch_embed(tgmae.patchify(video, 8, 2))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="not VideoMAE's weights: names like a.b"):
        weights.from_videomae({"a.b": torch.ones(1)})


@needs_transformers
def test_bare_transformers_encoder(config):
    full = VideoMAEForPreTraining(hf_config(config))
    bare, whole = (weights.from_videomae(m.state_dict()) for m in (full.videomae, full))
    assert bare
    assert_equal(bare, {name: whole[name] for name in bare})


def test_load_checkpoint(config, tmp_path, monkeypatch):
    """Sizes come with the weights: of official files, and ours."""
    path, model = tmp_path / "some.pt", TGMAE(config)
    flags = argparse.Namespace(lr=1, input_size=32, num_frames=4)
    torch.save({"model": official(model), "args": flags}, path)
    with pytest.raises(ValueError, match="some.pt: .*48 wide: how many heads is not said"):
        weights.load_checkpoint(path)
    monkeypatch.setitem(tgmae.PRESETS, "toy", config)  # now it is one of the known widths
    read, loaded, _ = weights.load_checkpoint(path)
    assert replace(read, text_dim=16) == config
    assert_equal(loaded, weights.from_videomae(official(model)))
    torch.save({"module": fine_tuned(official(model))}, path)
    read, loaded, _ = weights.load_checkpoint(path)
    assert (read.embed_dim, read.depth, read.num_frames, read.image_size) == (48, 2, 16, 224)
    assert_equal(loaded, weights.from_videomae(fine_tuned(official(model))))
    torch.save({"model": model.state_dict(), "config": asdict(config)}, path)
    read, loaded, _ = weights.load_checkpoint(path)
    assert read == config
    assert_equal(loaded, dict(model.state_dict()))


@needs_transformers
def test_folders_and_hub_names_of_transformers(config, tmp_path, monkeypatch):
    """Safetensors and .bin, whole and in shards, both spellings of the biases, from a folder and
    from the hub's cache: read without transformers, and equal to what it loads."""
    net = VideoMAEForVideoClassification(hf_config(config, id2label={0: "zero", 1: "one"}))
    randomise(net)
    whole, shards, bins = (tmp_path / name for name in ("whole", "shards", "bins"))
    bin, snapshot = tmp_path / "bin", tmp_path / "hub/models--some--one/snapshots/1"
    net.save_pretrained(whole)
    net.save_pretrained(shards, max_shard_size="50KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    old = {
        name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value
        for name, value in net.state_dict().items()
    }
    assert old.keys() != net.state_dict().keys()
    for place in (bin, bins, snapshot):
        shutil.copytree(whole, place)
        os.remove(place / "model.safetensors")
        torch.save(old, place / "pytorch_model.bin")
    os.remove(bins / "pytorch_model.bin")
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(old)}
    for shard in set(where.values()):
        torch.save({name: old[name] for name in old if where[name] == shard}, bins / shard)
    (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it would fail
    for source in (whole, shards, bin, bins, "some/one"):
        read, state, rest = weights.load_checkpoint(source)
        assert replace(read, text_dim=config.text_dim) == config
        assert_equal(state, weights.from_videomae(net.state_dict()))
        assert rest["classes"] == ["zero", "one"]

    def refused(source, why):
        with pytest.raises(ValueError, match=f"{source}.*{why}"):
            weights.load_checkpoint(source)

    os.remove(bins / "pytorch_model-1.bin")
    refused(bins, "pytorch_model-1.bin: cannot be loaded")
    os.remove(bin / "pytorch_model.bin")
    refused(bin, "no model.safetensors and no pytorch_model.bin")
    (whole / "model.safetensors").write_bytes(b"half a file")
    refused(whole, "model.safetensors: cannot be loaded")
    for text, why in (
        ('{"model_type": "bert"}', "a bert, not a VideoMAE"),
        ("{", "one of its .json files is none of transformers'"),
    ):
        (whole / "config.json").write_text(text)
        refused(whole, why)
    refused("some/other", "no config.json, on disk or at a hub that can be reached")
    refused("runs/gone/last.pt", "no such file")


BLOCK = "videomae.encoder.layer.0."
WRONG = [  # changes of config.json, of the weights' names, and what is said
    ({"hidden_act": "relu"}, {}, "hidden_act='relu', not 'gelu'"),
    ({"hidden_act": "gelu_new"}, {}, "hidden_act='gelu_new'"),
    ({"qkv_bias": False}, {}, "qkv_bias=False, not True"),
    ({"qv_bias": False}, {}, "qv_bias=False, not True"),
    ({"use_mean_pooling": True}, {}, "use_mean_pooling=True, but there is a layernorm"),
    ({}, {"videomae.layernorm.weight": None, "videomae.layernorm.bias": None},
     "use_mean_pooling=False, but there is no layernorm"),
    ({"num_hidden_layers": 1}, {}, "it has an unknown videomae.encoder.layer.1."),
    ({"num_hidden_layers": 3}, {}, "it has no videomae.encoder.layer.2."),
    ({"patch_size": 16}, {}, "its videomae.embeddings.patch_embeddings.projection.weight has"),
    ({}, {"decoder.decoder_layers.0.intermediate.dense.bias": "decoder.norm.bias"},
     "its decoder.decoder_layers.0.intermediate.dense.bias has shape (96,)"),
    ({}, {f"{BLOCK}output.dense.weight": "decoder.norm.bias"},
     f"its {BLOCK}output.dense.weight has shape (96,), but by its sizes encoder.blocks.0.mlp.fc2"),
    ({}, {f"{BLOCK}intermediate.dense.weight": None}, "it has no encoder.blocks.0.mlp.fc1.weight"),
    ({}, {f"{BLOCK}output.dense.bias": None}, f"it has no {BLOCK}output.dense.bias"),
    ({}, {f"{BLOCK}attention.attention.key.weight": None},
     f"{BLOCK}attention.attention.query.weight lacks a key and a value of its shape"),
    ({}, {f"{BLOCK}attention.attention.{part}.weight": None for part in ("query", "key", "value")},
     f"it has no {BLOCK}attention.attention.query.weight"),
    ({}, {"mask_token": None}, "it has no mask_token"),
    ({}, {"gamma_1": "mask_token"}, "it has an unknown gamma_1"),
]  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("settings, names, why", WRONG)
def test_models_that_are_not_ours(settings, names, why, config, tmp_path):
    """They are refused, in the words of the file."""
    net = VideoMAEForPreTraining(hf_config(config))
    net.save_pretrained(tmp_path)
    state = net.state_dict()
    for name, value in names.items():
        state |= {name: state[value]} if value else {}
        state = {key: v for key, v in state.items() if value or key != name}
    state = {name: value.clone() for name, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=re.escape(why)):
        weights.load_checkpoint(tmp_path)


@pytest.mark.parametrize("flags, sizes, assumed", [
    ({"num_frames": 4, "input_size": 32}, (4, 32), ""),
    (argparse.Namespace(num_frames=4, num_segments=2, input_size="32"), (8, 32), ""),
    (argparse.Namespace(num_frames=4, input_size=None), (4, 224), "image_size=224"),
    ({"model": {"num_frames": 4}}, (16, 224), "num_frames=16, image_size=224"),
    (["--num_frames", "4"], (16, 224), "num_frames=16, image_size=224"),
    (None, (16, 224), "num_frames=16, image_size=224"),
    ({"num_frames": 4, "input_size": [32, 32]}, None, "some.pt: makes no model: int"),
    ({"num_frames": 3, "input_size": 32}, None, "some.pt: makes no model: num_frames, tubel.*=3"),
])  # fmt: skip
def test_flags_of_official_files(flags, sizes, assumed, config, tmp_path, monkeypatch):
    monkeypatch.setitem(tgmae.PRESETS, "toy", config)
    path = tmp_path / "some.pt"
    torch.save({"model": official(TGMAE(config)), "args": flags}, path)
    if sizes:
        read, _, rest = weights.load_checkpoint(path)
        assert (read.num_frames, read.image_size) == sizes and rest["assumed"] == assumed
        assert rest["norm_pix_loss"]
        torch.save({"model": official(TGMAE(config)), "args": {"normlize_target": False}}, path)
        assert not weights.load_checkpoint(path)[2]["norm_pix_loss"]
    else:
        with pytest.raises(ValueError, match=assumed):
            weights.load_checkpoint(path)


def test_weights_of_ours_without_sizes(config, tmp_path):
    torch.save(TGMAE(config).state_dict(), tmp_path / "some.pt")
    why = r"some.pt: makes no model: encoder.patch_embed.proj.weight \(48, 384\) is no convolution"
    with pytest.raises(ValueError, match=why):
        weights.load_checkpoint(tmp_path / "some.pt")


GIANT = Config(embed_dim=1408, depth=2, num_heads=16, mlp_ratio=48 / 11)  # VideoMAEv2's, but low
SIZES = {name: c for name, c in tgmae.PRESETS.items() if name != "toy"} | {"giant": GIANT}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_read(name):
    """From official weights of each."""
    with torch.device("meta"):
        state = official(TGMAE(SIZES[name]))
    conv = (SIZES[name].embed_dim, 3, 2, 16, 16)
    sizes = weights._official_sizes(state, conv, None)
    assert sizes.pop("norm_pix_loss") and Config(**sizes) == SIZES[name]


def test_numpy_scalars_are_data(config, tmp_path):
    """And what is refused is named."""
    saved = {"model": TGMAE(config).state_dict(), "config": asdict(config)}
    best = {"best": np.float64(0.5), "epoch": np.int64(3), "flag": np.bool_(True)}
    torch.save(saved | best, tmp_path / "a.pt")
    read, _, rest = weights.load_checkpoint(tmp_path / "a.pt")
    assert read == config and {key: rest[key] for key in best} == best
    with zipfile.ZipFile(tmp_path / "a.pt") as new, zipfile.ZipFile(tmp_path / "1.pt", "w") as old:
        for name in new.namelist():  # as NumPy 1 names it
            data = new.read(name)
            assert not name.endswith("data.pkl") or b"numpy._core" in data
            old.writestr(name, data.replace(b"numpy._core", b"numpy.core"))
    assert weights.load_checkpoint(tmp_path / "1.pt")[2]["best"] == 0.5
    torch.save(saved | {"when": Fraction(1, 2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="b.pt: .*it holds a fractions.Fraction, which is no data"):
        weights.load_checkpoint(tmp_path / "b.pt")


def test_attention_is_multihead_attention():
    ours = tgmae.Attention(48, 4).double()
    theirs = torch.nn.MultiheadAttention(48, 4, batch_first=True).double()
    randomise(ours)
    k_bias = torch.randn(48).double()  # cancels
    bias = torch.cat([ours.q_bias, k_bias, ours.v_bias])
    own = {"in_proj_weight": ours.qkv.weight, "in_proj_bias": bias}
    out = {"out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias}
    theirs.load_state_dict(own | out)
    x = torch.randn(2, 11, 48).double()
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-9, rtol=0)


def test_patchify_written_out():
    video = torch.randn(2, 3, 4, 6, 9)
    cubes = tgmae.patchify(video, 3, 2)
    for i, (t, h, w) in enumerate(np.ndindex(2, 2, 3)):
        for j, (f, y, x, c) in enumerate(np.ndindex(2, 3, 3, 3)):  # (frame, row, column, channel)
            assert torch.equal(cubes[:, i, j], video[:, c, 2 * t + f, 3 * h + y, 3 * w + x])
    assert torch.equal(tgmae.unpatchify(cubes, (2, 2, 3), 3, 2), video)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        tgmae.patchify(video, 4, 2)
    with pytest.raises(AssertionError, match="3x2x3"):
        tgmae.unpatchify(cubes, (3, 2, 3), 3, 2)


def test_target_written_out(config):
    video, mask = random_inputs(config)
    target, mean, std = tgmae.reconstruction_target(video, mask, config)
    scale, shift = torch.tensor([[0.229, 0.224, 0.225], [0.485, 0.456, 0.406]])
    pixels = video * scale.view(3, 1, 1, 1) + shift.view(3, 1, 1, 1)
    cube = tgmae.patchify(pixels, 8, 2)[1, mask[1].nonzero()[3, 0]].view(-1, 3).double()
    expected = (cube - cube.mean(0)) / (cube.std(0, correction=1) + 1e-6)
    made = target[1, 3].view(-1, 3).double()
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-7)
    torch.testing.assert_close(made * std[1, 3] + mean[1, 3], cube, atol=1e-5, rtol=1e-7)


def test_topk_mask():
    scores = torch.rand(3, 4, 5, 7)
    mask = tgmae.topk_mask(scores, 0.6)
    assert mask.dtype == torch.bool and mask.shape == (3, 140)
    assert (mask.view(3, 4, 35).sum(-1) == 21).all()
    flat, rows = scores.view(3, 4, 35), mask.view(3, 4, 35)
    for b, t in np.ndindex(3, 4):
        assert flat[b, t][rows[b, t]].min() > flat[b, t][~rows[b, t]].max()
    bottom = tgmae.topk_mask(scores, 0.4, bottom_k=True)
    assert torch.equal(bottom, ~mask)  # the lowest 14 are what the highest 21 leave
    ties = torch.zeros(2, 3, 4, 5)  # equal scores: as many are masked
    assert (tgmae.topk_mask(ties, 0.5).view(2, 3, 20).sum(-1) == 10).all()
    with pytest.raises(AssertionError, match="NaN"):
        tgmae.topk_mask(scores.masked_fill(scores > 0.9, math.nan), 0.6)


def test_tube_scores_share_time():
    mask = tgmae.topk_mask(tgmae.tube_scores(2, (4, 6, 6)), 0.9).view(2, 4, 36)
    assert (mask == mask[:, :1]).all() and mask.sum(-1).eq(32).all()
    assert not torch.equal(mask[0], mask[1])


def test_motion_scores_by_loops():
    """The mean over a cube's frames and over the cells that it touches, but for the noise."""
    motion = torch.rand(2, 4, 7, 5)
    scores = tgmae.motion_scores(motion, (2, 3, 4))
    for b, t, y, x in np.ndindex(2, 2, 3, 4):
        rows = slice(7 * y // 3, -(-7 * (y + 1) // 3))
        cols = slice(5 * x // 4, -(-5 * (x + 1) // 4))
        expected = motion[b, 2 * t : 2 * t + 2, rows, cols].mean()
        assert 0 <= (scores[b, t, y, x] - expected).item() < 1.001e-4
    with pytest.raises(AssertionError, match="4 frames in 3 time slices"):
        tgmae.motion_scores(motion, (3, 3, 4))
    # Where nothing moves each cube is masked as often as any other; the same from one seed.
    still = torch.zeros(4000, 2, 2, 2)
    share = tgmae.topk_mask(tgmae.motion_scores(still, (1, 2, 2)), 0.5).float().mean(0)
    assert ((share - 0.5).abs() < 0.05).all()
    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    again = tgmae.motion_scores(still, (1, 2, 2), generator=other)
    assert torch.equal(tgmae.motion_scores(still, (1, 2, 2), generator=one), again)
    # What moves least is still above all that does not: a block moves by a quarter of a pixel.
    still[:, 0, 0, 0] = 0.25
    assert tgmae.topk_mask(tgmae.motion_scores(still, (1, 2, 2)), 0.25)[:, 0].all()


def test_crop_motion_by_area():
    """Against every source pixel's share."""
    motion = torch.rand(4, 7, 5)
    crop = dataset.Crop(8, 4, 36, 24)  # of 56 x 40 pixels, cells of 8: each pixel is a point of 1.5
    pixels = motion.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, 8:44, 4:28]
    expected = F.avg_pool2d(pixels[:, None], (12, 8))[:, 0]
    torch.testing.assert_close(dataset.crop_motion(motion, crop, (2, 3, 3)), expected)
    mirrored = dataset.crop_motion(motion, crop._replace(flip=True), (2, 3, 3))
    torch.testing.assert_close(mirrored, expected.flip(-1))


def test_multi_scale_crop():
    """VideoMAE's 10 pairs of sides and 13 places, and frames cut where the box says."""
    crops = {dataset.multi_scale_crop((100, 140)) for _ in range(5000)}
    assert {c.flip for c in crops} == {True, False}
    pairs = {(100, 100), (87, 87), (75, 75), (66, 66), (100, 87), (87, 75), (75, 66)}
    assert {(c.height, c.width) for c in crops} == pairs | {(b, a) for a, b in pairs}
    places = {(c.top, c.left) for c in crops if (c.height, c.width) == (66, 66)}
    assert len(places) == 13 and {(0, 0), (32, 72), (16, 36), (8, 18), (0, 36)} <= places
    assert not any(dataset.multi_scale_crop((100, 140), flip=False).flip for _ in range(50))
    frames = torch.randint(0, 256, (2, 100, 140, 3), dtype=torch.uint8)
    expected = frames[:, 10:42, 20:52].permute(3, 0, 1, 2)
    for flip, cut in ((False, expected), (True, expected.flip(-1))):
        assert_equal(dataset.crop_frames(frames, dataset.Crop(10, 20, 32, 32, flip), 32), cut)


def test_text_scores_patch_by_patch(world):
    """One patch at a time through torchvision and CLIP itself; also in uneven chunks."""
    clip, tokenizer = tgmae.load_clip(f"local-dir:{world / 'clip'}")
    record = dataset.read_manifest(world / "manifest.jsonl", "test")[0]
    frames = dataset.read_clip(record["path"], [0, 4, 8, 12])
    video = tgmae.normalize(frames.permute(3, 0, 1, 2)[None].repeat(2, 1, 1, 1, 1))
    video[1] = video[1].flip(-1)
    text = tgmae.encode_text(clip, tokenizer, ["a red circle moving left", "the blue star goes up"])
    scores = tgmae.text_scores(clip, video, text, 8, 2, chunk=50)
    assert scores.shape == (2, 2, 8, 8)
    cfg = clip.visual.preprocess_cfg
    for b, t, y, x in ((0, 0, 0, 0), (0, 1, 3, 4), (1, 0, 7, 2), (1, 1, 5, 5)):
        frame = frames[2 * t].permute(2, 0, 1).float() / 255
        patch = (frame.flip(-1) if b else frame)[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        patch = TF.resize(patch, [16, 16], InterpolationMode.BICUBIC, antialias=False)
        image = clip.encode_image(TF.normalize(patch.clamp(0, 1), cfg["mean"], cfg["std"])[None])[0]
        expected = image @ text[b] / image.norm()
        assert scores[b, t, y, x].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name, weights_", [
    ("ViT-B-32", "missing.pt"), ("local-dir:nowhere", "openai"), ("no-such-model", "openai"),
])  # fmt: skip
def test_a_clip_that_is_not_there_is_named(name, weights_):
    with pytest.raises(ValueError) as error:
        weights.load_clip(name, weights_, "cpu")
    said = str(error.value)
    assert (weights_ if name == "ViT-B-32" else name.removeprefix("local-dir:")) in said
    assert "\n" not in said and said.startswith(f"--clip {name} --clip-pretrained {weights_}: ")
    assert "Ways out: --clip-pretrained FILE" in said
    with pytest.raises((RuntimeError, OSError, ValueError)):  # nor are there random weights
        tgmae.load_clip(name, weights_)


def test_scores_are_float32_under_autocast(world):
    clip, tokenizer = tgmae.load_clip(f"local-dir:{world / 'clip'}")
    video, text = torch.randn(2, 3, 2, 16, 16), tgmae.encode_text(clip, tokenizer, ["a", "b"])
    plain = tgmae.text_scores(clip, video, text, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert tgmae.text_scores(clip, video, text, 8, 2).dtype == plain.dtype == torch.float32
    assert len(plain.unique()) == plain.numel()
    with pytest.raises(TypeError, match="'a red circle'"):
        tgmae.encode_text(clip, tokenizer, "a red circle")
    with pytest.raises(TypeError, match="video is torch.float32: must be uint8"):
        tgmae.normalize(torch.rand(1, 3, 2, 16, 16))
    for clips, texts, why in (
        (video.byte(), text, "video is torch.uint8: normalize"),
        (video, text[:1], "1 texts of 2 videos"), (video[:, :, :1], text, "1 frames in tubelets 2"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=why):
            tgmae.text_scores(clip, clips, texts, 8, 2)


def test_info_nce_by_loops():
    video, text = torch.randn(5, 8).double(), torch.randn(5, 8).double()
    groups = torch.tensor([0, 1, 1, 2, 0])
    for group in (None, groups):
        total = 0
        for i in range(5):
            for a, b in ((video, text), (text, video)):
                sim = {}
                for j in range(5):
                    if i == j or group is None or group[i] != group[j]:
                        sim[j] = math.exp(float(a[i] @ b[j] / (a[i].norm() * b[j].norm())) / 0.1)
                total -= math.log(sim[i] / sum(sim.values()))
        loss = tgmae.info_nce(video, text, 0.1, groups=group).item()
        assert loss == pytest.approx(total / 10, rel=1e-9)


def test_visible_cubes_do_not_enter_the_loss(config):
    video, mask = random_inputs(config)
    pred = torch.randn(2, int(mask[0].sum()), config.patch_dim)
    cubes = tgmae.patchify(video, 8, 2)

    def changed(which):
        new = torch.where(which[..., None], torch.randn_like(cubes), cubes)
        return tgmae.unpatchify(new, config.grid, 8, 2)

    def loss(video):
        return tgmae.reconstruction_loss(pred, video, mask, config)

    assert loss(changed(~mask)) == loss(video) and not loss(changed(mask)).isclose(loss(video))
    model = TGMAE(config).eval()  # nor does the encoder see masked ones
    assert_equal(model.encode(changed(mask), mask), model.encode(video, mask))


def test_vt_is_of_the_visible_tokens_mean(config):
    """By itself, and as one process of a gather that brings nothing: mean, predictor, InfoNCE."""
    model = TGMAE(replace(config, temperature=0.2)).eval()
    video, mask = random_inputs(config, batch=5)
    text = torch.randn(5, config.text_dim)
    visible = [model.encode(v[None], m[None])[0].mean(0) for v, m in zip(video, mask)]
    expected = tgmae.info_nce(model.predictor(torch.stack(visible)), text, 0.2)
    torch.testing.assert_close(model(video, mask, text)["vt"], expected)
    torch.testing.assert_close(model(video, mask, text, watch=True, mae=False)["vt"], expected)


def test_reconstruction_of_the_target_is_the_clip(config):
    pixels = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    video, mask = tgmae.normalize(pixels), random_inputs(config)[1]
    target, _, _ = tgmae.reconstruction_target(video, mask, config)
    made = pictures.reconstruct(video, mask, target, config)
    torch.testing.assert_close(made["clip"], pixels / 255)
    torch.testing.assert_close(made["reconstructed"], made["clip"], atol=1e-5, rtol=0)
    cubes, hidden = (tgmae.patchify(made[name], 8, 2) for name in ("clip", "masked"))
    assert (hidden[mask] == 0.5).all() and torch.equal(hidden[~mask], cubes[~mask])
    predicted = tgmae.patchify(made["predicted"], 8, 2)[mask].view(2, -1, config.patch_dim)
    torch.testing.assert_close(predicted, (0.5 + target / 6).clamp(0, 1))
    assert pictures.reconstruct(video, mask, None, config).keys() == {"clip", "masked"}


def test_overfits_two_clips(config):
    model = TGMAE(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    coarse, (_, mask) = torch.randn(2, 3, 4, 8, 8), random_inputs(config)
    video = coarse.repeat_interleave(4, -1).repeat_interleave(4, -2)
    first = model(video, mask)["mae"].item()
    for _ in range(250):
        loss = model(video, mask)["mae"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * first


@pytest.mark.parametrize("mae, watch", [(True, False), (True, True), (False, False)])
def test_gradients(config, mae, watch):
    model = TGMAE(config).double()  # what is zero in theory is then zero to 1e-12
    video, mask = random_inputs(config, batch=4)
    video = video.double()
    out = model(video, mask, torch.randn(4, 16).double(), mae=mae, watch=watch)
    assert ("mae" in out) == ("pred" in out) == mae
    (out["vt"] + out.get("mae", 0)).backward()
    for name, p in model.named_parameters():
        decoder = name.startswith(("decoder.", "encoder_to_decoder.")) or name == "mask_token"
        if decoder and not mae:
            assert p.grad is None, name
        elif name == "predictor.0.bias":  # BatchNorm takes it out again
            assert p.grad.abs().max() < 1e-12
        else:
            assert torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    if watch:
        alone = TGMAE(config).double()
        alone.load_state_dict(model.state_dict())
        alone(video, mask)["mae"].backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            assert name.startswith("predictor.") or torch.equal(p.grad, q.grad), name


def test_grad_checkpointing_changes_nothing(config, monkeypatch):
    """But how often a block runs: each of 2 + 1 goes through torch's checkpoint."""
    calls, checkpoint, grads = [], runs.checkpoint, []

    def counted(block, *args, **more):
        calls.append(block)
        return checkpoint(block, *args, **more)

    monkeypatch.setattr(runs, "checkpoint", counted)
    model, (video, mask) = TGMAE(config), random_inputs(config)
    for on in (False, True):
        if on:
            runs.checkpoint_blocks(model)
        model.zero_grad()
        model(video, mask)["mae"].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(calls) == 3 * on
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


def test_bad_shapes_say_which(config):
    model, (video, mask) = TGMAE(config), random_inputs(config)
    uneven = mask.clone()
    uneven[0] = True
    for clip, which, reason in (
        (video[:, :, :, :16], mask, r"video \(2, 3, 4, 16, 32\): the model takes \(2, 3, 4, 32"),
        (video[:, :1], mask, r"video \(2, 1, 4, 32, 32\)"),
        (video, mask[:, 1:], r"mask \(2, 31\)"), (video, mask[:1], r"mask \(1, 32\)"),
        (video, uneven, r"masks \[32, \d+\] of 32 cubes"), (video, mask.float(), "must be bool"),
        (video, torch.zeros_like(mask), r"masks \[0, 0\]"),
        (video, torch.ones_like(mask), r"masks \[32, 32\]"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=reason):
            model(clip, which)


@pytest.mark.parametrize("bad", [
    dict(image_size=30), dict(num_frames=3), dict(num_heads=5), dict(decoder_num_heads=7),
])  # fmt: skip
def test_bad_config_prints_the_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(AssertionError, match=f"[( ]{name}={value}"):
        Config(**bad)


def saved_with(config, path, **more):
    torch.save({"model": TGMAE(config).state_dict(), "config": asdict(config) | more}, path)
    return weights.load_checkpoint(path)


def test_configs_of_older_checkpoints(config, tmp_path):
    """They say more than ours: channels, drop path, whether targets are normalised."""
    path = tmp_path / "old.pt"
    old = {"in_chans": 3, "norm_pix_loss": True, "drop_path": 0.1}
    assert saved_with(config, path, **old)[0] == config
    assert not saved_with(config, path, norm_pix_loss=False)[2]["norm_pix_loss"]
    for more, why in (
        ({"image_size": 30}, "makes no model: image_size, patch_size: .*image_size=30"),
        ({"num_heads": 0}, "makes no model: "), ({"depht": 2}, "makes no model: .*depht"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"old.pt: {why}"):
            saved_with(config, path, **more)
    state = TGMAE(config).state_dict()
    state["encoder.patch_embed.proj.weight"] = torch.zeros(48, 128)
    torch.save({"model": state, "config": asdict(config) | {"in_chans": 1}}, path)
    with pytest.raises(ValueError, match=r"encoder.patch_embed.proj.weight has shape \(48, 128\)"):
        weights.load_checkpoint(path)


@pytest.mark.parametrize("name, millions", [("base", 86.2), ("small", 21.9)])
def test_presets_are_videomae(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in TGMAE(tgmae.PRESETS[name]).encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert tgmae.PRESETS[name].grid == (8, 14, 14) and tgmae.PRESETS[name].patch_dim == 1536


def test_bf16_runs(config):
    model, (video, mask) = TGMAE(config), random_inputs(config)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(video, mask, torch.randn(2, 16))
    assert out["mae"].dtype == out["vt"].dtype == torch.float32
    (out["mae"] + out["vt"]).backward()
