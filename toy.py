"""An offline world on which text-guided masking can be seen, measured and trained in minutes.

    python toy.py                          # builds data/toy: 1000 H.264 clips and a tiny CLIP
    python toy.py --out /tmp/w --clips 64  # a smaller one: 64 training clips and 16 test clips
    python toy.py coverage                 # what does each masker hide? (the README's table)
    python toy.py table2 --seeds 3         # the paper's Table 2; ablate ratio|..., figure4 alike

Each clip shows an ACTOR (shape x colour x direction) that its three captions name, and a DISTRACTOR
that they do not, over a textured background that pans faster than either: what moves most is not
what the caption names. Mostly the camera follows the actor, and the light tells the shape. The
class, shape x direction of the actor (16), needs the video; distractors have shapes that no class
uses. A tiny CLIP (open_clip's own class, opened with local-dir:) is trained on captioned crops.
Everything follows from the seed; two CPU cores take a minute."""

import argparse
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F

import dataset
import tgmae
from train import (
    last_line,
    one_line_errors,
    progress,
    replacing,
)

SIZE, FRAMES, FPS = 64, 24, 12
TELLING = (
    0.9  # share of clips whose camera follows the actor, and of clips lit from their shape's corner
)
ACTORS = ("circle", "square", "triangle", "cross")
DISTRACTORS = ("ring", "star", "diamond")
COLOURS = {
    "red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
    "yellow": (235, 215, 40), "magenta": (215, 50, 205), "cyan": (50, 210, 215),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAPTIONS = (
    "a {colour} {shape} moving {direction}",
    "the {colour} {shape} goes {direction}",
    "a {shape} in {colour} drifts {direction}",
)
NOTHING = (
    "an empty textured background",
    "the background with nothing on it",
    "a plain grey pattern",
)


# =================================================================================================
# The world: a random generator -> frames, masks, words.
# =================================================================================================


def _distance(shape, x, y, r):
    """Signed distance in pixels, roughly, to the outline of a shape of radius r; negative
    inside."""
    d, ax, ay = np.hypot(x, y), abs(x), abs(y)
    if shape == "circle":
        return d - r
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * r
    if shape == "triangle":  # tip up at y = -r, its centroid at (0, 0)
        return np.maximum(0.89 * ax - 0.45 * y, y) - 0.5 * r
    if shape == "cross":
        return np.minimum(np.maximum(ax - 0.38 * r, ay - r), np.maximum(ay - 0.38 * r, ax - r))
    if shape == "ring":
        return abs(d - 0.75 * r) - 0.28 * r
    if shape == "star":
        return d - r * (0.68 + 0.32 * np.cos(5 * np.arctan2(x, -y)))
    return (ax + ay) * 0.71 - 0.8 * r  # diamond


def _path(rng, direction, r):
    """(F,2) centres of an object that crosses the frame in a straight line and stays in it."""
    step = np.array(DIRECTIONS[direction]) * rng.uniform(1.0, 1.3)
    way = step * (FRAMES - 1)
    low, high = r + 1 - np.minimum(way, 0), SIZE - r - 1 - np.maximum(way, 0)
    return (rng.uniform(low, high) + step * np.arange(FRAMES)[:, None]).astype(np.float32)


def _background(rng, label, y, x):
    """(F,S,S,3): long waves in two greyish tones, long and strong, so that a tiny model learns in
    minutes to predict what is masked. They pan by 5 to 6.5 pixels a frame, faster than any object.

    As in real video the scene tells of the action, in most clips: the camera follows the actor, and
    each shape is lit from a corner of its own. Else a text-guided mask, which hides the actor,
    would leave nothing to learn from its caption."""
    (dx, dy), speed = list(DIRECTIONS.values())[label % 4], rng.uniform(5, 6.5)
    follows, own_light = rng.random(2) < TELLING
    angle = np.arctan2(dy, dx) + rng.normal(0, 0.25) if follows else rng.uniform(0, 2 * np.pi)
    lamp = label // 4 if own_light else rng.integers(len(ACTORS))
    bottom, right = divmod(int(lamp), 2)
    near = np.exp(-((x - right * SIZE) ** 2 + (y - bottom * SIZE) ** 2) / (2 * 30**2))  # (S,S)
    shift = np.float32(speed) * np.arange(FRAMES, dtype=np.float32)[:, None, None]
    x, y = x + shift * np.cos(angle), y + shift * np.sin(angle)
    wave = 0.5
    for turn in (rng.uniform(-0.5, 0.5), rng.uniform(1.0, 2.1)):  # one along the way, one across
        length, phase = rng.uniform(96, 160), rng.uniform(0, 2 * np.pi)
        along = x * np.cos(angle + turn) + y * np.sin(angle + turn)
        wave = wave + np.sin(2 * np.pi * along / length + phase) / 4  # (F,S,S) in 0..1
    dark, light = (
        rng.uniform(15, 45) + rng.uniform(-15, 15, 3),
        rng.uniform(210, 240) + rng.uniform(-15, 15, 3),
    )
    return ((dark + wave[..., None] * (light - dark)) * (0.5 + 0.5 * near[..., None])).astype(
        np.float32
    )


def make_clip(rng, label):
    """-> frames (F,64,64,3) uint8, actor and distractor masks (F,64,64) bool, what each is
    called."""
    shape, direction = ACTORS[label // 4], list(DIRECTIONS)[label % 4]
    colour, other = rng.choice(list(COLOURS), 2, replace=False)
    radius, other_radius = rng.uniform(12, 14), rng.uniform(7, 9)
    path = _path(rng, direction, radius)
    distractor = {
        "shape": str(rng.choice(DISTRACTORS)),
        "colour": str(other),
        "direction": str(rng.choice(list(DIRECTIONS))),
    }
    tries = [_path(rng, distractor["direction"], other_radius) for _ in range(30)]
    other_path = max(
        tries, key=lambda way: np.linalg.norm(way - path, axis=1).min()
    )  # the least overlap

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    frames, masks = _background(rng, label, y, x), []
    objects = (distractor["shape"], other, other_radius, other_path), (shape, colour, radius, path)
    for shape_, colour_, r, way in objects:  # the actor in front
        dx, dy = x - way[:, 0, None, None], y - way[:, 1, None, None]
        alpha = np.clip(0.5 - _distance(shape_, dx, dy, r), 0, 1)[..., None]
        shade = 1.05 - 0.5 * (np.hypot(dx + 3, dy + 3) / r)[..., None]  # lit from the upper left
        frames = frames * (1 - alpha) + alpha * np.clip(
            np.array(COLOURS[colour_], np.float32) * shade, 0, 255
        )
        masks = [mask & (alpha[..., 0] < 0.5) for mask in masks] + [alpha[..., 0] >= 0.5]
    actor = {"shape": shape, "colour": str(colour), "direction": direction}
    return frames.round().clip(0, 255).astype(np.uint8), masks[1], masks[0], actor, distractor


def captions_of(words):
    return [caption.format(**words) for caption in CAPTIONS]


def write_video(path, frames, *, fps=FPS, codec="libx264", options=None):
    """(F,H,W,3) uint8 -> a video file, H.264 unless another codec is named."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # the same file on every machine
        stream.options = {"crf": "15", "g": "12", "bf": "0"} if options is None else options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# =================================================================================================
# A tiny CLIP, trained on captioned crops of that world.
# =================================================================================================

CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 64,
            "layers": 2,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def _crops(rng, stills, count):
    """Random boxes, half of them patches of 8 pixels -> images (count,3,16,16) in [0,1], captions,
    and groups (count,): crops that show the same thing."""
    images, captions, groups = [], [], []
    names = [None, *((shape, colour) for shape in ACTORS + DISTRACTORS for colour in COLOURS)]
    for number in rng.integers(len(stills), size=count):
        frame, actor_mask, distractor_mask, actor, distractor = stills[number]
        side = 8 if rng.random() < 0.5 else int(rng.integers(8, SIZE + 1))
        top, left = rng.integers(SIZE - side + 1, size=2)
        box = np.s_[top : top + side, left : left + side]
        # How much of the crop each fills, or how much of each is in the crop, whichever is more.
        seen = [
            max(mask[box].mean(), mask[box].sum() / 300) for mask in (actor_mask, distractor_mask)
        ]
        words = (actor, distractor)[int(seen[1] > seen[0])] if max(seen) > 0.25 else None
        image = (
            torch.from_numpy(np.ascontiguousarray(frame[box])).permute(2, 0, 1)[None].float() / 255
        )
        images.append(
            F.interpolate(image, (16, 16), mode="bicubic", align_corners=False, antialias=side > 16)
        )
        captions.append(str(rng.choice(captions_of(words) if words else NOTHING)))
        groups.append(names.index((words["shape"], words["colour"]) if words else None))
    return torch.cat(images).clamp(0, 1), captions, torch.tensor(groups)


def _paraphrases(rng, count):
    """Two different captions of the same words, `count` times, and groups (count,): what they
    say."""
    shapes, colours, directions = ACTORS + DISTRACTORS, list(COLOURS), list(DIRECTIONS)
    chosen = np.stack(
        [rng.integers(len(kind), size=count) for kind in (shapes, colours, directions)], 1
    )
    words = [
        {"shape": shapes[s], "colour": colours[c], "direction": directions[d]} for s, c, d in chosen
    ]
    pairs = [rng.choice(captions_of(word), 2, replace=False).tolist() for word in words]
    return [a for a, _ in pairs], [b for _, b in pairs], torch.from_numpy(chosen @ [1, 10, 100])


def train_clip(folder, stills, *, seed=0, steps=300, batch=192):
    """Trains open_clip's CLIP class at toy size and saves it as a folder that local-dir: opens.

    Captions are told apart from each other, too: a still does not show a direction, but CLIP's text
    encoder, which has read more than it has seen, does not confuse left and right."""
    from open_clip import CLIP, SimpleTokenizer
    from safetensors.torch import save_file

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP(**CLIP_CONFIG["model_cfg"])
    tokenizer = SimpleTokenizer(
        context_length=CLIP_CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )
    mean, std = (
        torch.tensor(CLIP_CONFIG["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std")
    )
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    bar = progress(range(steps), desc="toy CLIP", unit="step")
    for _ in bar:
        images, captions, groups = _crops(rng, stills, batch)
        image, text = (
            clip.encode_image((images - mean) / std),
            clip.encode_text(tokenizer(captions)),
        )
        loss = tgmae.info_nce(image, text, 0.07, groups=groups)
        one, other, groups = _paraphrases(rng, batch // 2)
        one, other = clip.encode_text(tokenizer(one + other)).chunk(2)
        loss = loss + tgmae.info_nce(one, other, 0.07, groups=groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")


# =================================================================================================
# Building it, once.
# =================================================================================================


def _clip_of(out, seed, clips, number):
    """Makes clip `number` and writes its file -> its manifest record, and 3 stills (training clips)
    or the packed masks (test clips). A function of its arguments alone, whichever thread runs
    it."""
    split = "train" if number < clips else "test"
    rng = np.random.default_rng([seed, number])
    frames, actor_mask, distractor_mask, actor, distractor = make_clip(rng, number % 16)
    video = f"clips/{split}-{number:05d}.mp4"
    write_video(out / video, frames)
    record = {
        "video": video,
        "label": f"{actor['shape']} {actor['direction']}",
        "split": split,
        "captions": captions_of(actor),
        "distractor_captions": captions_of(distractor),
    }
    if split == "test":
        return record, np.packbits(np.stack([actor_mask, distractor_mask]))
    some = rng.choice(FRAMES, 3, replace=False)
    return record, [(frames[i], actor_mask[i], distractor_mask[i], actor, distractor) for i in some]


def _build(out, clips, seed, clip_steps):
    records, stills, truth = [], [], {}
    (out / "clips").mkdir()
    total = clips + clips // 4
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy and x264 let go of the interpreter
        made = pool.map(functools.partial(_clip_of, out, seed, clips), range(total))
        for record, extra in progress(made, desc="toy world", unit="clip", total=total):
            records.append(record)
            if record["split"] == "train":
                stills += extra
            else:
                truth[record["video"]] = extra
    (out / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.savez_compressed(out / "truth.npz", **truth)
    train_clip(out / "clip", stills, seed=seed, steps=clip_steps)


def build(out="data/toy", clips=800, seed=0, clip_steps=300):
    """Makes the world in folder `out` unless it is there: manifest.jsonl, clips/, clip/ (the CLIP)
    and truth.npz (masks of the test split). `clips` training clips and a quarter as many test
    clips; `clip_steps` steps of the CLIP's training.

    Built beside and renamed at the end, so that an interrupted build never looks finished."""
    out = Path(out)
    if (out / "world.json").exists():
        return out
    if out.exists():
        raise ValueError(f"{out}: exists and is not a toy world; name another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _build(work, clips, seed, clip_steps)
        (work / "world.json").write_text(json.dumps({"clips": clips, "seed": seed}))
        work.chmod(0o755)
        os.rename(work, out)
    except OSError:
        if not (out / "world.json").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def read_truth(folder):
    """{video: (actor, distractor) masks (F,64,64) bool} of the test split."""
    with np.load(Path(folder) / "truth.npz", allow_pickle=False) as truth:
        return {
            video: np.unpackbits(truth[video]).reshape(2, FRAMES, SIZE, SIZE).astype(bool)
            for video in truth.files
        }


# =================================================================================================
# What does each masker hide? The mask follows the words, measured against the drawn truth.
# =================================================================================================


def auc(positive, negative):
    """Area under the ROC curve: how often a score of `positive` lies above one of `negative`."""
    scores = torch.cat([positive, negative]).double()
    rank = torch.empty_like(scores)
    rank[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    n = len(positive)
    return ((rank[:n].sum() - n * (n + 1) / 2) / (n * len(negative))).item()


def coverage(folder="data/toy", mask_ratio=0.25, clips=200, stride=4):
    """-> {masker: (share of the actor's area masked, share of the distractor's)}, and the ROC AUC
    of the caption's similarity for cubes of the actor against cubes of the distractor and of the
    background."""
    config, folder = tgmae.PRESETS["toy"], Path(folder)
    t, h, w = config.grid
    records = dataset.read_manifest(folder / "manifest.jsonl", "test")[:clips]
    truth = read_truth(folder)
    numbers = [i * stride for i in range(config.num_frames)]
    videos, motions, masks = [], [], []
    for record in records:
        frames, motion = dataset.read_clip(record["path"], numbers, motion=True)
        videos.append(frames.permute(3, 0, 1, 2))
        motions.append(motion)
        masks.append(torch.from_numpy(truth[record["video"]][:, numbers]))
    video, B = tgmae.normalize(torch.stack(videos)), len(records)
    area = torch.stack(masks).float().flatten(0, 1)  # (2B,T,S,S)
    area = tgmae.patchify(area[:, None], config.patch_size, config.tubelet_size).mean(-1)
    actor, distractor = area.view(B, 2, t, h, w).unbind(1)  # share of each cube that it fills

    clip = tgmae.load_clip(f"local-dir:{folder / 'clip'}")
    size = config.patch_size, config.tubelet_size
    words, others = (
        tgmae.text_scores(
            clip[0],
            video,
            tgmae.encode_text(*clip, [r[key][i % 3] for i, r in enumerate(records)]),
            *size,
        )
        for key in ("captions", "distractor_captions")
    )
    generator = torch.Generator().manual_seed(0)
    table = {}
    for name, scores, bottom_k in (
        ("text", words, False), ("text, the distractor's words", others, False),
        ("text, bottom-k", words, True),
        ("tube", tgmae.tube_scores(B, config.grid, generator=generator), False),
        ("motion", tgmae.motion_scores(torch.stack(motions), config.grid), False),
    ):  # fmt: skip
        mask = tgmae.topk_mask(scores, mask_ratio, bottom_k=bottom_k, generator=generator).view(
            B, t, h, w
        )
        table[name] = tuple(
            (mask * part).sum().item() / part.sum().item() for part in (actor, distractor)
        )
    of_actor = words[actor > 0.5]
    aucs = (
        auc(of_actor, words[(distractor > 0.25) & (actor == 0)]),
        auc(of_actor, words[(actor == 0) & (distractor == 0)]),
    )
    return table, aucs


def print_coverage(folder, mask_ratio):
    table, aucs = coverage(folder, mask_ratio)
    print(
        f"| masker, ratio {mask_ratio:g} | actor masked | distractor masked |\n| --- | --- | --- |"
    )
    for name, (actor, distractor) in table.items():
        print(f"| {name} | {actor:.1%} | {distractor:.1%} |")
    print(
        f"ROC AUC of the similarity, actor against distractor {aucs[0]:.4f}, against background "
        f"{aucs[1]:.4f}"
    )


# =================================================================================================
# The paper's Table 2, its smaller ablations and its Figure 4 on this world. A row is a run of
# train.py, then of eval.py linear, retrieve and finetune; a row that several of them share runs
# once.
# =================================================================================================


class Row(NamedTuple):
    """A way to pre-train. `flags` are more of train.py's."""

    mask: str
    loss: str = "MAE + VT"
    flags: tuple = ()
    captions: str = "frames"  # of CAPTION_SOURCES

    @property
    def name(self):  # of its folder
        words = " ".join([self.mask, self.loss, *map(str, self.flags), self.captions])
        return re.sub("[^a-z0-9.]+", "-", words.lower())


MASKS = "tube", "mgm", "tgm"
LOSSES = {"MAE": [], "VT": ["--vt", "--no-mae"], "MAE + VT": ["--vt"]}
UNTRAINED = Row("tube", "MAE", ("--epochs", 1, "--warmup-epochs", 0, "--blr", 0, "--min-lr", 0))
TABLE2 = {"random weights": UNTRAINED} | {
    f"{mask}, {loss}": Row(mask, loss)
    for mask in MASKS for loss in LOSSES if (mask, loss) != ("tgm", "VT")
}  # fmt: skip
ABLATIONS = {
    "ratio": {
        f"tgm at {ratio}": Row("tgm", flags=("--mask-ratio", ratio) if ratio != 0.6 else ())
        for ratio in (0.3, 0.45, 0.6, 0.75, 0.9)
    },
    "bottom-k": {"tgm, highest": Row("tgm"), "tgm, lowest": Row("tgm", flags=("--bottom-k",)),
                 "tube": Row("tube")},
    "num-captions": {"3 captions": Row("tgm"),
                     "1 caption": Row("tgm", flags=("--num-captions", 1))},
    "caption-source": {
        "of clips": Row("tgm"), "class name": Row("tgm", captions="label"),
        "of the class": Row("tgm", captions="llm"),
        "of clips and of the class": Row("tgm", captions="frames-llm"),
        "of stills": Row("tgm", captions="stills"), "of clips; tube, VT": Row("tube", "VT"),
        "of stills; tube, VT": Row("tube", "VT", captions="stills"),
    },
}  # fmt: skip
FIGURE4 = {
    f"{mask}, {title}": Row(mask, loss)
    for mask in MASKS for title, loss in (("optimised", "MAE + VT"), ("watched", "MAE"))
}  # fmt: skip
STAGES = "train", "linear", "retrieve", "finetune"
COLUMNS = {"linear": "linear probe", "finetune": "fine-tuned", "retrieve": "retrieval R@1"}
# What stands for the paper's: BLIP-2, the oracle, GPT-3.5, BLIP-2 + GPT-3.5 (Figure 5); and stills.
CAPTION_SOURCES = {
    "frames": lambda record: record["captions"],
    "label": lambda record: [record["label"]],
    "llm": lambda record: [
        caption.replace(" in {colour}", "").replace("{colour} ", "").format(shape=shape,
            direction=direction)
        for shape, direction in [record["label"].split()] for caption in CAPTIONS
    ],
    "frames-llm": lambda record: CAPTION_SOURCES["frames"](record) + CAPTION_SOURCES["llm"](record),
    "stills": lambda record: [caption.rsplit(" ", 2)[0] for caption in record["captions"]],
     # which show no direction
}  # fmt: skip


class Experiments:
    """Runs rows, some side by side: on a CPU one a core with one thread each, which is nearly twice
    as fast as one after the other with two. Stages that have ended stay as they are:
    --runs/ROW-SEED/stages.jsonl."""

    def __init__(self, args):
        self.args, self.running, self.stopped = args, set(), False
        self.runs, self.gpu = args.runs.absolute(), torch.cuda.is_available()
        self.jobs = args.jobs or (1 if self.gpu else os.cpu_count())
        self.settings = {"epochs": args.epochs, **json.loads((args.out / "world.json").read_text())}

    def folder(self, row, seed):
        return self.runs / f"{row.name}-seed{seed}"

    def ended(self, row, seed):
        """{stage: seconds} of what has ended. A folder of other --epochs or another world:
        ValueError."""
        path = self.folder(row, seed) / "stages.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        if any(line["of"] != self.settings for line in lines):
            raise ValueError(
                f"{path.parent}: of another world or --epochs; another --runs, or remove it"
            )
        return {line["stage"]: line["seconds"] for line in lines}

    def make_world(self, source):
        """runs/worlds/SOURCE, in which data/toy is the world with captions of that source."""
        data = self.runs / "worlds" / source / "data" / "toy"
        data.mkdir(parents=True, exist_ok=True)
        for path in self.args.out.absolute().iterdir():
            if path.name != "manifest.jsonl" and not (data / path.name).is_symlink():
                (data / path.name).symlink_to(path)
        lines = []
        for record in map(json.loads, (self.args.out / "manifest.jsonl").read_text().splitlines()):
            record.pop("maps", None)  # of other captions: every row asks CLIP itself
            lines.append(json.dumps(record | {"captions": CAPTION_SOURCES[source](record)}) + "\n")
        with replacing(data / "manifest.jsonl", "w") as file:
            file.write("".join(lines))

    def run(self, row, seed, stages):
        """The stages of a row that have not ended yet."""
        folder, ended = self.folder(row, seed), self.ended(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        epochs = ["--epochs", self.args.epochs, "--warmup-epochs", 0] if self.args.epochs else []
        flags = {
            "train": ["--mask", row.mask, *LOSSES[row.loss], *epochs, *row.flags, "--out", folder],
            "linear": ["--no-random"],
            "retrieve": ["--no-random"],
            "finetune": ["--out", folder / "finetune", *epochs],
        }
        for stage in [stage for stage in stages if stage not in ended]:
            command = ["train.py"]
            if stage != "train":
                command = ["eval.py", stage, folder / "last.pt", "--json", folder / f"{stage}.json"]
            began = time.monotonic()
            self.call(
                [*command, *flags[stage], "--seed", seed], row.captions, folder / f"{stage}.log"
            )
            line = {
                "stage": stage,
                "seconds": round(time.monotonic() - began, 1),
                "of": self.settings,
            }
            with open(folder / "stages.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.update()

    def call(self, command, source, log):
        script, *flags = map(str, command)
        threads = {} if self.gpu else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // self.jobs))}
        with open(log, "a") as file:
            process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name(script), *flags],
                cwd=self.runs / "worlds" / source,
                env=os.environ | threads,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            self.running.add(process)
            if self.stopped:  # between two stages, while the others were told to stop
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        if code:
            reason = last_line(log.read_text() or "no output")
            raise ValueError(f"{log}: {script} ended with exit code {code}: {reason}")

    def go(self, rows, stages, report):
        """All rows, seed after seed; report() after each."""
        for source in {row.captions for row in rows}:
            self.make_world(source)
        todo = [(row, seed, stages) for seed in range(self.args.seeds) for row in rows]
        total = len(todo) * len(stages)
        done = sum(len(set(stages) & set(self.ended(row, seed))) for row, seed, _ in todo)
        if done:
            print(
                f"{done} of {total} stages are there already, made by the code as it was: "
                f"{self.runs}"
            )
        self.bar = progress(total=total, initial=done, unit="stage", smoothing=0)
        with self.bar, ThreadPoolExecutor(self.jobs) as pool:
            try:
                for job in as_completed([pool.submit(self.run, *what) for what in todo]):
                    job.result()
                    report()
            except (
                BaseException
            ):  # an interrupt, too: what runs saves and stops, what waits is given up
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.terminate()
                raise

    def found(self, row, seed, stages):
        """What a row whose stages have all ended has come to: shares of the test clips, the
        contrastive loss of each epoch, seconds; None before that."""
        folder, seconds = self.folder(row, seed), self.ended(row, seed)
        if not set(stages) <= set(seconds):
            return None
        found, epochs = {}, {}
        for stage, key in (("linear", "top-1"), ("finetune", "top-1"), ("retrieve", "R@1")):
            if stage in stages:
                found[stage] = round(
                    json.loads((folder / f"{stage}.json").read_text())["rows"][0][key], 4
                )
        for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
            epochs.setdefault(line["epoch"], []).append(line["vt"])
        vt = [round(statistics.fmean(losses), 4) for losses in epochs.values()]
        return found | {"vt": vt, "seconds": {stage: seconds[stage] for stage in stages}}


def save_plot(path, plot, log):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}  # words stay words
    with plt.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = plot(plt, log)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)


def compare(args, name, rows, stages, table, plot):
    """Runs the rows ({title: Row}); leaves NAME.jsonl (a line a row and seed), NAME.md and
    NAME.svg."""
    experiments, folder = Experiments(args), args.report or args.runs
    device = (
        torch.cuda.get_device_name()
        if experiments.gpu
        else f"{os.cpu_count()} {platform.machine()} cores"
    )
    how = (
        f"`python toy.py {' '.join(sys.argv[1:])}`; {device}, Python {platform.python_version()}, "
    )
    how += f"torch {torch.__version__}, {date.today()}."

    def report():
        log = [
            {"row": title, "seed": seed, **found}
            for title, row in rows.items()
            for seed in range(args.seeds)
            if (found := experiments.found(row, seed, stages))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        lines = table(name, log)
        (folder / f"{name}.md").write_text("\n".join([*lines, "", how, ""]))
        save_plot(folder / f"{name}.svg", plot, log)
        return lines

    experiments.go(rows.values(), stages, report)
    print("\n".join(report()))


def by_row(log, key):
    """{title: [what each seed has there, ...]}."""
    rows = {}
    for line in log:
        rows.setdefault(line["row"], []).append(line[key])
    return rows


def mean_std(values, digits):
    """Mean ± sample standard deviation; of a single value, the value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def share_table(name, log):
    lines = [
        f"| {name} | {' | '.join(COLUMNS.values())} | seeds |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for title, seeds in by_row(log, "seed").items():
        values = [[100 * share for share in by_row(log, column)[title]] for column in COLUMNS]
        lines.append(
            f"| {title} | {' | '.join(mean_std(part, 1) for part in values)} | {len(seeds)} |"
        )
    return lines


def share_plot(plt, log):
    """A dot a seed, a line at their mean."""
    titles = list(by_row(log, "seed"))
    figure, panels = plt.subplots(
        1, len(COLUMNS), sharey=True, figsize=(9, 0.8 + 0.27 * len(titles))
    )
    for panel, (column, label) in zip(panels, COLUMNS.items()):
        for place, shares in enumerate(by_row(log, column).values()):
            values = [100 * share for share in shares]
            panel.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
            panel.plot(
                [statistics.fmean(values)],
                [place],
                "|",
                color="C3",
                markersize=13,
                markeredgewidth=2,
            )
        panel.set(xlabel=f"{label}, %", yticks=range(len(titles)), yticklabels=titles)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure


def curve_table(name, log):
    lines = ["| contrastive loss | first epoch | last epoch | seeds |", "| --- | --- | --- | --- |"]
    for title, runs in by_row(log, "vt").items():
        first, last = (mean_std([run[i] for run in runs], 2) for i in (0, -1))
        lines.append(f"| {title} | {first} | {last} | {len(runs)} |")
    return lines


def curve_plot(plt, log):
    """A line a seed; dashed where the loss is only watched."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for title, runs in by_row(log, "vt").items():
        row = FIGURE4[title]
        style = {
            "color": f"C{MASKS.index(row.mask)}",
            "linestyle": "-" if "VT" in row.loss else "--",
        }
        for i, run in enumerate(runs):
            axes.plot(range(1, len(run) + 1), run, label=None if i else title, alpha=0.8, **style)
    chance, right = (
        math.log(16),
        axes.get_yaxis_transform(),
    )  # of the 16 captions in a batch of the toy preset
    axes.axhline(chance, color="0.6", linewidth=0.8)
    axes.text(1, chance, "chance", color="0.4", transform=right, ha="right", va="bottom")
    axes.set(xlabel="epoch", ylabel="contrastive loss (VT)")
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Make the toy world, measure on it what each masker hides, or run the paper's "
        "comparisons on it."
    )
    add = parser.add_argument
    commands = "build", "coverage", "table2", "ablate", "figure4"
    add("command", nargs="?", default="build", choices=commands, help="default: build")
    add("ablation", nargs="?", choices=ABLATIONS, help="for ablate")
    add(
        "--out", type=Path, default=Path("data/toy"), help="folder of the world (default: data/toy)"
    )
    add(
        "--clips",
        type=int,
        default=800,
        help="training clips; a quarter as many test clips (default: 800)",
    )
    add("--seed", type=int, default=0, help="of everything in the world (default: 0)")
    add("--mask-ratio", type=float, default=0.25, help="of coverage (default: 0.25)")
    add("--seeds", type=int, default=3, help="runs of each row, with seeds 0, 1, ... (default: 3)")
    add(
        "--runs",
        type=Path,
        default=Path("runs/toy"),
        help="folder of the rows' runs (default: runs/toy)",
    )
    add("--report", type=Path, help="folder of table, plot and their log (default: that of --runs)")
    add(
        "--jobs",
        type=int,
        default=0,
        help="rows at a time (default: one a CPU core; with a GPU one)",
    )
    add(
        "--epochs",
        type=int,
        default=0,
        help="of both trainings (default: train.py's, eval.py's own)",
    )
    args = parser.parse_args(argv)
    if args.clips < 16:
        parser.error(f"--clips {args.clips}: at least 16, one a class")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    if (args.command == "ablate") != bool(args.ablation):
        several = ", ".join(ABLATIONS)
        parser.error(
            f"{args.command} {args.ablation or ''}: ablate takes one of {several}, other commands "
            "none"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("toy.py", "fewer --jobs"):
        build(args.out, args.clips, args.seed)
        if args.command == "build":
            made = json.loads((args.out / "world.json").read_text())
            print(f"{args.out}: a world of {made['clips']} training clips, seed {made['seed']}")
            if made != {"clips": args.clips, "seed": args.seed}:
                raise ValueError(
                    f"{args.out}: is there already; another --out, or remove it, for another world"
                )
        elif args.command == "coverage":
            print_coverage(args.out, args.mask_ratio)
        elif args.command == "table2":
            compare(args, "table2", TABLE2, STAGES, share_table, share_plot)
        elif args.command == "ablate":
            compare(args, args.ablation, ABLATIONS[args.ablation], STAGES, share_table, share_plot)
        elif args.command == "figure4":
            compare(args, "figure4", FIGURE4, STAGES[:1], curve_table, curve_plot)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that what it started is stopped, too
    main()
