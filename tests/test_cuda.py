"""The method on a GPU against the same on the CPU. On a machine with a GPU the tests of the scripts
run there, too: it is their default device."""

from copy import deepcopy

import pytest
import torch

import runs
import tgmae
import weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with CUDA")


def batch(config, size=4):
    video = torch.randint(256, (size, 3, config.num_frames, config.image_size, config.image_size))
    mask = tgmae.topk_mask(tgmae.tube_scores(size, config.grid), 0.6)
    return tgmae.normalize(video.byte()), mask, torch.randn(size, config.text_dim)


def losses(model, video, mask, text, amp=False):
    """Of a forward and a backward pass, on the model's device."""
    device = next(model.parameters()).device
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        out = model(video.to(device), mask, text.to(device))
    (out["mae"] + out["vt"]).backward()
    return torch.stack([out["mae"], out["vt"]]).detach().cpu()


@pytest.mark.parametrize("preset", ["toy", "small"])
def test_losses_and_gradients(preset):
    """In float64 to rounding; in float32 near that."""
    model = tgmae.TGMAE(tgmae.PRESETS[preset])
    single, (video, mask, text) = deepcopy(model).cuda(), batch(model.config)
    there = deepcopy(model).double().cuda()
    expected = losses(model.double(), video.double(), mask, text.double())
    found = losses(there, video.double(), mask, text.double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for a, b in zip(there.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-6, atol=1e-12)
    found = losses(single, video, mask, text).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_bf16_compiled_checkpointed():
    model = tgmae.TGMAE(tgmae.PRESETS["toy"]).cuda()
    data = batch(model.config)
    expected = losses(model, *data)
    torch.testing.assert_close(losses(model, *data, amp=True), expected, atol=0.02, rtol=0.02)
    less = deepcopy(model)
    runs.checkpoint_blocks(less)
    torch.testing.assert_close(losses(less, *data), expected, atol=1e-5, rtol=1e-5)
    model.encoder.compile()
    model.decoder.compile()
    torch.testing.assert_close(losses(model, *data), expected, atol=1e-4, rtol=1e-4)


def test_scores(world):
    """Text scores in bf16, as train.py computes them; the generator of noise is the CPU's."""
    c = tgmae.PRESETS["toy"]
    video, _, _ = batch(c)
    name = f"local-dir:{world / 'clip'}"
    scores = []
    for device in ("cpu", "cuda"):
        clip, tokenizer = tgmae.load_clip(name, device=device)
        text = tgmae.encode_text(clip, tokenizer, ["a red circle", "b", "c", "d"])
        scores.append(tgmae.text_scores(clip, video.to(device), text, c.patch_size, 2).cpu())
    torch.testing.assert_close(*scores, atol=2e-3, rtol=0)
    clip, tokenizer = weights.load_clip(name, None, "cuda")
    text = tgmae.encode_text(clip, tokenizer, ["a red circle", "b", "c", "d"])
    scores[1] = tgmae.text_scores(clip, video.cuda(), text, c.patch_size, 2).cpu()
    torch.testing.assert_close(*scores, atol=0.03, rtol=0)
    motion = torch.rand(2, 4, 9, 9)
    made = [
        tgmae.motion_scores(motion.to(device), c.grid, generator=torch.Generator().manual_seed(0))
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(made[1].cpu(), made[0], atol=1e-5, rtol=0)
