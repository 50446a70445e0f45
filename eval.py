"""Is the representation any good? Every way the paper asks (4.4, 4.5, 4.7), for any checkpoint.

    python eval.py linear runs/toy-tgm-vt/last.pt      # a linear classifier on frozen features
    python eval.py retrieve runs/toy-tgm-vt/last.pt    # nearest neighbours
    torchrun eval.py finetune runs/toy-tgm-vt/last.pt  # the whole network
    python eval.py predict runs/toy-tgm-vt/finetune-toy/best.pt VIDEO...   # classes of videos
    python eval.py features runs/toy-tgm-vt/last.pt VIDEO...               # an .npz, to work with
    python eval.py show runs/toy-tgm-vt/last.pt        # masks, reconstruction, attention
    python eval.py export runs/toy-tgm-vt/last.pt      # for transformers
    torchrun --nproc_per_node 8 eval.py finetune runs/k400-tgm-vt/last.pt --recipe k400

CHECKPOINT is of train.py, of finetune or export, an official VideoMAE .pth, or a folder or hub name
of transformers' VideoMAE; sizes are read from it. Testing gives the same metrics under any number
of processes: a test clip that cannot be read is reported and left out, never replaced, and none is
counted twice."""

import functools
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

# Loader processes share the cores with us: threads without work must sleep, after a short spin that
# spares small models much waking. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

import dataset
import pictures
import runs
import tgmae
import weights
from dataset import Crop, UserError, VideoError
from tgmae import MASK_RATIOS

# Fine-tuning and testing, a recipe a dataset: Table 9 for K400 and SSv2, and VideoMAE's FINETUNE.md
# for what it leaves open. Of the others the paper tells the test views alone.
_PAPER = {
    "lr": 1e-3, "epochs": 75, "stride": 4, "flip": True, "sampling": "dense", "views": "5x3",
    "batch_size": 48, "warmup_epochs": 5.0, "repeat": 2, "layer_decay": 0.75, "drop_path": 0.1,
    "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "randaug": 21, "crop_scale": 0.08,
    "erasing": 0.25, "holdout": 0.02, "random": False,
    "test_split": "val",  # Kinetics' and SSv2's test labels are not public
}  # fmt: skip
# From a few to a few thousand clips, on one machine, in minutes. Its epochs: FEW_STEPS steps.
_FEW = _PAPER | {
    "lr": 0.01, "epochs": None, "views": "3x1", "batch_size": 16, "warmup_epochs": None,
    "repeat": 1, "layer_decay": 0.9, "mixup": 0.0, "cutmix": 0.0, "randaug": 0, "crop_scale": 0.6,
    "erasing": 0.0, "holdout": 0.1, "random": True, "test_split": "test",
}  # fmt: skip
RECIPES = {
    "toy": _FEW | {"lr": 0.03, "epochs": 16, "warmup_epochs": 2.0, "flip": False},
    "few": _FEW,
    "other": _PAPER | {"test_split": "test"},
    "k400": _PAPER,
    "ssv2": _PAPER | {"lr": 5e-4, "epochs": 30, "stride": 2, "flip": False, "sampling": "tsn",
                      "views": "2x3"},
    "ucf101": _PAPER | {"epochs": 100, "test_split": "test"},
    "hmdb51": _PAPER | {"epochs": 50, "test_split": "test"},
    "diving48": _PAPER | {"epochs": 50, "test_split": "test"},
    "epic55": _PAPER | {"epochs": 50},
}  # fmt: skip
FEW_STEPS = 500
RATES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]  # learning rates that `linear` tries
MAX_SOURCE = 320  # pixels of the short side before augmentation, as VideoMAE prepares Kinetics


# ==== Models: a checkpoint of any kind -> TGMAE, or Classifier if it is fine-tuned ================
class Classifier(nn.Module):
    """VideoMAE's fine-tuning model, in its names: encoder without the final norm, mean over cubes,
    a fresh norm, a linear head."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.config = config
        self.encoder = tgmae.Encoder(config)
        self.encoder.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.001)

    def features(self, video):
        """(B,3,T,S,S) -> (B,D)."""
        cubes = tgmae.patchify(video, self.config.patch_size, self.config.tubelet_size)
        return self.fc_norm(self.encoder(cubes).mean(1))

    def forward(self, video):
        """(B,3,T,S,S) ImageNet-normalised -> logits (B,K)."""
        return self.head(self.features(video))


def add_drop_path(encoder, rate):
    """Stochastic depth, as in VideoMAE: in training a block's attention, or its MLP, is left out of
    a clip with a probability that grows with depth, from 0 to `rate`."""
    depth = len(encoder.blocks)
    for number, block in enumerate(encoder.blocks):
        p = number * rate / max(1, depth - 1)

        def drop(part, inputs, output, p=p):
            return stochastic_depth(output, p, "row", training=part.training)

        block.attn.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)


def pooled(model, video):
    """(B,3,T,S,S) -> (B,D): the encoder's mean, none masked; a Classifier's is normed."""
    return model.features(video) if isinstance(model, Classifier) else model.encode(video).mean(1)


def tokens_of(model, video, layer=None):
    """(B,3,T,S,S) -> (B,N,D), none masked: after so many blocks of the encoder, without its final
    norm; None, or all of them: with it."""
    c, encoder = model.config, model.encoder
    cubes = tgmae.patchify(video, c.patch_size, c.tubelet_size)
    if layer in (None, c.depth):
        return encoder(cubes)
    x = encoder.patch_embed(cubes)
    return encoder.blocks[:layer](x + encoder.pos_embed.to(x.dtype))


def load_model(source, goes_on=False):
    """-> model in eval mode, what else the checkpoint holds. goes_on: its run does. UserError if it
    cannot be loaded, or is a classifier of another kind."""
    config, state, saved = weights.load_checkpoint(source)
    own = saved["args"] = weights.flags_of(source)  # an export's, too
    if saved["assumed"]:
        runs.say(f"note    {source} does not say the size of its clips: {saved['assumed']} assumed")
    if not goes_on:
        runs.note_unended(source, saved)
    fine_tuned = "head.weight" in state
    model = Classifier(config, len(state["head.weight"])) if fine_tuned else tgmae.TGMAE(config)
    if "encoder.norm.weight" not in state:  # transformers' encoder with use_mean_pooling has none
        model.encoder.norm = nn.Identity()
    if "transformers" in saved:  # there these two have torch's own eps, whatever the config says
        (model.fc_norm if fine_tuned else model.decoder.norm).eps = 1e-5
    missing, unexpected = model.load_state_dict(state, strict=False)
    if fine_tuned and (missing or unexpected):  # VideoMAE's classifiers of the first cube alone
        has = f"no {missing[0]}" if missing else f"an {unexpected[0]}"
        raise UserError(f"{source}: fine-tuned, but not on the mean over cubes: it has {has}")
    model.not_in_file = model.state_dict().keys() - state.keys()  # export leaves these out
    model.norm_pix_loss = saved["norm_pix_loss"]
    model.has_decoder = "mask_token" in state and own.get("mae", True)
    return model.eval(), saved


def encoders(args):
    """Yields (name, model): CHECKPOINT, and with --random also a model of the same sizes with
    weights as they are before training."""
    model, _ = load_model(args.checkpoint)
    if isinstance(model, Classifier):
        runs.say(f"note    {args.checkpoint} is fine-tuned: labels, too, have made these features")
    yield args.checkpoint, model.to(args.device)
    if args.random:
        torch.manual_seed(args.seed)
        yield "random weights, same sizes", tgmae.TGMAE(model.config).eval().to(args.device)


# ==== Clips and their labels ======================================================================
def manifest_of(data):
    """For --data: the path of a manifest, that of a toy world, or "toy": of the world in data/toy,
    made if need be."""
    if data == "toy":
        import toy

        return toy.manifest_of()
    return runs.manifest_path(data)


def labelled(manifest, split):
    """Records of a split, of which each must have a label: UserError."""
    records = dataset.read_manifest(manifest, split)
    bare = [record["video"] for record in records if record.get("label") in (None, "")]
    if bare:
        raise UserError(
            f"{manifest}: {len(bare)} of {len(records)} clips of split {split!r} have no label, "
            f"such as {bare[0]}"
        )
    return records


def class_names(records):
    """Labels in the dataset's own order, if the records number them or they are integers, else
    sorted."""
    own = {str(record["label"]): record.get("class_id", record["label"]) for record in records}
    if all(isinstance(number, int) for number in own.values()):
        return sorted(own, key=own.get)
    return sorted(own)


def targets(records, classes, where):
    """-> class numbers (n,), -1 for a class that is not among `classes`, which nothing can be right
    for."""
    number = {label: i for i, label in enumerate(classes)}
    target = torch.tensor([number.get(str(record["label"]), -1) for record in records])
    if (target < 0).all():
        raise UserError(
            f"{where}: none of its classes is known, such as {records[0]['label']!r}; known: "
            f"{', '.join(classes[:3])}..."
        )
    if (target < 0).any():
        new = sorted({str(record["label"]) for record, t in zip(records, target) if t < 0})
        runs.say(
            f"note    {where}: {int((target < 0).sum())} clips are of {len(new)} classes that "
            f"training lacks, such as {new[0]!r}: misses"
        )
    return target


def ancestors(checkpoint):
    """Yields (checkpoint, flags of its run), then those of the checkpoint that this run began with,
    and so on, as far as they are there."""
    known = set()
    while checkpoint not in known and (own := weights.flags_of(checkpoint)):
        yield checkpoint, own
        known.add(checkpoint)
        if own.get("scratch") or not (own.get("init") or own.get("checkpoint")):
            return
        checkpoint = own.get("init") or own.get("checkpoint")


def look_for_seen_clips(args, manifest, test, refuse=False):
    """Says so if CHECKPOINT, or an ancestor, was trained on test clips, as its manifest is now, or
    chose its best epoch by them. refuse: UserError if CHECKPOINT itself was trained on them."""
    test_side, looked_at = {f"--test-split {args.test_split}": test}, set()
    for checkpoint, own in ancestors(args.checkpoint):
        split, chooses = own.get("split"), own.get("val_split") if "holdout" in own else None
        facts = own.get("data"), split, chooses, own.get("split_clips")
        if not own.get("data") or facts in looked_at:
            continue
        looked_at.add(facts)
        data = runs.manifest_path(own["data"])
        try:
            train = dataset.read_manifest(data, split)
            chose = dataset.read_manifest(data, chooses) if chooses else []
        except UserError as error:
            runs.say(f"note    test clips are not compared with those of {checkpoint}: {error}")
            continue
        trained = {f"split {split} of {data}, on which {checkpoint} was trained": train}
        chosen = {f"split {chooses} of {data}, by which its run chose best.pt": chose}
        if refuse and checkpoint == args.checkpoint:
            dataset.refuse_shared_clips(manifest, trained | test_side)
        for side in (trained, chosen):
            if shared := dataset.shared_clips(side | test_side):
                runs.say(f"note    {shared}")
        if own.get("split_clips") not in (None, runs.digest_of_clips(train)):
            runs.say(
                f"note    split {split!r} of {data} has changed since {checkpoint} was trained on "
                "it: it may have seen test clips"
            )


def splits_of(args, manifest):
    """-> records to train on (or to retrieve from), and to test on; names of the classes; class
    numbers of both."""
    train, test = (labelled(manifest, split) for split in (args.split, args.test_split))
    sides = {f"--split {args.split}": train, f"--test-split {args.test_split}": test}
    dataset.refuse_shared_clips(manifest, sides)
    look_for_seen_clips(args, manifest, test)
    classes = class_names(train)
    where = f"{manifest}, split {args.test_split!r}"
    return train, test, classes, targets(train, classes, args.split), targets(test, classes, where)


def view_grid(flag, text):
    """5x3 -> [5, 3]."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"{flag} {text}: must be like 5x3, views in time x in space")
    return [int(part) for part in text.split("x")]


def view_frames(first, stop, num_frames, stride, sampling, views):
    """-> `views` lists of num_frames frame numbers in [first, stop); a single view is from the
    middle.

    dense, as VideoMAE's kinetics.py: of every stride-th frame, windows at evenly spaced starts; a
    video too short repeats the last. tsn, as its ssv2.py: a frame of each of num_frames equal
    segments; the views together are views*num_frames frames, evenly spaced, dealt out in turn."""
    if sampling == "tsn":
        segment = (stop - first) / num_frames
        shifts = [v / views for v in range(views)] if views > 1 else [0.5]
        return [[first + int((i + shift) * segment) for i in range(num_frames)] for shift in shifts]
    strided = list(range(first, stop, stride))
    strided += strided[-1:] * (num_frames - len(strided))
    slack = len(strided) - num_frames
    starts = [int(v * slack / (views - 1)) for v in range(views)] if views > 1 else [slack // 2]
    return [strided[start : start + num_frames] for start in starts]


def view_crops(size, views):
    """(height, width) -> `views` squares of the short side, evenly spaced along the long one; one:
    the centre."""
    side, slack = min(size), max(size) - min(size)
    offsets = [int(v * slack / (views - 1)) for v in range(views)] if views > 1 else [slack // 2]
    tall = size[0] > size[1]
    return [Crop(o, 0, side, side) if tall else Crop(0, o, side, side) for o in offsets]


class Views(Dataset):
    """Record's number -> (number, video (V,3,T,S,S) uint8 of its time x space views, or None and
    why it cannot be read, whether it is too short for them)."""

    def __init__(self, records, config, args, grid):
        self.records, self.config, self.args, self.grid = records, config, args, grid

    def __getitem__(self, number):
        record, args, c = self.records[number], self.args, self.config
        try:
            with dataset.open_video(record["path"]) as video:
                first, stop = dataset.frame_range(video, record.get("start"), record.get("end"))
                in_time, in_space = self.grid
                clips = view_frames(first, stop, c.num_frames, args.stride, args.sampling, in_time)
                wanted = sorted(set(sum(clips, [])))  # all views in one decode
                frames = dataset.read_clip(video, wanted)
        except VideoError as error:
            return number, None, str(error), False
        crops = view_crops(frames.shape[1:3], in_space)
        rows = [[wanted.index(frame) for frame in clip] for clip in clips]
        views = [dataset.crop_frames(frames[r], crop, c.image_size) for r in rows for crop in crops]
        span = c.num_frames if args.sampling == "tsn" else (c.num_frames - 1) * args.stride + 1
        return number, torch.stack(views), None, stop - first < span


def finite(values, name):
    """-> values, which are of `name`. UserError if they hold NaN or infinity."""
    if not values.isfinite().all():
        raise UserError(f"{name}: not finite; the weights hold NaN, or bf16 overflows (--no-amp)")
    return values


class Computed(NamedTuple):
    values: torch.Tensor  # (n,V,...) of the n clips that could be read, in the manifest's order
    kept: list[int]  # their numbers
    failed: list[tuple[str, str]]  # (video, why) of the others
    short: int
    text: str  # "1,998 of 2,000 clips"


@torch.no_grad()
def compute_clips(split, records, args, config, grid, compute, *, by=""):
    """Runs compute((b*V,3,T,S,S) -> (b*V,...)) on time x space views of every clip that can be
    read. by: of what model the bar is, if there are several.

    Processes share batches that are the same however many share them, so what comes out is the
    same, too. UserError that names a clip of which NaN or infinity comes out."""
    rank, world = runs.rank_and_world()
    size = max(1, args.batch_size // math.prod(grid))
    batches = [part.tolist() for part in torch.arange(len(records)).split(size)][rank::world]
    views = Views(records, config, args, grid)
    loader = runs.batches_of(views, args.workers, batch_sampler=batches, collate_fn=list)
    label = f"{split} clips, {by}" if by else f"{split} clips"
    done, values, failed = [], [], []
    for batch in runs.progress(
        loader, total=len(batches), desc=label, unit="batch", disable=rank > 0
    ):
        failed += [(number, why) for number, video, why, _ in batch if video is None]
        read = [item for item in batch if item[1] is not None]
        if not read:
            continue
        video = torch.stack([item[1] for item in read]).to(args.device)  # (b,V,3,T,S,S)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = compute(tgmae.normalize(video.flatten(0, 1)))
        values.append(out.float().cpu().unflatten(0, video.shape[:2]))  # (b,V,...)
        done += [(number, short) for number, _, _, short in read]
    parts = runs.gather_objects((done, values, failed))
    done, values, failed = (sum(part, []) for part in zip(*parts))
    if not done:
        raise UserError(f"none of the {len(records)} {split} clips can be read: {min(failed)[1]}")
    values = torch.cat(values)[torch.tensor([number for number, _ in done]).argsort()]
    kept = sorted(number for number, _ in done)
    for number, value in zip(kept, values):
        finite(value, records[number]["video"])
    short = sum(short for _, short in done)
    for _, why in sorted(failed):
        runs.say(f"failed  {why}; left out")
    if short:
        runs.say(
            f"note    {short:,} of the {split} clips are shorter than a view: they repeat frames"
        )
    failed = [(records[number]["video"], why) for number, why in sorted(failed)]
    text = f"{len(done):,} of {len(records):,} clips"
    return Computed(values, kept, failed, short, text)


def in_table(value):
    form = {float: ".1%", int: ","}.get(type(value), "")
    return f"{value:{form}}"


def report(args, rows, notes, clips, **more):
    """Prints the table (rows: dicts of the same columns), what it means, and how many clips it is
    of; writes --json."""
    if runs.rank_and_world()[0]:
        return
    if getattr(args, "data", None):
        split = f", split {args.test_split}" if "test_split" in args else ""
        notes = [*notes, f"Data: {args.data}{split}, recipe {args.recipe}."]
    print(f"\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(in_table, row.values()))} |")
    for note in notes:
        print(f"\n{note}")
    if clips:
        print(f"\n{'; '.join(f'{split}: {found.text}' for split, found in clips.items())}.")
    if args.json:
        counts = {}
        for split, found in clips.items():
            counts[split] = {"clips": found.text, "failed": found.failed}
            counts[split]["shorter than a view"] = found.short
        result = {"rows": rows, "notes": notes, "clips": counts, "settings": vars(args), **more}
        with runs.replacing(args.json, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


def views_text(args):
    how = f"{args.sampling}, stride {args.stride}" if args.sampling == "dense" else args.sampling
    return f"Mean over {args.views} views, time x space ({how})."


def accuracy(scores, target, ks=(1, 5)):
    """scores (n,K), target (n,), -1 never right -> {"top-1": share, "top-5": share}."""
    finite(scores, "scores")
    best = scores.topk(min(max(ks), scores.shape[1])).indices
    return {f"top-{k}": (best[:, :k] == target[:, None]).any(1).float().mean().item() for k in ks}


def chosen_on(count):
    """How many clips chose, and whether that says something."""
    return f"{count:,} clip(s), so few that it is luck" if count < 20 else f"{count:,} clip(s)"


def chance_row(name, classes, ks=(1, 5)):
    return {name: "chance", **{f"top-{k}": min(1.0, k / classes) for k in ks}}


# ==== linear ======================================================================================
# BatchNorm without affine + Linear on features that are extracted once. The paper names
# only "linear probe"; the head is MAE's (He et al. 2022, A.1), with SGD on fixed features.
def train_head(x, y, num_classes, rate, args):
    """Features (n,V,D), classes (n,) -> BatchNorm1d(affine=False) + Linear, by SGD with a
    cosine."""
    x, y = x.flatten(0, 1), y.repeat_interleave(x.shape[1])
    generator = torch.Generator().manual_seed(args.seed)
    linear = nn.Linear(x.shape[1], num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6), linear).to(x.device)
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9)
    batch = min(256, len(x))
    steps = args.epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(args.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(head(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


@torch.no_grad()
def view_scores(head, x):
    """Features (n,V,D) -> (n,K): softmax of each view, mean over views."""
    return head(x.flatten(0, 1)).softmax(-1).unflatten(0, x.shape[:2]).mean(1)


def hold_out(count, args, least=0):
    """Of `count` training clips, at random -> numbers of the --holdout share (`least` or more) that
    chooses, of those that train. UserError if these are fewer than two."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    held, kept = order.tensor_split([max(least, round(args.holdout * count))])
    if len(kept) < 2:
        raise UserError(f"--holdout {args.holdout}: leaves {len(kept)} of {count} training clips")
    return held, kept


def choose_rate(x, y, num_classes, args):
    """Features (n,V,D) of training clips -> (the rate whose head does best on held-out ones of
    them, top-1 there of every rate)."""
    held, kept = hold_out(len(x), args, least=1)
    found = {}
    for rate in args.rates:
        head = train_head(x[kept], y[kept], num_classes, rate, args)
        found[rate] = accuracy(view_scores(head, x[held]), y[held], ks=(1,))["top-1"]
    return max(found, key=found.get), found


def linear(args):
    """Train a linear classifier on frozen features, then test it (4.2)."""
    train, test, classes, train_target, test_target = splits_of(args, manifest_of(args.data))
    rows, chosen, rates = [], {}, []
    for name, model in encoders(args):
        features, c = functools.partial(pooled, model), model.config
        seen = compute_clips(args.split, train, args, c, args.train_view_grid, features, by=name)
        tested = compute_clips(args.test_split, test, args, c, args.view_grid, features, by=name)
        if runs.rank_and_world()[0]:
            continue  # the head is small: one process trains it
        x, labels = seen.values.to(args.device), train_target[seen.kept].to(args.device)
        rate, tops = choose_rate(x, labels, len(classes), args)
        head = train_head(x, labels, len(classes), rate, args)
        scores = view_scores(head, tested.values.to(args.device)).cpu()
        rows.append({"encoder": name, **accuracy(scores, test_target[tested.kept])})
        chosen[name] = {"rate": rate, "held-out top-1": {f"{r:g}": top for r, top in tops.items()}}
        rates.append(f"{rate:g} for {name}")
    rows.append(chance_row("encoder", len(classes)))
    note = f"{views_text(args)} Learning rate: the best of {len(args.rates)} on {args.holdout:.0%} "
    held = chosen_on(max(1, round(args.holdout * len(seen.kept))))
    note += f"of the training clips ({held}): {', '.join(rates)}."
    clips = {args.split: seen, args.test_split: tested}
    report(args, rows, [note], clips, rates=chosen)


# ==== retrieve: nearest neighbours by cosine ======================================================
def recall(queries, gallery, query_labels, gallery_labels, ks=(1, 5, 10)):
    """queries (Q,D), gallery (G,D), labels (Q,) and (G,) -> {"R@k": share of queries for which one
    of the k nearest of the gallery, by cosine, has the query's label}."""
    finite(queries, "queries")
    finite(gallery, "gallery")
    queries, gallery = F.normalize(queries, dim=-1), F.normalize(gallery, dim=-1)
    hits = []
    for q, label in zip(queries.split(1024), query_labels.split(1024)):  # memory stays bounded
        nearest = (q @ gallery.T).topk(min(max(ks), len(gallery))).indices
        hits.append(gallery_labels[nearest] == label[:, None])
    hits = torch.cat(hits)
    return {f"R@{k}": hits[:, :k].any(1).float().mean().item() for k in ks}


def recall_by_chance(query_labels, gallery_labels, ks=(1, 5, 10)):
    """What recall would find in a gallery in random order, on average."""
    G = len(gallery_labels)
    count, queries = Counter(gallery_labels.tolist()), Counter(query_labels.tolist())

    def hit(relevant, k):  # one less the chance that none of k drawn is among the relevant ones
        return 1 - math.comb(G - relevant, min(k, G)) / math.comb(G, min(k, G))

    hits = {k: sum(n * hit(count[label], k) for label, n in queries.items()) for k in ks}
    return {f"R@{k}": hits[k] / len(query_labels) for k in ks}


def retrieve(args):
    """Find clips of the same class, zero-shot (4.5.1)."""
    gallery, query, _, gallery_target, query_target = splits_of(args, manifest_of(args.data))
    rows, clips = [], {}
    what = {"retrieval": "clip -> a training clip of its class"}
    for name, model in encoders(args):
        features, c = functools.partial(pooled, model), model.config
        tested = compute_clips(args.test_split, query, args, c, args.view_grid, features, by=name)
        seen = compute_clips(args.split, gallery, args, c, args.view_grid, features, by=name)
        clips = {args.test_split: tested, args.split: seen}
        sides = [F.normalize(found.values, dim=-1).mean(1) for found in (tested, seen)]
        labels = query_target[tested.kept], gallery_target[seen.kept]
        what |= {"queries": len(sides[0]), "gallery": len(sides[1])}
        rows.append({**what, "encoder": name, **recall(*sides, *labels)})
    rows.append({**what, "encoder": "chance", **recall_by_chance(*labels)})
    note = f"R@k: one of the k nearest training clips, by cosine, has the class. {views_text(args)}"
    report(args, rows, [note], clips)


# ==== finetune: VideoMAE's full recipe (Table 9; run_class_finetuning.py), torchvision's transforms
def augmentation(args, size):
    """frames (T,3,H,W) uint8 -> (T,3,size,size) float, ImageNet-normalised; one draw for all
    frames."""
    mean = [round(255 * value) for value in tgmae.IMAGENET_MEAN]
    bilinear = v2.InterpolationMode.BILINEAR
    # timm's rand-m7-n4-mstd0.5-inc1: each of 4 operations with probability 0.5. Its noise on the
    # magnitude is left out.
    randaug = v2.RandAugment(1, args.randaug, interpolation=bilinear, fill=mean)
    return v2.Compose(
        [
            *([v2.RandomApply([randaug], 0.5)] * 4 if args.randaug else []),
            v2.RandomResizedCrop(size, scale=(args.crop_scale, 1.0), ratio=(0.75, 1 / 0.75)),
            v2.RandomHorizontalFlip(0.5 if args.flip else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(tgmae.IMAGENET_MEAN, tgmae.IMAGENET_STD),
            v2.RandomErasing(args.erasing, value="random"),  # noise, the same in all frames
        ]
    )


class Augmented(runs.TrainingClips):
    """Samples: `repeat` augmented clips of the same frames of a video, and its class."""

    def __init__(self, records, target, config, args):
        super().__init__(records, args.seed)
        self.target, self.config, self.args = target, config, args
        self.augment = augmentation(args, config.image_size)

    def load(self, place, seed):
        record, args, c = self.records[place], self.args, self.config
        # torchvision draws from the global generator
        with torch.random.fork_rng(devices=[]), dataset.open_video(record["path"]) as video:
            torch.manual_seed(seed)
            first, stop = dataset.frame_range(video, record.get("start"), record.get("end"))
            if args.sampling == "tsn":
                jitter = torch.rand(c.num_frames).double()  # 15 + 0.9999999 is 16 in float32
                places = (torch.arange(c.num_frames) + jitter) * (stop - first) / c.num_frames
                numbers = (first + places.long()).tolist()
            else:
                numbers = dataset.clip_indices(first, stop, c.num_frames, args.stride)
            frames = dataset.read_clip(video, numbers).permute(0, 3, 1, 2)  # (T,3,H,W)
            if min(frames.shape[2:]) > MAX_SOURCE:
                frames = v2.functional.resize(frames, [MAX_SOURCE], antialias=True)
            videos = [self.augment(frames).transpose(0, 1) for _ in range(args.repeat)]
        sample = {"video": torch.stack(videos), "target": self.target[place]}
        return sample | {"name": record["video"], "short": len(set(numbers)) < len(numbers)}


def collate(samples):
    """First one clip of each video, then another of each: torchvision mixes neighbours."""
    video = torch.stack([sample["video"] for sample in samples], 1)  # (repeat,videos,3,T,S,S)
    target = torch.stack([sample["target"] for sample in samples])
    return {
        "video": video.flatten(0, 1),
        "target": target.repeat(len(video)),
        "names": [sample["name"] for sample in samples],
        "bad": sum((sample["bad"] for sample in samples), []),
        "short": sum(sample["short"] for sample in samples),
    }


def mix(video, target, num_classes, args):
    """MixUp or CutMix, either half the time, of clips (B,3,T,S,S) with classes (B,) -> clips and
    shares (B,K); with neither, clips and classes as they are."""
    ways = [v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []
    ways += [v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else []
    if not ways:
        return video, target
    clips = tv_tensors.Video(video.transpose(1, 2))  # (B,T,3,S,S)
    clips, shares = v2.RandomChoice(ways)(clips, target)
    return clips.as_subclass(torch.Tensor).transpose(1, 2), shares


def layer_scales(model, decay):
    """{parameter's name: factor of the learning rate}: 1 for head and fc_norm, times `decay` for
    each block below, the patch embedding last; as VideoMAE's LayerDecayValueAssigner."""
    depth = len(model.encoder.blocks)

    def below(name):
        if name.startswith("encoder.blocks."):
            return depth - int(name.split(".")[2])
        return depth + 1 if name.startswith("encoder.patch_embed") else 0

    return {name: decay ** below(name) for name, _ in model.named_parameters()}


def make_optimizer(model, args):
    """AdamW, betas .9/.999; a group for each parameter: its factor of the learning rate, and weight
    decay (none on 1-D parameters)."""
    scales, groups = layer_scales(model, args.layer_decay), []
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 else 0.0
        groups.append({"params": [p], "scale": scales[name], "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def test_scores(model, split, records, args, grid, *, by=""):
    """-> Computed with values (n,K): softmax of each view, mean over views."""
    model.eval()
    softmax = lambda video: model(video).float().softmax(-1)  # noqa: E731
    found = compute_clips(split, records, args, model.config, grid, softmax, by=by)
    return found._replace(values=found.values.mean(1))


def choose_best(state, best, model, val, target, args):
    """After an epoch, whose checkpoint is `state`: it becomes best.pt if top-1 on held-out clips is
    above `best`. The log says so last: a run that ends before does it again. -> the best now."""
    found = test_scores(model, "held-out", val, args, (1, 1))
    top = accuracy(found.values, target[found.kept])
    if runs.rank_and_world()[0] == 0:
        if top["top-1"] > best:
            runs.save_checkpoint(Path(args.out) / "best.pt", **state, best=top["top-1"])
        line = {"step": state["step"], "epoch": state["epoch"] - 1}
        line |= {f"val {name}": value for name, value in top.items()}
        runs.append_log(Path(args.out) / "log.jsonl", line)
    return max(best, top["top-1"])


def go_on(saved, model, optimizer, args, settings):
    """Loads a checkpoint of the same run; another one's is refused. -> its step, the best top-1 on
    held-out clips."""
    saved["args"] |= {"classes": saved["classes"]}
    runs.refuse_another_run(args, saved, settings, RECIPES[args.recipe])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    found = saved["step"], saved["best"]
    saved.clear()  # gigabytes
    return found


def fit(args, model, classes, train, val):
    """Trains; leaves last.pt, best.pt (of the epoch with the highest top-1 on val) and log.jsonl in
    --out. What happens in a step is read here, from top to bottom, as in train.train."""
    rank, world = runs.rank_and_world()
    saved = runs.load_last(args)
    if args.recipe == "few":
        runs.fit_to_few(args, len(train), FEW_STEPS)
    if not saved:  # else a typed --epochs is refused as another run's
        runs.check_warmup(args)
    share = runs.share_step(args.batch_size, args.accum, saved and saved["videos"])
    data = Augmented(train, targets(train, classes, args.split), model.config, args)
    val_target = targets(val, classes, "held-out clips") if val else None
    out, steps_per_epoch = Path(args.out), len(data) // share.videos
    if not steps_per_epoch:
        few = "; --recipe few is for few clips" if args.recipe != "few" else ""
        raise UserError(
            f"{len(data)} training clips are fewer than a step takes ({world} processes x "
            f"--batch-size {args.batch_size} x --accum {args.accum}){few}"
        )
    total, warmup = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)
    settings = vars(args) | {"clips": len(data), "world": world, "classes": classes}
    whole = dataset.read_manifest(runs.manifest_path(args.data), args.split)  # held-out ones, too
    settings["split_clips"] = runs.digest_of_clips(whole)
    settings["records"] = runs.digest_of_records(train, ("video", "start", "end", "label"))
    settings["best_chosen_on"] = args.val_split  # a run that goes on chooses by the same
    if not args.scratch:
        settings |= runs.digest_of_weights(args.checkpoint, goes_on=bool(saved))
    peak, least = args.lr * share.videos / 256, args.min_lr * share.videos / 256
    optimizer = make_optimizer(model, args)
    start, best = go_on(saved, model, optimizer, args, settings) if saved else (0, -1.0)
    runs.say(
        f"train   {len(data):,} clips, {len(val):,} more choose best.pt; {len(classes)} classes"
    )
    runs.say(
        f"steps   {total}, from step {start}; {share.videos} videos = {world} x {share.forward} x "
        f"{share.accum}"
    )
    runs.say(f"device  {args.device}, {'bf16' if args.amp else 'fp32'}; run folder {out}")
    if share.forward == 1 and (args.mixup or args.cutmix):
        runs.say("note    one video a forward: MixUp and CutMix have no other to mix it with")
    net = runs.distributed(model)
    about = {"config": asdict(model.config), "videos": share.videos, "classes": classes}
    about["args"] = settings
    logged = runs.open_log(out, start)
    if "val top-1" in logged:
        best = max(best, logged["val top-1"])
    elif val and start and start % steps_per_epoch == 0:  # it was saved, and not validated
        state = about | {"model": model.state_dict(), "step": start}
        state["epoch"] = start // steps_per_epoch
        best = choose_best(state, best, model, val, val_target, args)
    done, last_saved_step, last_saved_at = start, start, time.monotonic()
    zero = torch.zeros((), device=args.device)
    runs.listen()
    with runs.progress(total=total, initial=start, unit="step", disable=rank > 0) as bar:
        for step, batches in runs.steps(data, share, args, start, collate):
            net.train()
            epoch, began = step // steps_per_epoch, time.perf_counter()
            lr = runs.learning_rate(step, warmup, total, peak, least, first=least)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.zero_grad()
            loss_sum, names = zero, []
            bad, short = 0, 0
            for micro, batch in enumerate(batches):
                # Drop path and mixing draw from here, so a run that goes on draws the same.
                torch.manual_seed(runs.seed_of(args.seed, step, micro, rank, 2))
                video = batch["video"].to(args.device, non_blocking=args.device == "cuda")
                target = batch["target"].to(args.device, non_blocking=args.device == "cuda")
                video, target = mix(video, target, len(classes), args)
                with runs.averaging_if(net, last=micro == share.accum - 1):
                    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                        logits = net(video).float()
                    loss = F.cross_entropy(logits, target, label_smoothing=args.smoothing)
                    loss = loss / share.accum
                    loss.backward()
                loss_sum = loss_sum + loss.detach()
                bad += len(batch["bad"])
                short += batch["short"]
                names += batch["names"]
                runs.list_bad(out / "bad_videos.txt", batch["bad"])

            norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
            loss_finite = bool(loss_sum.isfinite())
            broken = not (loss_finite and math.isfinite(norm))
            counts = zero.new_tensor([bad, short, broken, runs.asked_to_stop()])
            sums = runs.sum_over_ranks(torch.cat([loss_sum[None], counts]))
            all_loss, all_bad, all_short, any_broken, any_stop = sums  # of all processes
            if any_broken:
                runs.stop_not_finite(args, step + 1, names if world == 1 or not loss_finite else [])
            optimizer.step()
            done = step + 1

            took = time.perf_counter() - began
            line = {"step": done, "epoch": epoch, "loss": round(all_loss / world, 6), "lr": lr}
            line |= {"grad_norm": round(norm, 4), "bad": int(all_bad), "short": int(all_short)}
            line["clips_per_s"] = round(args.repeat * share.forward * share.accum * world / took, 2)
            if rank == 0:
                runs.append_log(out / "log.jsonl", line)
            bar.set_postfix({"loss": line["loss"]}, refresh=False)
            bar.update()

            epoch_ends = done % steps_per_epoch == 0
            late = 0 < 60 * args.save_minutes <= time.monotonic() - last_saved_at
            if epoch_ends or late or any_stop:
                state = about | {"model": model.state_dict(), "step": done}
                state["epoch"] = done // steps_per_epoch
                if rank == 0:
                    saving = state | {"best": best, "optimizer": optimizer.state_dict()}
                    runs.save_checkpoint(out / "last.pt", **saving)
                    last_saved_step, last_saved_at = done, time.monotonic()
            if any_stop and done < total:
                break  # the run that goes on validates first
            if val and epoch_ends:
                best = choose_best(state, best, model, val, val_target, args)

    runs.leave(out, last_saved_step, unfinished=done < total, draw=lambda: draw(out))
    if rank == 0:
        draw(out)
        runs.say_counts(out)


def draw(out):
    """losses.png: what log.jsonl holds."""
    with runs.replacing(out / "losses.png") as file:
        pictures.draw_losses(runs.read_log(out)).savefig(file, format="png")


def without_training(args, manifest, test):
    """--epochs 0: the fine-tuned CHECKPOINT -> {name: model}, names of its classes, 0 clips that
    chose."""
    model, saved = load_model(args.checkpoint)
    if not isinstance(model, Classifier):
        raise UserError(f"--epochs 0: {args.checkpoint} is not fine-tuned, it has no head to test")
    look_for_seen_clips(args, manifest, test, refuse=True)
    classes, named_by = saved.get("classes") or [], args.checkpoint
    if classes == [f"LABEL_{i}" for i in range(len(classes))]:  # what transformers says for no name
        classes = class_names(labelled(manifest, args.split))
        named_by = f"{manifest}, split {args.split!r}"
        runs.say(
            f"note    {args.checkpoint} does not name its classes: assumed to be those of "
            f"{named_by}, in order, {classes[0]!r} to {classes[-1]!r}"
        )
    if len(classes) != model.head.out_features:
        raise UserError(
            f"{args.checkpoint}: a head of {model.head.out_features} classes, {named_by} has "
            f"{len(classes)}"
        )
    return {args.checkpoint: model}, classes, 0


def train_classifier(args, manifest, test):
    """Fine-tunes CHECKPOINT -> {name: model} of what was kept, names of the classes, how many clips
    chose best.pt."""
    train = labelled(manifest, args.split)
    sides = {f"--split {args.split}": train}
    classes = class_names(train)
    runs.note_sides(args, classes)
    if len(classes) < 2:
        raise UserError(f"{manifest}: split {args.split!r} has one class, {classes[0]!r}")
    targets(test, classes, f"{manifest}, split {args.test_split!r}")  # says now what is wrong
    if args.val_split:
        val = sides[f"--val-split {args.val_split}"] = labelled(manifest, args.val_split)
    else:
        val, train = (train[sorted(part.tolist())] for part in hold_out(len(train), args))
    dataset.refuse_shared_clips(manifest, sides | {f"--test-split {args.test_split}": test})
    if not args.scratch:
        look_for_seen_clips(args, manifest, test)
    last, source = Path(args.out) / "last.pt", args.checkpoint
    if args.resume and last.exists() and not Path(source).exists():
        source = last  # gone, or at a hub: the run that goes on has its own weights
    start, _ = load_model(source, goes_on=source == last)
    if isinstance(start, Classifier) and source != last and not args.scratch:
        runs.say(
            f"note    {args.checkpoint} is fine-tuned: its encoder is taken, a new head begins"
        )
    torch.manual_seed(args.seed)
    start = tgmae.TGMAE(start.config) if args.scratch else start
    torch.manual_seed(args.seed)  # the same head with --scratch and without
    model = Classifier(start.config, len(classes))
    model.encoder.load_state_dict(start.encoder.state_dict(), strict=False)  # no final norm
    model.to(args.device)
    add_drop_path(model.encoder, args.drop_path)
    if args.grad_checkpointing:
        runs.checkpoint_blocks(model)
    with runs.lock_folder(Path(args.out)):
        fit(args, model, classes, train, val)
    kept = [Path(args.out) / name for name in ("last.pt", "best.pt") if val or name == "last.pt"]
    return {str(path): load_model(path)[0] for path in kept}, classes, len(val)


def finetune(args):
    """Train all of the network on labels, then test it (4.2)."""
    manifest = manifest_of(args.data)
    test = labelled(manifest, args.test_split)
    run = without_training if args.epochs == 0 else train_classifier
    models, classes, count = run(args, manifest, test)
    target = targets(test, classes, f"{manifest}, split {args.test_split!r}")
    rows = []
    for name, model in models.items():
        model.to(args.device)
        found = test_scores(model, args.test_split, test, args, args.view_grid, by=name)
        rows.append({"model": name, **accuracy(found.values, target[found.kept])})
    rows.append(chance_row("model", len(classes)))
    note = views_text(args)
    if len(models) == 2:
        share = f"{args.holdout:.0%} of the training clips"
        held = f"split {args.val_split}" if args.val_split else share
        note += f" best.pt: the epoch with the highest top-1 on {held} ({chosen_on(count)}), never "
        note += "on test clips."
    report(args, rows, [note], {args.test_split: found})


# ==== features, predict: what people do with a trained model ======================================
def given_videos(paths):
    """-> a record for each video file, and for each below the folders."""
    records = []
    for path in paths:
        found = list(dataset.videos_under(path)) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"{path}: a folder without videos")
        records += [{"path": str(video), "video": str(video)} for video in found]
    return records


def features(args):
    """Write the pooled features of a manifest's clips, or of videos, to an .npz file."""
    if args.videos:
        name, records = "given", given_videos(args.videos)
    else:
        name = args.split or "all"
        records = dataset.read_manifest(manifest_of(args.data), args.split)
    model, _ = load_model(args.checkpoint)
    model.to(args.device)
    if args.layer and args.layer > model.config.depth:
        raise UserError(f"--layer {args.layer}: the encoder has 1 to {model.config.depth}")

    def compute(video):
        if args.tokens:
            return tokens_of(model, video, args.layer)
        return tokens_of(model, video, args.layer).mean(1) if args.layer else pooled(model, video)

    found = compute_clips(name, records, args, model.config, args.view_grid, compute)
    if runs.rank_and_world()[0]:
        return
    kept, values = [records[number] for number in found.kept], found.values.mean(1).numpy()
    if args.tokens:
        values = values.astype(np.float16)  # (n,N,D); else (n,D)
    about = {"videos": [record["video"] for record in kept], "settings": json.dumps(vars(args))}
    about["labels"] = [str(record.get("label", "")) for record in kept]
    about["splits"] = [record.get("split", "") for record in kept]
    with runs.naming(args.out):
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with runs.replacing(args.out) as file:
        np.savez(file, features=values, **about)
    row = {"file": args.out, "clips": len(kept), "dimensions": values.shape[-1]}
    report(args, [row], [views_text(args)], {name: found})


def predict(args):
    """Say what videos show: the five likeliest classes of a fine-tuned CHECKPOINT."""
    records, (model, saved) = given_videos(args.videos), load_model(args.checkpoint)
    if not isinstance(model, Classifier):
        raise UserError(
            f"{args.checkpoint}: pre-trained, not fine-tuned; eval.py finetune {args.checkpoint} "
            "--data MANIFEST trains it to name classes"
        )
    for name in ("views", "stride", "sampling"):
        setattr(args, name, getattr(args, name) or saved["args"].get(name, _PAPER[name]))
    grid = args.view_grid = view_grid("--views", args.views)
    classes = saved.get("classes") or [f"class {i}" for i in range(model.head.out_features)]
    found = test_scores(model.to(args.device), "given", records, args, grid)
    rows = []
    for number, scores in zip(found.kept, found.values):
        for share, place in zip(*(best.tolist() for best in scores.topk(min(5, len(classes))))):
            rows.append({"video": records[number]["video"], "class": classes[place]})
            rows[-1]["probability"] = share
    report(args, rows, [views_text(args)], {"given": found})


# ==== show: the paper's three pictures (4.7): what each masker masks, reconstruction, attention ===
def clip_of(args, saved):
    """-> (clip, tokenizer) of --clip, else what CHECKPOINT was trained with, else train.py's."""
    own = saved["args"]
    made_by = own["clip"] if own.get("text_from") == "maps" else None
    if made_by:  # maps call a CLIP by a name of their own: see dataset.clip_name
        own = {}
    world = runs.toy_world(args.data or own.get("data"))
    default = f"local-dir:{world}/clip" if world else "ViT-B-32-quickgelu"
    name = args.clip or own.get("clip") or default
    tag = args.clip_pretrained or (None if args.clip else own.get("clip_pretrained")) or "openai"
    if made_by and not args.clip and not made_by.startswith(dataset.clip_name(name, tag) + " "):
        raise UserError(
            f"{args.checkpoint}: trained with text maps of the CLIP {made_by}: --clip and "
            "--clip-pretrained say where it is"
        )
    return weights.load_clip(name, tag, args.device)


def clip_to_show(args, config):
    """-> name and captions (or [None]) of a clip, numbers of the frames in its middle, these frames
    (3,T,S,S) uint8, their centre cropped, and their motion (T,h,w)."""
    record = {"path": args.video, "video": args.video}
    if not args.video:
        records = dataset.read_manifest(manifest_of(args.data), args.test_split)
        if not 0 <= args.number < len(records):
            raise UserError(
                f"--number {args.number}: split {args.test_split!r} has clips 0 to "
                f"{len(records) - 1}"
            )
        record = records[args.number]
    captions = record.get("captions") or [None]
    start = record.get("start") if args.start is None else args.start
    span = dataset.frame_range(record["path"], start, record.get("end"))
    (numbers,) = view_frames(*span, config.num_frames, args.stride, args.sampling, 1)
    frames, motion = dataset.read_clip(record["path"], numbers, motion=True)
    (crop,) = view_crops(frames.shape[1:3], 1)
    name = os.fsencode(record["video"]).decode("utf-8", "replace")  # drawn, whatever its bytes
    found = name, args.caption or [captions[len(captions) // 2]], numbers
    video = dataset.crop_frames(frames, crop, config.image_size)
    return *found, video, dataset.crop_motion(motion, crop, config.grid)


def attention_of(args, model, video):
    """-> numbers of layers, from 1, and their attention (layers,N,N)."""
    c = model.config
    layers = args.layers or sorted({1, (c.depth + 1) // 2, c.depth})
    if not all(1 <= layer <= c.depth for layer in layers):
        raise UserError(f"--layers {' '.join(map(str, layers))}: the encoder has 1 to {c.depth}")
    return layers, pictures.attention_maps(model, video, [layer - 1 for layer in layers])


def attention_panels(c, layers, attention, frames):
    t, h, w = c.grid
    query = (t // 2 * h + h // 2) * w + w // 2  # the centre cube
    for layer, of_layer in zip(layers, attention):
        heat = pictures.heat_map(of_layer[query].view(c.grid), frames)
        yield f"attention {layer}/{c.depth}", pictures.mark(heat, query, c)


def mask_to_show(args, trained, scores):
    """The masker of the reconstruction: --mask, or the one that CHECKPOINT was trained with."""
    if args.mask and args.mask not in scores:
        raise UserError(
            f"--mask {args.mask}: needs --caption, or scores in panels_of if it is your own"
        )
    chosen = args.mask or trained.get("mask", "tube")
    if chosen not in scores:
        runs.say(f"note    no scores for --mask {chosen} here: the reconstruction is of tube")
    return chosen if chosen in scores else "tube"


@torch.no_grad()
def panels_of(args, model, saved):
    """-> title, [(name, frames (T,S,S,3) uint8), ...], numbers of the frames, and the page to play
    with, or None without --html."""
    c, trained = model.config, saved["args"]
    name, captions, numbers, frames, motion = clip_to_show(args, c)
    video = tgmae.normalize(frames[None]).to(args.device)
    frames = frames.permute(1, 2, 3, 0)  # (T,S,S,3)
    what, panels = f"{name}, frames {numbers[0]} to {numbers[-1]}", [("clip", frames)]
    title = f'"{captions[0]}"   {what}' if captions[0] else what
    generator = torch.Generator().manual_seed(args.seed)
    scores = {"tube": tgmae.tube_scores(1, c.grid, generator=generator)}
    scores["mgm"] = tgmae.motion_scores(motion[None], c.grid, generator=generator)
    if captions[0]:
        clip, tokenizer = clip_of(args, saved)
        text = tgmae.encode_text(clip, tokenizer, captions)
        videos = video.expand(len(captions), -1, -1, -1, -1)
        like = tgmae.text_scores(clip, videos, text, c.patch_size, c.tubelet_size).cpu()
        label = f"similarity {like[0].min():.2f} to {like[0].max():.2f}"
        panels.append((label, pictures.heat_map(like[0], frames)))
        scores["tgm"] = like[:1]
    else:
        runs.say("note    no --caption: no text mask")
    chosen = mask_to_show(args, trained, scores)
    own, masks = trained if trained.get("mask") == chosen else {}, {}
    ratio = own.get("mask_ratio", MASK_RATIOS[chosen])
    ratios = MASK_RATIOS | {chosen: ratio if args.mask_ratio is None else args.mask_ratio}
    runs.check_mask_ratio(ratios[chosen], c.grid)
    for way, score in scores.items():
        lowest = way == chosen and own.get("bottom_k", False)
        masks[way] = tgmae.topk_mask(score, ratios[way], bottom_k=lowest)
        label = f"{way} mask {ratios[way]:.0%}" + (", lowest" if lowest else "")
        panels.append(
            (label, pictures.to_uint8(pictures.reconstruct(video, masks[way], None, c)["masked"]))
        )
    finite(pooled(model, video), name)
    made = {}
    if model.has_decoder and not model.norm_pix_loss:
        runs.say(f"note    {args.checkpoint}: its targets are not normalised: no reconstruction")
    elif model.has_decoder:
        pred = finite(model(video, masks[chosen])["pred"].float(), name)
        made = pictures.reconstruct(video, masks[chosen], pred, c)
        made = {key: pictures.to_uint8(made[key]) for key in ("reconstructed", "predicted")}
        panels.append(("as predicted", made["predicted"]))
        panels.append(("reconstruction", made["reconstructed"]))
    else:
        runs.say(
            f"note    {args.checkpoint} has no decoder, or an untrained one: no reconstruction"
        )
    colours = pictures.principal_components(tokens_of(model, video)[0], c)
    panels.append(("tokens, 3 components", colours))
    layers, attention = attention_of(args, model, video)
    panels += attention_panels(c, layers, attention, frames)
    if not args.html:
        return title, panels, numbers, None
    scores = {way: score for way, score in scores.items() if score.shape[1:] == c.grid}
    if captions[0]:
        scores["tgm"] = like
    shown = chosen if chosen in scores else "tube"
    about = {"mask": shown, "ratio": ratios[shown], "lowest": own.get("bottom_k", False)}
    about |= {"captions": captions if captions[0] else [], "title": what}
    about["layers"] = [f"{layer} of {c.depth}" for layer in layers]
    page = pictures.explore(frames, made, scores, attention, c, **about)
    return title, panels, numbers, page


def show(args):
    """Draw masks, reconstruction and attention of a clip (4.7)."""
    model, saved = load_model(args.checkpoint)
    title, panels, numbers, page = panels_of(args, model.to(args.device), saved)
    png, gif, html = (f"{args.out}.{kind}" for kind in ("png", "gif", "html"))
    with runs.naming(png):
        Path(png).parent.mkdir(parents=True, exist_ok=True)
    with runs.replacing(png) as file:
        pictures.draw_sheet(panels, title).save(file, "PNG")
    first, *others = pictures.draw_animation(panels, title)
    with runs.replacing(gif) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=250, loop=0)
    files = [png, gif]
    if page:
        files.append(html)
        with runs.replacing(html, "w", encoding="utf-8") as file:
            file.write(page)
    rows = [{"row": i, "shows": name} for i, (name, _) in enumerate(panels, 1)]
    note = f"{title}. Written: {', '.join(files)}."
    report(args, rows, [note], {}, files=files, frames=numbers)


# ==== export: for transformers ====================================================================
def huggingface_of(model):
    """The same model in transformers: VideoMAEForVideoClassification, VideoMAEForPreTraining, or
    VideoMAEModel where there is no decoder."""
    import transformers

    c = model.config
    sizes = {theirs: getattr(c, ours) for ours, theirs in weights.SIZES.items()}
    theirs = transformers.VideoMAEConfig(
        **sizes,
        intermediate_size=int(c.embed_dim * c.mlp_ratio),
        decoder_intermediate_size=int(c.decoder_embed_dim * c.mlp_ratio),
        norm_pix_loss=model.norm_pix_loss,
        use_mean_pooling=isinstance(model.encoder.norm, nn.Identity),
    )
    if isinstance(model, Classifier):
        theirs.num_labels = model.head.out_features
        net = transformers.VideoMAEForVideoClassification(theirs)
    else:
        net = transformers.VideoMAEForPreTraining(theirs)
    net.load_state_dict(weights.to_huggingface(model))
    return (net if isinstance(model, Classifier) or model.has_decoder else net.videomae).eval()


def export(args):
    """Write a folder that transformers opens, and model.pt for eval.py."""
    import transformers

    model, saved = load_model(args.checkpoint)
    c, out = model.config, Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already, and not an empty folder")
    state = {name: v for name, v in model.state_dict().items() if name not in model.not_in_file}
    for name, value in state.items():
        finite(value, f"{args.checkpoint}, {name}")
    net = huggingface_of(model)
    if saved.get("classes"):
        net.config.id2label = dict(enumerate(saved["classes"]))
        net.config.label2id = {label: i for i, label in enumerate(saved["classes"])}
    size = {"shortest_edge": c.image_size}, {"height": c.image_size, "width": c.image_size}
    colours = {"image_mean": list(tgmae.IMAGENET_MEAN), "image_std": list(tgmae.IMAGENET_STD)}
    processor = transformers.VideoMAEImageProcessor(size=size[0], crop_size=size[1], **colours)
    with runs.naming(out):
        net.save_pretrained(out)
        processor.save_pretrained(out)
    rest = {name: saved[name] for name in ("args", "classes") if saved.get(name)}
    config = asdict(c) | {"norm_pix_loss": model.norm_pix_loss}
    runs.save_checkpoint(out / "model.pt", config=config, model=state, **rest)

    torch.manual_seed(args.seed)
    video = torch.randn(2, 3, c.num_frames, c.image_size, c.image_size)
    with torch.no_grad():
        ours = model.encoder(tgmae.patchify(video, c.patch_size, c.tubelet_size))
        theirs = type(net).from_pretrained(out).base_model(video.transpose(1, 2)).last_hidden_state
    apart = (ours - theirs).abs().max().item()
    rows, theirs = [], f"transformers' {type(net).__name__}.from_pretrained({str(out)!r})"
    for name, by in (("model.safetensors", theirs), ("model.pt", "eval.py, train.py --init")):
        size = (out / name).stat().st_size
        rows.append({"file": str(out / name), "bytes": size, "opens with": by})
    note = f"Opened again in transformers, the encoder's output differs by at most {apart:.1e}."
    if isinstance(model, Classifier) and model.fc_norm.eps != 1e-5:
        note += f" There fc_norm has eps 1e-5, here {model.fc_norm.eps:g}: logits differ by little."
    report(args, rows, [note], {}, difference=apart)


# ==== Command line ================================================================================
def by_recipe(flag, name, help, **more):
    """A flag whose default depends on --recipe: help lists those that are not the paper's."""
    own = {recipe: of[name] for recipe, of in RECIPES.items()}
    own = {recipe: value for recipe, value in own.items() if value not in (None, _PAPER[name])}
    others = [f"{recipe} {value}" for recipe, value in own.items()]
    values = ", ".join([str(_PAPER[name]), *others])
    flag(f"--{name.replace('_', '-')}", None, f"{help}; {values}", **more)


def common_flags(flag, out=None):
    flag("checkpoint", None, "a file, a folder, or a hub name", metavar="CHECKPOINT")
    flag("--json", None, "write the result there, too", metavar="FILE")
    flag("--device", "auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    flag("--amp", None, "bf16 autocast; where the hardware has it", action=runs.YES_NO)
    flag("--seed", 0, "of weights, order, augmentation, splits and masks", type=runs.seed)
    if out:
        flag("--out", None, f"{out}; beside CHECKPOINT, or in runs/")


def data_flags(flag, train_split=True, test_split=True):
    flag("--workers", None, runs.WORKERS, type=runs.natural)
    what = "toy, a folder that toy.py made, or a manifest; what CHECKPOINT was trained on"
    flag("--data", None, what)
    whose = "whose defaults to take; on CHECKPOINT's data its own; toy for a toy world, else other"
    flag("--recipe", None, whose, choices=RECIPES)
    if train_split:
        flag("--split", "train", "split of the manifest to train on, or to retrieve from")
    if test_split:
        by_recipe(flag, "test_split", "split of the manifest to test on")
    strides = "frames from one frame of a clip to the next; on CHECKPOINT's data its own"
    by_recipe(flag, "stride", strides, type=runs.positive_int)
    ways = "dense: every stride-th frame; tsn: one of each of num_frames parts"
    by_recipe(flag, "sampling", ways, choices=("dense", "tsn"))


def test_flags(flag):
    by_recipe(flag, "views", "of a test clip (retrieve: of any), time x space")
    sizes = "per process: videos a forward (finetune), views at a time (tests)"
    by_recipe(flag, "batch_size", sizes, type=runs.positive_int)


def finetune_flags(flag):
    common_flags(flag, out="run folder")
    data_flags(flag)
    test_flags(flag)
    by_recipe(flag, "lr", "learning rate per 256 videos of global batch", type=runs.not_negative)
    least = "per 256 videos, where warm-up begins and the cosine ends"
    flag("--min-lr", 1e-6, least, type=runs.not_negative)
    few = f"passes over the data; 0 tests a fine-tuned checkpoint as it is; few: {FEW_STEPS} steps"
    by_recipe(flag, "epochs", few, type=runs.natural)
    warmup = "epochs of linear warm-up, at most a fifth of a typed --epochs; few: a twentieth"
    by_recipe(flag, "warmup_epochs", warmup, type=runs.not_negative)
    flag("--accum", 1, "forwards per step", type=runs.positive_int)
    decay = "factor of the learning rate from a block to the one below"
    by_recipe(flag, "layer_decay", decay, type=runs.fraction)
    flag("--weight-decay", 0.05, "of AdamW, on matrices only", type=runs.not_negative)
    drop = "chance to drop the last block for a clip; less for those below"
    by_recipe(flag, "drop_path", drop, type=runs.fraction)
    by_recipe(flag, "smoothing", "label smoothing", type=runs.fraction)
    by_recipe(flag, "mixup", "alpha of MixUp; 0: none", type=runs.not_negative)
    by_recipe(flag, "cutmix", "alpha of CutMix; 0: none", type=runs.not_negative)
    bins = "RandAugment's bin of 31, in each of 4 operations; 0: none"
    by_recipe(flag, "randaug", bins, type=runs.randaug_bin)
    by_recipe(flag, "crop_scale", "least area of a crop, share of the frame", type=runs.fraction)
    by_recipe(flag, "erasing", "chance to erase a box of a clip", type=runs.fraction)
    by_recipe(
        flag, "flip", "mirror half the clips; on CHECKPOINT's data its own", action=runs.YES_NO
    )
    by_recipe(flag, "repeat", "augmented clips from each decoded video", type=runs.positive_int)
    chooses = "share of the training clips that chooses best.pt; 0: no best.pt"
    by_recipe(flag, "holdout", chooses, type=runs.fraction)
    flag("--val-split", None, "split to choose best.pt by, in place of --holdout")
    flag("--scratch", False, "begin with random weights, of CHECKPOINT's sizes")
    flag("--grad-checkpointing", False, "less memory for a third more time")
    minutes = "minutes between checkpoints; 0: none between epochs"
    flag("--save-minutes", 10.0, minutes, type=runs.not_negative)
    flag("--resume", True, "go on from the run folder's last.pt")


def linear_flags(flag):
    retrieve_flags(flag)
    flag("--epochs", 100, "passes over the features", type=runs.positive_int)
    flag("--rates", RATES, "learning rates to choose from", type=runs.positive, nargs="+")
    chooses = "share of the training clips that chooses the rate"
    flag("--holdout", 0.2, chooses, type=runs.proper_fraction)
    flag("--train-views", "1x1", "views of each training clip, time x space")


def retrieve_flags(flag):
    common_flags(flag)
    data_flags(flag)
    test_flags(flag)
    beside = "do the same with random weights, beside it"
    by_recipe(flag, "random", beside, action=runs.YES_NO)


def features_flags(flag):
    common_flags(flag, out=".npz file")
    files = "files, or folders of them, in place of --data"
    flag("videos", None, files, nargs="*", metavar="VIDEO")
    data_flags(flag, train_split=False, test_split=False)
    flag("--split", None, "split of the manifest; all of it")
    flag("--views", "1x1", "of each clip, time x space")
    by_recipe(flag, "batch_size", "views at a time, per process", type=runs.positive_int)
    layers = "after which block, from 1; the last, and the final norm"
    flag("--layer", None, layers, type=runs.positive_int)
    flag("--tokens", False, "of each cube (n,N,D), float16, in place of their mean")


def predict_flags(flag):
    common_flags(flag)
    flag("videos", None, "files, or folders of them", nargs="+", metavar="VIDEO")
    flag("--workers", None, runs.WORKERS, type=runs.natural)
    flag("--views", None, "of each video, time x space; CHECKPOINT's own, or 5x3")
    strides = "frames from one to the next; CHECKPOINT's own, or 4"
    flag("--stride", None, strides, type=runs.positive_int)
    ways = "see finetune; CHECKPOINT's own, or dense"
    flag("--sampling", None, ways, choices=("dense", "tsn"))
    size = _PAPER["batch_size"]
    flag("--batch-size", size, "views at a time, per process", type=runs.positive_int)


def show_flags(flag):
    common_flags(flag, out="for OUT.png and OUT.gif")
    data_flags(flag, train_split=False)
    flag("--clip", None, "open_clip model of the caption; the one of CHECKPOINT's training")
    flag("--clip-pretrained", None, "tag of open_clip, or a file; likewise, or openai")
    flag("--video", None, "a video file, in place of a clip of --data")
    says = "what it shows, again for --html's choice; of a clip of --data: its middle caption"
    flag("--caption", None, says, action="append")
    flag("--html", False, "write OUT.html, too: a page to play with")
    flag("--number", 0, "which clip of --data, without --video")
    flag("--start", None, "seconds; the clip is from the middle of what follows", type=float)
    whose = "of the reconstruction; CHECKPOINT's own, or tube"
    flag("--mask", None, whose, choices=tuple(MASK_RATIOS))
    flag(
        "--mask-ratio",
        None,
        f"of it; CHECKPOINT's own, or {MASK_RATIOS}",
        type=runs.proper_fraction,
    )
    flag("--layers", None, "of attention, from 1; first, middle, last", type=int, nargs="+")


COMMANDS = {
    "finetune": (finetune, finetune_flags),
    "linear": (linear, linear_flags),
    "retrieve": (retrieve, retrieve_flags),
    "features": (features, features_flags),
    "predict": (predict, predict_flags),
    "show": (show, show_flags),
    "export": (export, functools.partial(common_flags, out="folder")),
}


def data_and_recipe(args):
    """What is typed, else what CHECKPOINT was trained on; no data where videos are given."""
    own = weights.flags_of(args.checkpoint)
    if args.command == "finetune" and args.out:  # CHECKPOINT may be gone when a run goes on
        own = own or weights.flags_of(Path(args.out) / "last.pt")
    data = args.data or own.get("data")
    given = getattr(args, "videos", None) or getattr(args, "video", None)
    if args.data and given:
        raise UserError(f"--data {args.data}: and videos that are given; one of the two")
    if not data and not given:
        weights.load_checkpoint(args.checkpoint)  # says so if it is none
        raise UserError(
            f"--data: {args.checkpoint} does not say what it was trained on; a manifest, or toy"
        )
    if not given and not args.data and not runs.toy_world(data) and not os.path.exists(data):
        raise UserError(
            f"--data: {args.checkpoint} was trained on {data}, which is not there now; name a "
            "manifest"
        )
    recipe = "toy" if runs.toy_world(data) else "other"
    if own.get("recipe") in RECIPES and runs.same_data(data, own["data"]):
        recipe = own["recipe"]
    return None if given else data, args.recipe or recipe


def late_defaults(args):
    """Defaults that follow from CHECKPOINT and the flags that are typed."""
    here = Path(args.checkpoint)
    if args.command == "export":
        return {"out": f"{here.with_suffix('')}-huggingface"}
    if args.command == "predict":
        return {}
    folder = here.parent if here.suffix or here.is_file() else Path("runs") / here.name
    data, recipe = data_and_recipe(args)
    late = RECIPES[recipe] | {"data": data, "recipe": recipe, "out": str(folder / args.command)}
    own, names = weights.flags_of(args.checkpoint), ()
    if args.command == "finetune" and args.epochs == 0:  # tested as it was after its training
        names = "stride", "sampling", "views"
    elif own.get("data") and (not data or runs.same_data(data, own["data"])):
        names = "stride", "flip"
    if not args.recipe:
        late |= {name: own[name] for name in names if name in own}
    if args.command == "finetune":
        scratch = "-scratch" if args.scratch else ""
        late["out"] = runs.name_run(f"{folder}/finetune-", data, scratch)
        if args.epochs is not None and recipe != "few":
            late["warmup_epochs"] = min(late["warmup_epochs"], args.epochs / 5)
    elif args.command == "linear":
        del late["epochs"], late["holdout"]
    elif args.command == "features":
        late["out"] = str(folder / "features.npz")
        del late["views"]
    return {name: value for name, value in late.items() if name in args}


def parse_args(argv=None):
    parser = runs.Parser(prog="eval.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add_flags) in COMMANDS.items():
        own = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        add_flags(functools.partial(runs.add_flag, own))
    first = parser.parse_args(argv)
    own = commands.choices[first.command]
    own.set_defaults(**late_defaults(first))
    args = parser.parse_args(argv)
    if args.command == "finetune" and args.epochs != 0:
        args, _ = runs.parse_like_run(own, lambda: parser.parse_args(argv), args)
    if args.command == "features" and first.out:
        check_folder("--out", first.out)
    if args.json:
        check_folder("--json", args.json)
    check_args(args)
    return args


def check_args(args):
    """What holds between flags; what holds of one of them its type says."""
    for name in ("views", "train_views"):
        if getattr(args, name, None):
            grid = view_grid(f"--{name.replace('_', '-')}", getattr(args, name))
            setattr(args, name.replace("views", "view_grid"), grid)
    if args.command == "features" and args.tokens and args.views != "1x1":
        raise UserError(f"--tokens, --views {args.views}: tokens are of one view")
    if args.command == "finetune" and args.holdout == 1:
        raise UserError("--holdout 1: leaves no clip to train on")


def check_folder(flag, path):
    """Before hours of work, after which it could not be written."""
    if not Path(path).parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder {Path(path).parent}")


def main(argv=None):
    less = "a smaller --batch-size (finetune: with a larger --accum, --grad-checkpointing), --amp"
    with runs.one_line_errors("eval.py", less):
        args = parse_args(argv)
        rank, _ = runs.start_processes(args)
        if args.command in ("show", "export") and rank:
            return  # one process draws and writes
        run, _ = COMMANDS[args.command]
        run(args)


if __name__ == "__main__":
    main()
