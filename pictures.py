"""All that is drawn of a clip or a run: reconstructions, heat and attention maps, the page that
holds them; the curves of a log."""

import base64
import io
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import tgmae

MASK_COLOURS = {"tube": "#1f77b4", "mgm": "#ff7f0e", "tgm": "#2ca02c"}  # matplotlib's C0, C1, C2


@torch.no_grad()
def reconstruct(video, mask, pred, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), pred (B,Nm,P) of TGMAE.forward, or None ->
    dict of videos (B,3,T,H,W) in [0,1]: `clip`, `masked` (in grey), and with pred `reconstructed`,
    in which masked cubes have their true mean and std put back, and `predicted`, in which they have
    not: 0.5 + pred/6."""
    c, sizes = config, (config.patch_size, config.tubelet_size)
    cubes = tgmae.patchify(tgmae.denormalize(video), *sizes)  # (B,N,P), pixels in [0,1]
    _, ids_mask = tgmae.split_mask(mask, video.device)
    ids_mask = ids_mask[..., None].expand(-1, -1, c.patch_dim)  # (B,Nm,P)
    volumes = {"clip": cubes, "masked": cubes.scatter(1, ids_mask, 0.5)}
    if pred is not None:
        _, mean, std = tgmae.reconstruction_target(video, mask, c)
        pixels = (pred.unflatten(-1, (-1, 3)) * std + mean).flatten(2)  # (B,Nm,P)
        volumes["reconstructed"] = cubes.scatter(1, ids_mask, pixels)
        volumes["predicted"] = cubes.scatter(1, ids_mask, 0.5 + pred / 6)
    back = {name: tgmae.unpatchify(cubes, c.grid, *sizes) for name, cubes in volumes.items()}
    return {name: video.clamp(0, 1) for name, video in back.items()}


def heat_map(scores, frames):
    """scores (t,h,w), frames (T,S,S,3) uint8 -> (T,S,S,3) uint8: dark where lowest, light where
    highest, over the grey frames."""
    value = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-12)
    value = F.interpolate(value[None, None].float().cpu(), frames.shape[:3])[0, 0]  # (T,S,S)
    colour = 255 * torch.from_numpy(colormaps["inferno"](value.numpy())[..., :3])
    return (0.65 * colour + 0.35 * frames.float().mean(-1, keepdim=True)).byte()


@torch.no_grad()
def attention_maps(model, video, layers):
    """video (1,3,T,S,S) -> (layers,N,N): how much each cube attends to each cube, the mean over
    heads, in the given layers (from 0) of the encoder. None is masked."""
    c, encoder, maps = model.config, model.encoder, {}
    x = encoder.patch_embed(tgmae.patchify(video, c.patch_size, c.tubelet_size))
    x = x + encoder.pos_embed  # (1,N,D)
    for layer, block in enumerate(encoder.blocks):
        y, attn = block.norm1(x)[0], block.attn  # (N,D)
        wq, wk, _ = attn.qkv.weight.chunk(3)
        if layer in layers:
            q = F.linear(y, wq, attn.q_bias).view(len(y), attn.num_heads, -1)  # (N,heads,D/heads)
            k = F.linear(y, wk).view_as(q)
            similarity = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            maps[layer] = similarity.softmax(-1).mean(0)  # (N,N)
        x = block(x)
    return torch.stack([maps[layer] for layer in layers])


def principal_components(tokens, config):
    """tokens (N,D) of a clip -> (T,S,S,3) uint8: their first three principal components as red,
    green and blue, each from its least to its greatest value. A sign is arbitrary: here the value
    farthest from the mean is positive."""
    x = tokens.float() - tokens.float().mean(0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:3]  # (3,D)
    values = x @ axes.T  # (N,3)
    values = values * values.gather(0, values.abs().argmax(0)[None]).sign()
    values = values - values.amin(0)
    values = values / values.amax(0).clamp(min=1e-12)
    c = config
    volume = values.T.reshape(1, 3, *c.grid)  # (1,3,t,h,w)
    return to_uint8(F.interpolate(volume, (c.num_frames, c.image_size, c.image_size)))


def mark(frames, query, config):
    """Draws a white box around cube number `query`."""
    _, h, w = config.grid
    p, first = config.patch_size, query // (h * w) * config.tubelet_size
    y, x = query // w % h * p, query % w * p
    for frame in frames[first : first + config.tubelet_size]:
        box = frame[y : y + p, x : x + p]
        box[[0, -1]] = box[:, [0, -1]] = 255
    return frames


def to_uint8(video):
    """(1,3,T,S,S) in [0,1] -> (T,S,S,3) uint8."""
    return video[0].permute(1, 2, 3, 0).clamp(0, 1).mul(255).round().byte().cpu()


def draw_page(rows, title="", side=112):
    """rows of (text, picture (S,S,3) uint8) -> a PIL image: each picture below its text, which runs
    on over the next ones where theirs is empty. A text that begins with a masker has its colour."""
    font, line, gap = ImageFont.load_default(14), 18, 4
    columns = max(map(len, rows))
    width = columns * (side + gap) + gap
    title = textwrap.wrap(title, width // 7)
    top = len(title) * line + gap
    page = Image.new("RGB", (width, top + len(rows) * (side + line + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 0), "\n".join(title), "black", font)
    for row, cells in enumerate(rows):
        for column, (text, picture) in enumerate(cells):
            x, y = gap + column * (side + gap), top + row * (side + line + gap)
            colour = MASK_COLOURS.get(text.split(" ")[0], "black")
            draw.text((x, y), text, colour, font)
            picture = Image.fromarray(picture.numpy()).resize((side, side), Image.NEAREST)
            page.paste(picture, (x, y + line))
    return page


def draw_samples(made, captions, mask, every=1):
    """made: of `reconstruct`; captions: of its clips, or []; mask: what to call it -> a page of
    every `every`th clip: at most 8 of its frames, the mask, the reconstruction."""
    rows = []
    for b in range(0, len(made["clip"]), every):
        said = f'"{captions[b]}"' if captions else "clip"
        for name, text in (("clip", said), ("masked", mask), ("reconstructed", "reconstruction")):
            if name in made:
                frames = to_uint8(made[name][b : b + 1])
                frames = frames[:: -(-len(frames) // 8)]
                rows.append(list(zip([text] + [""] * len(frames), frames)))
    return draw_page(rows)


def draw_sheet(panels, title):
    """panels [(name, frames (T,S,S,3) uint8), ...] -> a page: a row a panel, at most 8 frames."""
    every = -(-len(panels[0][1]) // 8)
    rows = [list(zip([name] + [""] * 7, frames[::every])) for name, frames in panels]
    return draw_page(rows, title)


def draw_animation(panels, title):
    """The same panels -> a page a frame, with at most 6 panels in a row."""
    for i in range(len(panels[0][1])):
        cells = [(name, frames[i]) for name, frames in panels]
        rows = [cells[first : first + 6] for first in range(0, len(cells), 6)]
        yield draw_page(rows, title, side=160)


def explore(clip, made, scores, attention, config, **about):
    """-> the text of pictures.html with a clip's numbers in it. clip (T,S,S,3) uint8; made: its
    `reconstructed` and `predicted`, or none; scores: (1,t,h,w) of each masker, of tgm
    (captions,t,h,w); attention (layers,N,N); about: title, captions, layers, and what the page
    begins with: mask, ratio, lowest."""

    def strip(frames):
        file, side_by_side = io.BytesIO(), torch.cat([*frames], 1)
        Image.fromarray(side_by_side.numpy()).save(file, "JPEG", quality=90, subsampling=0)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    e = 1 if config.num_patches <= 512 else 2  # attention of every e-th cube, in each direction
    some = attention.cpu().view(-1, *config.grid, *config.grid)[:, ::e, ::e, ::e, ::e, ::e, ::e]
    some = some.flatten(4, 6).flatten(1, 3)  # (layers,N,N)
    some = (255 * some / some.amax(2, keepdim=True)).round().byte().numpy()
    data = about | {
        "grid": config.grid,
        "tubelet": config.tubelet_size,
        "every": e,
        "colours": MASK_COLOURS,
        "pictures": {name: strip(frames) for name, frames in {"clip": clip, **made}.items()},
        "attention": [base64.b64encode(layer.tobytes()).decode() for layer in some],
        "scores": {mask: volume.flatten(1).tolist() for mask, volume in scores.items()},
    }
    template = Path(__file__).with_suffix(".html").read_text()
    text = json.dumps(data).replace("<", "\\u003c")  # a name may hold markup
    return template.replace(">{}<", f">{text}<")


def draw_losses(log):
    """log: the lines of a run's log.jsonl -> a Figure of its losses and held-out values over steps,
    with the learning rate in grey. Losses are means of a fiftieth of the steps; pale: each step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots(subplot_kw={"xlabel": "step"})
    right = left.twinx()
    for key, axes, look in (
        ("lr", right, {"color": "0.8"}),
        ("mae", left, {"color": "C0"}), ("vt", left, {"color": "C1"}),
        ("loss", left, {"color": "C0"}), ("val_mae", left, {"color": "C0", "marker": "o"}),
        ("val_vt", left, {"color": "C1", "marker": "o"}),
        ("val top-1", left, {"color": "C2", "marker": "o"}),
    ):  # fmt: skip
        points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points)
        width = len(points) // 50
        if key in ("mae", "vt", "loss") and width > 1:
            axes.plot(steps, values, linewidth=1, alpha=0.3, **look)
            steps = steps[width // 2 :][: len(steps) - width + 1]
            values = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(steps, values, label=key, linewidth=1, markersize=3, **look)
    left.set_ylabel("loss")
    right.set_ylabel("learning rate", color="0.6")
    left.set_zorder(right.get_zorder() + 1)  # losses above the rate
    left.patch.set_visible(False)
    left.legend(frameon=False)
    return figure
