"""An offline world on which text-guided masking can be seen, measured and trained in minutes.

    python toy.py                              # builds data/toy: 1000 H.264 clips, a tiny CLIP
    python toy.py --out data/small --clips 64  # a smaller one: 64 training and 16 test clips
    python toy.py coverage                     # what does each masker hide? (docs/results.md)
    python toy.py table2 --seeds 3             # the paper's Table 2; ablate ratio, figure4, ...

Each clip shows an ACTOR (shape x colour x direction) that its three captions name, and a DISTRACTOR
that they do not, over a textured background that pans faster than either: what moves most is not
what the caption names. Mostly the camera follows the actor, and the light tells the shape. The
class, shape x direction of the actor (16), needs the video; distractors have shapes that no class
uses. A tiny CLIP (open_clip's own class, opened with local-dir:) is trained on captioned crops.
Everything follows from the seed; two CPU cores take a minute."""

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
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F

import dataset
import runs
import tgmae
from dataset import UserError

SIZE, FRAMES, FPS = 64, 24, 12
# Share of clips whose camera follows the actor, and of clips lit from their shape's corner.
TELLING = 0.9
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
    "an empty textured background", "the background with nothing on it", "a plain grey pattern",
)  # fmt: skip


# ==== The world: a random generator -> frames, masks, words =======================================
def _distance(shape, x, y, r):
    """Signed distance in pixels, roughly, to a shape's outline; negative inside. r: its radius."""
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
    dark = rng.uniform(15, 45) + rng.uniform(-15, 15, 3)
    light = rng.uniform(210, 240) + rng.uniform(-15, 15, 3)
    lit = (dark + wave[..., None] * (light - dark)) * (0.5 + 0.5 * near[..., None])
    return lit.astype(np.float32)


def make_clip(rng, label):
    """-> frames (F,64,64,3) uint8, actor and distractor masks (F,64,64) bool, the words of each."""
    shape, direction = ACTORS[label // 4], list(DIRECTIONS)[label % 4]
    colour, other_colour = map(str, rng.choice(list(COLOURS), 2, replace=False))
    radius, other_radius = rng.uniform(12, 14), rng.uniform(7, 9)
    path = _path(rng, direction, radius)
    other_shape, other_direction = str(rng.choice(DISTRACTORS)), str(rng.choice(list(DIRECTIONS)))
    tries = [_path(rng, other_direction, other_radius) for _ in range(30)]
    # The least overlap.
    other_path = max(tries, key=lambda way: np.linalg.norm(way - path, axis=1).min())
    actor = {"shape": shape, "colour": colour, "direction": direction}
    distractor = {"shape": other_shape, "colour": other_colour, "direction": other_direction}

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    frames, masks = _background(rng, label, y, x), []
    for words, r, way in (distractor, other_radius, other_path), (actor, radius, path):
        dx, dy = x - way[:, 0, None, None], y - way[:, 1, None, None]
        alpha = np.clip(0.5 - _distance(words["shape"], dx, dy, r), 0, 1)[..., None]
        shade = 1.05 - 0.5 * (np.hypot(dx + 3, dy + 3) / r)[..., None]  # lit from the upper left
        paint = np.clip(np.array(COLOURS[words["colour"]], np.float32) * shade, 0, 255)
        frames = frames * (1 - alpha) + alpha * paint
        # What comes later, the actor, hides what was there.
        masks = [mask & (alpha[..., 0] < 0.5) for mask in masks] + [alpha[..., 0] >= 0.5]
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


# ==== A tiny CLIP, trained on captioned crops of that world =======================================
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2,
                       "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2,
                     "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073],
                       "std": [0.26862954, 0.26130258, 0.27577711]},
}  # fmt: skip


def _crops(rng, stills, count):
    """Random boxes, half of them patches of 8 pixels -> images (count,3,16,16) in [0,1], captions,
    and groups (count,): crops that show the same thing."""
    boxes, captions, groups = [], [], []
    names = [None, *((shape, colour) for shape in ACTORS + DISTRACTORS for colour in COLOURS)]
    for number in rng.integers(len(stills), size=count):
        frame, *masks, actor, distractor = stills[number]
        side = 8 if rng.random() < 0.5 else int(rng.integers(8, SIZE + 1))
        top, left = rng.integers(SIZE - side + 1, size=2)
        box = np.s_[top : top + side, left : left + side]
        # How much of the crop each fills, or how much of each is in the crop, whichever is more.
        seen = [max(mask[box].mean(), mask[box].sum() / 300) for mask in masks]
        words = (actor, distractor)[int(seen[1] > seen[0])] if max(seen) > 0.25 else None
        boxes.append(frame[box])
        captions.append(str(rng.choice(captions_of(words) if words else NOTHING)))
        groups.append(names.index((words["shape"], words["colour"]) if words else None))
    images, sides = torch.empty(count, 3, 16, 16), np.array([len(box) for box in boxes])
    for side in np.unique(sides):
        alike = np.flatnonzero(sides == side)
        image = torch.from_numpy(np.stack([boxes[i] for i in alike])).movedim(-1, 1).float() / 255
        images[alike] = F.interpolate(image, (16, 16), mode="bicubic", antialias=bool(side > 16))
    return images.clamp(0, 1), captions, torch.tensor(groups)


def _paraphrases(rng, count):
    """Two different captions of the same words, `count` times, and groups (count,) of the words."""
    kinds = {"shape": ACTORS + DISTRACTORS, "colour": [*COLOURS], "direction": [*DIRECTIONS]}
    chosen = np.stack([rng.integers(len(kind), size=count) for kind in kinds.values()], 1)
    pairs = []
    for numbers in chosen:
        words = {name: kind[i] for (name, kind), i in zip(kinds.items(), numbers)}
        pairs.append(rng.choice(captions_of(words), 2, replace=False).tolist())
    one, other = map(list, zip(*pairs))
    return one, other, torch.from_numpy(chosen @ [1, 10, 100])


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
    tokenizer = SimpleTokenizer(context_length=clip.context_length)
    tokens = functools.cache(lambda caption: tokenizer(caption)[0])  # of 507 captions
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CLIP_CONFIG["preprocess_cfg"].values())
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for _ in runs.progress(range(steps), desc="toy CLIP", unit="step"):
        images, captions, groups = _crops(rng, stills, batch)
        image = clip.encode_image((images - mean) / std)
        one, other, words = _paraphrases(rng, batch // 2)
        texts, numbers = np.unique(captions + one + other, return_inverse=True)
        text = clip.encode_text(torch.stack([*map(tokens, texts.tolist())]))[numbers]
        text, one, other = text.split([batch, batch // 2, batch // 2])
        loss = tgmae.info_nce(image, text, 0.07, groups=groups)
        loss = loss + tgmae.info_nce(one, other, 0.07, groups=words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")


# ==== Building it, once ===========================================================================
def _clip_of(out, seed, clips, number):
    """Makes clip `number` and writes its file -> its manifest record, and 3 stills (training clips)
    or the packed masks (test clips). It follows from the arguments alone, whatever the thread."""
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
    total = clips + clips // 4
    (out / "clips").mkdir()
    # Threads: numpy and x264 let go of the interpreter.
    with ThreadPoolExecutor(runs.usable_cores()) as pool:
        made = pool.map(functools.partial(_clip_of, out, seed, clips), range(total))
        records, extras = zip(*runs.progress(made, desc="toy world", unit="clip", total=total))
    (out / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    truth = {record["video"]: masks for record, masks in zip(records[clips:], extras[clips:])}
    np.savez_compressed(out / "truth.npz", **truth)
    train_clip(out / "clip", sum(extras[:clips], []), seed=seed, steps=clip_steps)


def manifest_of(folder="data/toy"):
    """The manifest of a world, which process 0 builds where it is not there yet."""
    if runs.rank_and_world()[0] == 0:
        build(folder)
    runs.wait_for_all()
    return Path(folder) / "manifest.jsonl"


def build(out="data/toy", clips=800, seed=0, clip_steps=300):
    """Makes the world in folder `out` unless it is there: manifest.jsonl, clips/, clip/ (the CLIP)
    and truth.npz (masks of the test split). `clips` training clips and a quarter as many test
    clips; `clip_steps` steps of the CLIP's training.

    Built beside and renamed at the end, so that an interrupted build never looks finished."""
    out = Path(out)
    if (out / "world.json").exists():
        return out
    if out.exists():
        raise UserError(f"{out}: exists and is not a toy world; name another folder, or remove it")
    with runs.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with runs.naming(out):
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
    shape = 2, FRAMES, SIZE, SIZE
    with np.load(Path(folder) / "truth.npz", allow_pickle=False) as truth:
        return {name: np.unpackbits(truth[name]).reshape(shape).astype(bool) for name in truth}


# ==== What does each masker hide? The mask follows the words, measured against the drawn truth ====
def auc(positive, negative):
    """Area under the ROC curve: how often a score of `positive` lies above one of `negative`."""
    below = torch.searchsorted(negative.sort().values, positive)
    return below.double().mean().item() / len(negative)


def coverage(folder="data/toy", mask_ratio=0.25, clips=200, stride=4):
    """-> {masker: (share of the actor's area masked, share of the distractor's)}, and the ROC AUC
    of the caption's similarity for cubes of the actor against cubes of the distractor and of the
    background."""
    config, folder = tgmae.PRESETS["toy"], Path(folder)
    runs.check_mask_ratio(mask_ratio, config.grid)
    size = config.patch_size, config.tubelet_size
    records = dataset.read_manifest(folder / "manifest.jsonl", "test")[:clips]
    truth, numbers = read_truth(folder), [i * stride for i in range(config.num_frames)]
    read = [dataset.read_clip(record["path"], numbers, motion=True) for record in records]
    video = tgmae.normalize(torch.stack([frames for frames, _ in read]).movedim(-1, 1))
    motion = torch.stack([motion for _, motion in read])
    area = np.stack([truth[record["video"]][:, numbers] for record in records])
    area = torch.from_numpy(area).float().flatten(0, 1)[:, None]  # (2B,1,T,S,S)
    area = tgmae.patchify(area, *size).mean(-1)  # the share of each cube that an object fills
    actor, distractor = area.view(len(records), 2, *config.grid).unbind(1)  # (B,t,h,w)

    clip = tgmae.load_clip(f"local-dir:{folder / 'clip'}")
    similarity = []
    for key in ("captions", "distractor_captions"):
        text = tgmae.encode_text(*clip, [record[key][i % 3] for i, record in enumerate(records)])
        similarity.append(tgmae.text_scores(clip[0], video, text, *size))
    words, other_words = similarity
    generator = torch.Generator().manual_seed(0)
    maskers = {
        "text": words,
        "text, the distractor's words": other_words,
        "text, bottom-k": words,
        "tube": tgmae.tube_scores(len(records), config.grid, generator=generator),
        "motion": tgmae.motion_scores(motion, config.grid, generator=generator),
    }
    table, objects = {}, (actor, distractor)
    for name, scores in maskers.items():
        mask = tgmae.topk_mask(scores, mask_ratio, bottom_k=name.endswith("bottom-k"))
        mask = mask.view_as(scores)
        table[name] = tuple(((mask * part).sum() / part.sum()).item() for part in objects)
    others = (actor == 0) & (distractor > 0.25), (actor == 0) & (distractor == 0)
    return table, tuple(auc(words[actor > 0.5], words[part]) for part in others)


def print_coverage(folder, mask_ratio):
    table, (beside, background) = coverage(folder, mask_ratio)
    print(f"| masker, ratio {mask_ratio:g} | actor masked | distractor masked |")
    print("| --- | --- | --- |")
    for name, (actor, distractor) in table.items():
        print(f"| {name} | {actor:.1%} | {distractor:.1%} |")
    words = f"actor against distractor {beside:.4f}, against background {background:.4f}"
    print(f"ROC AUC of the similarity, {words}")


# ==== Table 2, smaller ablations and Figure 4 of the paper, on this world =========================
# A row is a run of train.py, then of eval.py linear, retrieve and finetune; a row that several of
# them share runs once.


class Row(NamedTuple):
    """A way to pre-train. `flags` are more of train.py's; `captions` is for captions_from."""

    mask: str
    loss: str = "MAE + VT"
    flags: str = ""
    captions: str = "frames"

    @property
    def name(self):  # of its folder
        return re.sub("[^a-z0-9.]+", "-", " ".join(self).lower())


MASKS = "tube", "mgm", "tgm"
LOSSES = {"MAE": "", "VT": "--vt --no-mae", "MAE + VT": "--vt", "neither": "--no-mae"}
TABLE2 = {
    "random weights": Row("tube", "MAE", "--epochs 1 --warmup-epochs 0 --blr 0 --min-lr 0"),
    **{f"{mask}, {loss}": Row(mask, loss) for mask in MASKS for loss in ("MAE", "VT", "MAE + VT")},
}
del TABLE2["tgm, VT"]  # the paper has none
ABLATIONS = {
    "ratio": {
        f"tgm at {ratio}": Row("tgm", flags=f"--mask-ratio {ratio}" if ratio != 0.6 else "")
        for ratio in (0.3, 0.45, 0.6, 0.75, 0.9)
    },
    "bottom-k": {"tgm, highest": Row("tgm"), "tgm, lowest": Row("tgm", flags="--bottom-k"),
                 "tube": Row("tube")},
    "num-captions": {"3 captions": Row("tgm"), "1 caption": Row("tgm", flags="--num-captions 1")},
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
    for mask in MASKS
    for title, loss in (("optimised", "MAE + VT"), ("watched", "MAE"), ("frozen", "neither"))
}
COMPARISONS = {"table2": TABLE2, "figure4": FIGURE4, **ABLATIONS}
COLUMNS = {"linear": "linear probe", "finetune": "fine-tuned", "retrieve": "retrieval R@1"}


def captions_from(source, record):
    """What stands for the captions of the paper's Figure 5: of stills, which show no direction
    (BLIP-2), the class name (oracle), of the class (GPT-3.5); and those of whole clips."""
    of_clip, (shape, direction) = record["captions"], record["label"].split()
    beginnings = f"a {shape} moving", f"the {shape} goes", f"a {shape} drifts"
    of_class = [f"{beginning} {direction}" for beginning in beginnings]
    return {
        "frames": of_clip,
        "label": [record["label"]],
        "llm": of_class,
        "frames-llm": of_clip + of_class,
        "stills": [caption.rsplit(" ", 2)[0] for caption in of_clip],
    }[source]


def make_world(out, root, source):
    """ROOT/worlds/SOURCE, in which data/toy is the world in `out` with captions of that source."""
    data = root / "worlds" / source / "data" / "toy"
    data.mkdir(parents=True, exist_ok=True)
    for path in out.absolute().iterdir():
        if path.name != "manifest.jsonl" and not (data / path.name).is_symlink():
            (data / path.name).symlink_to(path)
    with runs.replacing(data / "manifest.jsonl", "w") as file:
        for record in map(json.loads, (out / "manifest.jsonl").read_text().splitlines()):
            record.pop("maps", None)  # of other captions: every row asks CLIP itself
            file.write(json.dumps(record | {"captions": captions_from(source, record)}) + "\n")


def call(script, flags, log, *, cwd, env, stopped):
    """Runs a script until it ends; once `stopped` is set, it is asked to save and end."""
    command = [sys.executable, Path(__file__).with_name(script), *map(str, flags)]
    with open(log, "a") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            if stopped.wait(0.1):
                process.terminate()
                process.wait()
    if code := process.returncode:
        reason = runs.last_line(log.read_text().strip() or "no output")
        raise UserError(f"{log}: {script} ended with exit code {code}: {reason}")


def run_row(args, root, row, seed, columns, call):
    """Pre-trains a row and evaluates it; what has its JSON is done. -> {column: share of the test
    clips, "vt": the contrastive loss of each epoch}."""
    folder, world = root / f"{row.name}-seed{seed}", root / "worlds" / row.captions
    folder.mkdir(exist_ok=True)
    epochs = ["--epochs", args.epochs, "--warmup-epochs", 0] if args.epochs else []
    if not (folder / "linear.json").exists():  # a training goes on, or sees that it has ended
        flags = ["--mask", row.mask, *LOSSES[row.loss].split(), *epochs, *row.flags.split()]
        flags += ["--seed", seed, "--out", folder]
        call("train.py", flags, folder / "train.log", cwd=world)
    found, losses = {}, {}
    for column in columns:
        path = folder / f"{column}.json"
        if not path.exists():
            own = {"finetune": ["--out", folder / "finetune", *epochs]}
            flags = [column, folder / "last.pt", "--seed", seed, "--json", path]
            flags += own.get(column, ["--no-random"])
            call("eval.py", flags, folder / f"{column}.log", cwd=world)
        first = json.loads(path.read_text())["rows"][0]
        found[column] = round(first["R@1" if column == "retrieve" else "top-1"], 4)
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        losses.setdefault(line["epoch"], []).append(line["vt"])
    return found | {"vt": [round(statistics.fmean(epoch), 4) for epoch in losses.values()]}


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


def share_table(log):
    heads = ["pre-training", *COLUMNS.values(), "seeds"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for title, seeds in by_row(log, "seed").items():
        shares = [[100 * share for share in by_row(log, column)[title]] for column in COLUMNS]
        cells = [title, *(mean_std(values, 1) for values in shares), str(len(seeds))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share_plot(Figure, log):
    """A dot a seed, a line at their mean."""
    titles = list(by_row(log, "seed"))
    figure = Figure(figsize=(9, 0.8 + 0.27 * len(titles)))
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for panel, (column, label) in zip(panels, COLUMNS.items()):
        for place, shares in enumerate(by_row(log, column).values()):
            values = [100 * share for share in shares]
            panel.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
            masks = [mask for mask in MASKS if titles[place].startswith(mask)]
            colour = f"C{MASKS.index(masks[0])}" if masks else "0.3"  # a masker's own
            style = {"color": colour, "markersize": 13, "markeredgewidth": 2}
            panel.plot(statistics.fmean(values), place, "|", **style)
        panel.set(xlabel=f"{label}, %", yticks=range(len(titles)), yticklabels=titles)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure


def curve_table(log):
    lines = ["| contrastive loss | first epoch | last epoch | seeds |", "| --- | --- | --- | --- |"]
    for title, curves in by_row(log, "vt").items():
        first = mean_std([curve[0] for curve in curves], 2)
        last = mean_std([curve[-1] for curve in curves], 2)
        lines.append(f"| {title} | {first} | {last} | {len(curves)} |")
    return lines


def curve_plot(Figure, log):
    """A line a seed; dashed where the loss is only watched, dotted where the encoder is random."""
    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    for title, curves in by_row(log, "vt").items():
        row = FIGURE4[title]
        dash = {"MAE + VT": "-", "MAE": "--", "neither": ":"}[row.loss]
        for i, run in enumerate(curves):
            label = None if i else title
            look = {"color": f"C{MASKS.index(row.mask)}", "label": label, "alpha": 0.8}
            axes.plot(range(1, len(run) + 1), run, dash, **look)
    chance = math.log(16)  # of the 16 captions in a batch of the toy preset
    right = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.axhline(chance, color="0.6", linewidth=0.8)
    axes.text(1, chance, "chance", color="0.4", **right)
    axes.set(xlabel="epoch", ylabel="contrastive loss (VT)")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def report(args, name, found):
    """Writes NAME.jsonl (a line a row and seed) and NAME.svg. found: {(title, seed): what run_row
    has found}. -> lines of the table, and how it was made."""
    import matplotlib
    from matplotlib.figure import Figure

    folder, titles = args.report or args.runs, list(COMPARISONS[name])
    order = sorted(found, key=lambda key: (titles.index(key[0]), key[1]))
    log = [{"row": title, "seed": seed, **found[title, seed]} for title, seed in order]
    table, plot = (curve_table, curve_plot) if name == "figure4" else (share_table, share_plot)
    lines = table(log)
    device = f"{runs.usable_cores()} {platform.machine()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    how = f"`python toy.py {' '.join(sys.argv[1:])}`; {device}, "
    how += f"Python {platform.python_version()}, torch {torch.__version__}, {date.today()}."
    folder.mkdir(parents=True, exist_ok=True)
    with runs.naming(folder):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}  # words stay words
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style), runs.naming(folder):
        figure = plot(Figure, log)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    return [*lines, "", how]


def compare(args, name):
    """Runs the rows of a comparison, some side by side: on a CPU one a core with one thread each,
    which is nearly twice as fast as one after the other with two. Reports after each."""
    rows, columns = COMPARISONS[name], () if name == "figure4" else COLUMNS
    of = json.loads((args.out / "world.json").read_text()) | {"epochs": args.epochs}
    # Runs of another world, or of other --epochs, have another folder.
    root = args.runs.absolute() / "-".join(f"{key}{value}" for key, value in of.items())
    for source in {row.captions for row in rows.values()}:
        make_world(args.out, root, source)
    there = sum(
        (root / f"{r.name}-seed{s}").exists() for r in rows.values() for s in range(args.seeds)
    )
    if there:
        print(
            f"note    {there} runs in {root} are reused, whatever code made them", file=sys.stderr
        )
    gpu, cores = torch.cuda.is_available(), runs.usable_cores()
    jobs = args.jobs or (1 if gpu else cores)
    env = os.environ | ({} if gpu else {"OMP_NUM_THREADS": str(max(1, cores // jobs))})
    found, started, stopped = {}, {}, threading.Event()
    start = functools.partial(call, env=env, stopped=stopped)
    bar = runs.progress(total=len(rows) * args.seeds, unit="row", smoothing=0)
    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for seed in range(args.seeds):
                for title, row in rows.items():
                    job = pool.submit(run_row, args, root, row, seed, columns, start)
                    started[job] = title, seed
            for job in as_completed(started):
                found[started[job]] = job.result()
                table = report(args, name, found)
                bar.update()
        except BaseException:  # an interrupt, too
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print("\n".join(table))


def parse_args(argv=None):
    about = "Make the toy world, measure on it what each masker hides, or run the paper's "
    about += "comparisons on it."
    parser = runs.Parser(prog="toy.py", description=about)
    commands = "build", "coverage", "table2", "ablate", "figure4"
    flag = functools.partial(runs.add_flag, parser)
    flag("command", "build", "what to do", nargs="?", choices=commands)
    flag("ablation", None, "for ablate", nargs="?", choices=ABLATIONS)
    flag("--out", Path("data/toy"), "folder of the world", type=Path)
    flag("--clips", None, "training clips; 800; a quarter as many test clips", type=int)
    flag("--seed", None, "of everything in the world; 0", type=runs.seed)
    flag("--mask-ratio", 0.25, "of coverage", type=runs.proper_fraction)
    flag("--seeds", 3, "runs of each row, with seeds 0, 1, ...", type=runs.positive_int)
    flag("--runs", Path("runs/toy"), "folder of the rows' runs", type=Path)
    flag("--report", None, "folder of plot and log; that of --runs", type=Path)
    flag("--jobs", 0, "rows at a time; 0: one a CPU core, with a GPU one", type=runs.natural)
    flag("--epochs", 0, "of both trainings; 0: train.py's, eval.py's own", type=runs.natural)
    args = parser.parse_args(argv)
    if args.clips is not None and args.clips < 16:
        parser.error(f"--clips {args.clips}: at least 16, one a class")
    if (args.command == "ablate") != bool(args.ablation):
        several = f"ablate takes one of {', '.join(ABLATIONS)}, other commands none"
        parser.error(f"{args.command} {args.ablation or ''}: {several}")
    return args


def main(argv=None):
    with runs.one_line_errors("toy.py", "fewer --jobs"):
        args = parse_args(argv)
        wanted = {"clips": args.clips, "seed": args.seed}
        typed = {name: value for name, value in wanted.items() if value is not None}
        build(args.out, **typed)
        made = json.loads((args.out / "world.json").read_text())
        if args.command == "build":
            print(f"{args.out}: a world of {made['clips']} training clips, seed {made['seed']}")
        if not typed.items() <= made.items():
            ways = "another --out, or remove it, for another world"
            raise UserError(f"{args.out}: is there already; {ways}")
        if args.command == "coverage":
            print_coverage(args.out, args.mask_ratio)
        elif args.command != "build":
            compare(args, args.ablation or args.command)


if __name__ == "__main__":
    # So that what it has started is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
