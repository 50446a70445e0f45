"""Pre-trains a (text-guided) video masked autoencoder.

    torchrun train.py --mask tgm --vt                      # toy world: no download, any machine
    torchrun --nproc_per_node 8 train.py --data k400.jsonl --preset base --mask tgm --vt

Loss = MAE + vt_weight * VT (3.5). The paper's eight runs (Table 2): --mask tube|mgm|tgm, with
nothing more (MAE), with --vt (MAE + VT), with --vt --no-mae (VT).

The first command builds the toy world (data/toy) and ends by itself in under five minutes on two
CPU cores; the MAE loss ends near 0.8 (1.0 is predicting each cube's mean) and samples.png shows
clip, mask and reconstruction. Run again, any command goes on from where its last checkpoint stands.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

# Loader processes share the cores with us: threads without work must sleep, not spin. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import tgmae
import toy
from tgmae import MASK_RATIOS, PRESETS, TrainingClips

TOY = {"preset": "toy", "epochs": 14, "warmup_epochs": 1, "batch_size": 16, "blr": 0.016,
       "min_lr": 1e-4,
       "stride": 4, "flip": False, "clip": "local-dir:data/toy/clip"}  # fmt: skip
REAL = {"preset": "base", "epochs": 200, "warmup_epochs": 40, "batch_size": 64, "blr": 1.5e-4,
        "min_lr": 1e-5,
        "stride": 4, "flip": True, "clip": "ViT-B-32-quickgelu"}  # fmt: skip


def check_args(args):
    positive = "epochs", "batch_size", "accum", "repeat", "stride", "temperature"
    not_negative = (
        "num_captions",
        "blr",
        "min_lr",
        "weight_decay",
        "clip_grad",
        "workers",
        "seed",
        *tgmae.RUN_FLAGS,
    )
    tgmae.check_flags(args, positive=positive, not_negative=not_negative)
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask-ratio {args.mask_ratio}: must lie between 0 and 1")
    if not (args.mae or args.vt):
        raise ValueError("--no-mae without --vt leaves nothing to optimise")
    if args.batch_size % args.repeat:
        raise ValueError(
            f"--batch-size {args.batch_size} is not divisible by --repeat {args.repeat}"
        )
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs}: must lie in 0 to --epochs {args.epochs}"
        )


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction

    def either(name, help, **more):  # a flag whose default depends on the data
        key = name[2:].replace("-", "_")
        more.setdefault("default", argparse.SUPPRESS)
        add(name, help=f"{help} (toy: {TOY[key]}, other data: {REAL[key]})", **more)

    add("--data", default="toy", help="toy, or a manifest (JSON lines, see captions.py)")
    add("--split", default="train", help="split of the manifest to train on")
    add(
        "--val-split",
        default=argparse.SUPPRESS,
        help="split for held-out losses after each epoch (none)",
    )
    either("--preset", "size of the model", choices=PRESETS)
    add(
        "--mask",
        default="tube",
        choices=MASK_RATIOS,
        help="noise, most motion, or most like the caption",
    )
    add(
        "--mask-ratio",
        type=float,
        default=argparse.SUPPRESS,
        help=f"share of cubes masked ({MASK_RATIOS})",
    )
    add(
        "--bottom-k",
        action=yes_no,
        default=False,
        help="mask the lowest scores instead of the highest",
    )
    add("--vt", action=yes_no, default=False, help="optimise the video-text contrastive loss")
    add("--mae", action=yes_no, default=True, help="optimise the reconstruction loss")
    add("--vt-weight", type=float, default=1.0, help="weight of the contrastive loss")
    add("--temperature", type=float, default=0.07, help="of the contrastive loss")
    either(
        "--clip",
        "open_clip model, hf-hub:NAME or local-dir:FOLDER; if given, vt is at least watched",
    )
    add("--clip-pretrained", default="openai", help="tag of open_clip, or a file of weights")
    add("--num-captions", type=int, default=0, help="captions to draw from, evenly spread (0: all)")
    add(
        "--init",
        default=argparse.SUPPRESS,
        help="checkpoint to start from: ours, VideoMAE's, transformers'",
    )
    add(
        "--grad-checkpointing",
        action=yes_no,
        default=False,
        help="less memory for about a third more time",
    )
    either("--epochs", "passes over the data", type=int)
    either("--warmup-epochs", "epochs of linear warm-up", type=float)
    either("--batch-size", "clips per process and forward", type=int)
    add("--accum", type=int, default=1, help="forwards per step")
    add(
        "--repeat",
        type=int,
        default=1,
        help="clips of the same frames: crop, mask and caption of their own",
    )
    either("--blr", "learning rate per 256 clips of global batch", type=float)
    either("--min-lr", "last learning rate per 256 clips", type=float)
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on matrices only")
    add("--clip-grad", type=float, default=0.0, help="largest gradient norm (0: no limit)")
    either("--stride", "frames from one frame of a clip to the next", type=int)
    either("--flip", "mirror half the clips", action=yes_no)
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="loader processes per process",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    add(
        "--amp",
        action=yes_no,
        default=argparse.SUPPRESS,
        help="bf16 autocast (where the hardware has it)",
    )
    add("--compile", action=yes_no, default=False, help="torch.compile encoder and decoder")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks")
    add("--out", default=argparse.SUPPRESS, help="run folder (runs/DATA-MASK...)")
    tgmae.add_run_flags(add)
    args = parser.parse_args(argv)

    given, defaults = vars(args), TOY if args.data == "toy" else REAL
    name = "-".join(
        [Path(args.data).stem, args.mask] + ["no-mae"] * (not args.mae) + ["vt"] * args.vt
    )
    late = {"mask_ratio": MASK_RATIOS[args.mask], "out": f"runs/{name}"}
    late |= dict.fromkeys(("val_split", "init", "amp"))
    args.clip_given = "clip" in given
    for key, value in {**defaults, **late}.items():
        given.setdefault(key, value)
    check_args(args)
    return args


# =================================================================================================
# Data.
# =================================================================================================


class Clips(TrainingClips):
    """Samples for training: `repeat` clips of the same frames of a video, each with its own crop,
    mask (unless CLIP has to see the clip first) and caption. text_from: None, "clip" (which will
    embed the captions) or "maps" (for which it has done so)."""

    def __init__(self, records, config, args, *, text_from, replace_bad=True):
        super().__init__(records, args.seed, replace_bad=replace_bad)
        self.config, self.args, self.text_from = config, args, text_from

    def load(self, place, seed):
        record, args, c = self.records[place], self.args, self.config
        generator = torch.Generator().manual_seed(seed)
        motion = args.mask == "mgm"
        with (
            tgmae.open_video(record["path"], motion=motion) as video,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", tgmae.NoMotionVectors)
            span = tgmae.frame_range(video, record.get("start"), record.get("end"))
            numbers = tgmae.clip_indices(*span, c.num_frames, args.stride, generator=generator)
            read = tgmae.read_clip(video, numbers, motion=motion)
        frames, motion = read if motion else (read, None)
        chosen = self.draw_captions(record, args.repeat, generator)
        text_map = None
        if self.text_from == "maps":
            text_map = tgmae.read_map(record["map_path"], record["captions"], args.clip)
        videos, masks = [], []
        for i in range(args.repeat):  # clips of the same frames
            crop = tgmae.multi_scale_crop(frames.shape[1:3], flip=args.flip, generator=generator)
            videos.append(tgmae.crop_frames(frames, crop, c.image_size))
            if args.mask == "tube":
                scores = tgmae.tube_scores(1, c.grid, generator=generator)
            elif args.mask == "mgm":
                scores = tgmae.motion_scores(tgmae.crop_motion(motion, crop, c.grid)[None], c.grid)
            elif text_map:
                firsts = numbers[:: c.tubelet_size]
                scores = tgmae.map_scores(
                    text_map, chosen[i], firsts, crop, frames.shape[1:3], c.grid
                )[None]
            else:
                continue  # in `prepare`, on the device, where CLIP is
            masks.append(
                tgmae.topk_mask(
                    scores, args.mask_ratio, bottom_k=args.bottom_k, generator=generator
                )[0]
            )
        return {
            "video": torch.stack(videos),
            "mask": torch.stack(masks) if masks else None,
            "captions": [record["captions"][i] for i in chosen],
            "text": text_map.text[chosen] if text_map else None,
            "name": record["video"],
            "group": place,
            "seed": seed,
            "no_motion": any(w.category is tgmae.NoMotionVectors for w in caught),
        }

    def draw_captions(self, record, count, generator):
        """Numbers of `count` captions, each drawn from --num-captions of them, evenly spread."""
        if not self.text_from:
            return []
        total = len(record["captions"])
        among = min(self.args.num_captions or total, total)
        drawn = torch.randint(among, (count,), generator=generator).tolist()
        return [(2 * i + 1) * total // (2 * among) for i in drawn]


def collate(samples):
    """Samples -> a batch of their clips: video (B,3,T,S,S) uint8, mask (B,N) or None, captions,
    ..."""
    repeat = len(samples[0]["video"])
    masks = [sample["mask"] for sample in samples]
    return {
        "video": torch.cat([sample["video"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "mask": None if masks[0] is None else torch.cat(masks),
        "captions": sum((sample["captions"] for sample in samples), []),
        "text": None
        if samples[0]["text"] is None
        else torch.cat([sample["text"] for sample in samples]),
        "groups": torch.tensor([sample["group"] for sample in samples]).repeat_interleave(repeat),
        "seeds": [sample["seed"] + i for sample in samples for i in range(repeat)],
        "bad": sum((sample["bad"] for sample in samples), []),
        "no_motion": sum(sample["no_motion"] for sample in samples),
    }


def prepare(batch, clip, args, config):
    """A batch on the device -> video (B,3,T,S,S) float, mask (B,N) on the CPU, text (B,E) or
    None."""
    video = tgmae.normalize(batch["video"].to(args.device, non_blocking=True))
    text, mask = batch["text"], batch["mask"]
    if text is not None:
        text = text.to(args.device, torch.float32, non_blocking=True)
    elif clip:
        text = tgmae.encode_text(*clip, batch["captions"])
    if mask is None:
        scores = tgmae.text_scores(
            clip[0], video, text, config.patch_size, config.tubelet_size
        ).cpu()
        mask = torch.cat(
            [
                tgmae.topk_mask(
                    score[None],
                    args.mask_ratio,
                    bottom_k=args.bottom_k,
                    generator=torch.Generator().manual_seed(seed),
                )
                for score, seed in zip(scores, batch["seeds"])
            ]
        )
    return video, mask, text


# =================================================================================================
# Optimisation.
# =================================================================================================


def make_optimizer(model, args):
    """AdamW as in VideoMAE: betas .9/.95, no decay on 1-D parameters and the mask token."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if p.ndim > 1 and name != "mask_token"]
    rest = [p for name, p in params if p.ndim <= 1 or name == "mask_token"]
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def freeze_unused(model, args, text_from):
    """What gets no gradient is frozen: DDP would wait for it, and stop at the second step."""
    if not text_from:
        model.predictor.requires_grad_(False)
    if not args.mae:
        for part in (model.decoder, model.encoder_to_decoder):
            part.requires_grad_(False)
        model.mask_token.requires_grad_(False)


def clip_together(model, args):
    """Parameters whose gradient norm --clip-grad limits together: those of a predictor that only
    watches by themselves, since it must not change what the others learn."""
    watching = [] if args.vt else list(model.predictor.parameters())
    others = [
        p for name, p in model.named_parameters() if args.vt or not name.startswith("predictor.")
    ]
    return [others, watching]


# =================================================================================================
# The run folder.
# =================================================================================================

# What a run that goes on must share with its checkpoint, beside the sizes of the model.
SAME = """data clips split text_from clip clip_pretrained mask mask_ratio bottom_k mae vt vt_weight
weight_decay seed epochs repeat""".split()


def settings(args, data):
    """What args.json and checkpoints keep of a run."""
    world = tgmae.rank_and_world()[1]
    own = {
        "clips": len(data),
        "text_from": data.text_from,
        "world": world,
        "torch": str(torch.__version__),
    }
    return vars(args) | own


def go_on(saved, model, optimizer, args, data):
    """Loads a checkpoint of the same run; another one's is refused. -> its step, of how many
    processes it was."""
    config = asdict(model.config)
    now = settings(args, data) | config
    tgmae.refuse_another_run(args, saved["args"] | saved["config"], now, (*SAME, *config))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    found = saved["step"], saved["args"]["world"]
    saved.clear()  # gigabytes
    return found


@torch.no_grad()
def draw_samples(path, model, video, mask, captions, mae):
    """samples.png: for each clip its frames, the frames with the mask, and, if a decoder was
    trained, the reconstruction, in which masked cubes have their own mean and std put back."""
    c = model.config
    model.eval()
    videos = tgmae.reconstruct(video, mask, model(video, mask)["pred"].float() if mae else None, c)
    names = [name for name in ("clip", "masked", "reconstructed") if name in videos]
    every = max(1, c.num_frames // 8)  # at most 8 frames side by side
    rows = torch.stack([videos[name][:, :, ::every] for name in names], 1)  # (B, rows, C, t, S, S)
    rows = rows.mul(255).byte().cpu()
    B, _, _, t, S, _ = rows.shape
    scale, margin = max(1, 96 // S), 16
    S = S * scale
    height = len(names) * (S + 2) + margin  # of a clip
    sheet = Image.new("RGB", (90 + t * (S + 2), B * height), "white")
    draw = ImageDraw.Draw(sheet)
    for b in range(B):
        draw.text((4, b * height + 2), captions[b] if captions else "", fill="black")
        for row, name in enumerate(names):
            top = b * height + margin + row * (S + 2)
            draw.text((4, top + S // 2), name, fill="black")
            for i in range(t):
                frame = Image.fromarray(rows[b, row, :, i].permute(1, 2, 0).numpy())
                sheet.paste(frame.resize((S, S), Image.NEAREST), (90 + i * (S + 2), top))
    sheet.save(path)


# =================================================================================================
# The run.
# =================================================================================================


def find_maps(args, manifest, records):
    """Whether the records have text maps. If so --clip becomes the CLIP that made them, and each
    map must be by that one. Some maps but not all, a file that is missing, or another --clip:
    ValueError."""
    if not any("map_path" in record for record in records):
        return False
    bare = next((record for record in records if "map_path" not in record), None)
    again = f"python captions.py maps {manifest} makes them"
    if bare:
        raise ValueError(f"{manifest}: {bare['video']} has no text map, others have; {again}")
    gone = next(
        (record["map_path"] for record in records if not os.path.exists(record["map_path"])), None
    )
    if gone:
        raise ValueError(f"{gone}: no such text map; {again}")
    first = tgmae.read_map(records[0]["map_path"], records[0]["captions"])
    wanted = tgmae.clip_name(args.clip, args.clip_pretrained)
    if args.clip_given and not first.clip.startswith(wanted + " "):
        raise ValueError(
            f"--clip: {wanted} is not the CLIP of the text maps, {first.clip}; {again}, with "
            "--force"
        )
    args.clip = first.clip
    return True


def load_data(args, rank, world):
    """-> training records, validation records or None, and where text comes from: see Clips."""
    manifest = toy.manifest_of(args.data)
    records = tgmae.read_manifest(manifest, args.split)
    val = tgmae.read_manifest(manifest, args.val_split) if args.val_split else None
    # VT is watched where that costs no download that nobody asked for: on the toy world, or with
    # --clip.
    with_text = args.mask == "tgm" or args.vt or args.data == "toy" or args.clip_given
    if with_text:  # what captions.py could not read is left out, and said so; never in validation
        failed = [record for record in records if "failed" in record]
        records = [record for record in records if "failed" not in record]
        if failed and rank == 0:
            print(
                f'{manifest}: {len(failed)} clips marked "failed" are left out, such as '
                f"{failed[0]['video']}"
            )
        held = next((record["video"] for record in val or () if "failed" in record), None)
        if held:
            raise ValueError(
                f'{manifest}: {held} of split {args.val_split!r} is marked "failed": take it out'
            )
    everything = records + (val or [])
    silent = next((record for record in everything if not record.get("captions")), None)
    if silent and with_text:
        raise ValueError(
            f"{manifest}: {silent['video']} has no captions, which --mask tgm, --vt and --clip "
            f"need; python captions.py caption {manifest} --source ... makes them"
        )
    for part, name in ((records, args.split), (val, args.val_split)):
        if part is not None and len(part) < world * args.batch_size // args.repeat * args.accum:
            raise ValueError(
                f"{manifest}: {len(part)} clips of split {name!r} are fewer than a step takes "
                f"({world} processes x --batch-size {args.batch_size} x --accum {args.accum} / "
                f"--repeat {args.repeat})"
            )
    videos = world * args.batch_size // args.repeat
    if with_text and videos < 2:
        what = "--vt" if args.vt else "VT, which is watched,"
        raise ValueError(f"{what} with a global batch of {videos} video: no negatives")
    if not with_text:
        return records, val, None
    return records, val, "maps" if find_maps(args, manifest, everything) else "clip"


def build_model(args, text_from, record, *, init=True):
    """-> model on the device, with the weights of --init unless init=False, and (clip, tokenizer),
    or None where there are text maps, or no text."""
    clip = (
        tgmae.load_clip(args.clip, args.clip_pretrained, args.device)
        if text_from == "clip"
        else None
    )
    config = replace(PRESETS[args.preset], temperature=args.temperature)
    if text_from:
        maps = None if clip else tgmae.read_map(record["map_path"], record["captions"])
        text_dim = (tgmae.encode_text(*clip, ["a"]) if clip else maps.text).shape[1]
        config = replace(config, text_dim=text_dim)
    tgmae.topk_mask(
        torch.zeros(1, *config.grid), args.mask_ratio
    )  # refuses a ratio that masks none or all
    torch.manual_seed(args.seed)
    model = tgmae.TGMAE(config)
    if args.init and init:
        theirs, weights, _ = tgmae.load_checkpoint(args.init)
        if theirs.text_dim != config.text_dim:  # its predictor was for another CLIP
            weights = {
                name: value for name, value in weights.items() if not name.startswith("predictor.")
            }
        try:
            missing = model.load_state_dict(weights, strict=False).missing_keys
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(
                f"--init {args.init}: does not fit --preset {args.preset}: {reason}"
            ) from error
        if any(name.startswith("encoder.") for name in missing):
            raise ValueError(f"--init {args.init}: has no {missing[0]}")
    model.set_grad_checkpointing(args.grad_checkpointing)
    freeze_unused(model, args, text_from)
    return model.to(args.device), clip


def describe(args, model, data, share, steps_per_epoch, step, processes_then):
    """Prints what the run is, and, if it goes on from `step`, of how many processes it was."""
    world = tgmae.rank_and_world()[1]
    c = model.config
    count = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in model.named_children()
    }
    t, h, w = c.grid
    batch, clips = args.batch_size * world, share.videos * args.repeat
    which, k = "lowest" if args.bottom_k else "highest", int(args.mask_ratio * h * w)
    mask = f"{args.mask}, {which} {k} of {h * w} patches"
    mask += f" in each of {t} slices"
    if args.mask == "tgm":
        online = f"CLIP online ({args.clip}), {c.num_patches} image embeddings a clip"
        source = online if data.text_from == "clip" else f"text maps ({args.clip})"
        mask += f"; similarity from {source}"
    loss = " + ".join(["MAE"] * args.mae + [f"{args.vt_weight:g} VT"] * args.vt)
    if data.text_from:
        loss += "" if args.vt else ", VT watched"
        loss += f"; {batch - args.repeat} negatives a clip, temperature {c.temperature:g}"
    left = clips - batch * args.accum
    left_out = f", {left} left out of each step" if left else ""
    print(
        f"model   {args.preset}, {sum(count.values()):.1f} M parameters (encoder "
        f"{count['encoder']:.1f}, decoder {count['decoder']:.1f}); clips of {c.num_frames} frames "
        f"{c.image_size}x{c.image_size}, {c.num_patches} cubes\ndata    {args.data}, split "
        f"{args.split}: {len(data)} videos, stride {args.stride}, {args.repeat} clip(s) a decode, "
        f"flip {'on' if args.flip else 'off'}\nmask    {mask}\nloss    {loss}\nsteps   "
        f"{args.epochs} epochs x {steps_per_epoch} steps; global batch {clips} = {world} "
        f"process(es) x {args.batch_size} x {args.accum}{left_out}; learning rate "
        f"{args.blr * clips / 256:.3g}\ndevice  {args.device}, {'bf16' if args.amp else 'fp32'}; "
        f"run folder {args.out}"
    )
    if processes_then:
        total = args.epochs * steps_per_epoch
        finished = ": finished, --no-resume starts over" if step == total else ""
        print(
            f"resume  at step {step} of {total}, so far of {processes_then} process(es){finished}"
        )
    sys.stdout.flush()


@torch.no_grad()
def validate(net, data, clip, args, rank, world):
    """Held-out losses, of the same clips and masks each time."""
    net.eval()
    samples = [
        (0, index) for index in DistributedSampler(data, world, rank, shuffle=False, drop_last=True)
    ]
    loader = DataLoader(
        data,
        args.batch_size // args.repeat,
        sampler=samples,
        num_workers=args.workers,
        collate_fn=collate,
        drop_last=True,
        worker_init_fn=tgmae.init_loader,
    )
    losses = []
    for batch in loader:
        video, mask, text = prepare(batch, clip, args, data.config)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = net(video, mask, text, mae=args.mae, groups=batch["groups"].to(args.device))
        losses.append([out[name].item() for name in ("mae", "vt") if name in out])
    net.train()
    mean = torch.tensor(losses).mean(0).to(args.device)
    if world > 1:
        dist.all_reduce(mean)
    names = ["val_mae"] * args.mae + ["val_vt"] * bool(data.text_from)
    return dict(zip(names, (mean / world).tolist()))


def losses_and_gradients(net, batch, clip, args, config):
    """One forward and backward -> (4,) sums to log: mae, vt, bad videos, clips without motion
    vectors."""
    video, mask, text = prepare(batch, clip, args, config)
    groups = batch["groups"].to(args.device)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        out = net(video, mask, text, mae=args.mae, watch=not args.vt, groups=groups)
    zero = torch.zeros((), device=args.device)
    mae, vt = out.get("mae", zero), out.get("vt", zero)
    # VT that is only watched trains the predictor alone, so its weight changes nothing else.
    ((mae + args.vt_weight * vt) / args.accum).backward()
    counts = zero.new_tensor([len(batch["bad"]), batch["no_motion"]])
    return torch.cat(
        [torch.stack([mae.detach().float(), vt.detach().float()]) / args.accum, counts]
    )


def log_line(args, text_from, world, sums, step, epoch, lr, norm, took, waited):
    """What log.jsonl says of a step: losses (means over ranks), schedule, speed, and what went
    wrong."""
    mae, vt, bad, no_motion = sums.tolist()
    line = {"step": step, "epoch": epoch}
    line |= {"mae": round(mae / world, 6)} if args.mae else {}
    line |= {"vt": round(vt / world, 6)} if text_from else {}
    clips = args.batch_size * args.accum * world
    line |= {"lr": lr, "grad_norm": round(norm, 4), "clips_per_s": round(clips / took, 2)}
    return line | {"wait": round(waited / took, 3), "bad": int(bad), "no_motion": int(no_motion)}


def train(args, share, saved, model, clip, data, val):
    rank, world = tgmae.rank_and_world()
    steps_per_epoch = len(data) // share.videos
    # Both rates, like VideoMAE's, are given per 256 clips.
    peak, last = (rate * share.videos * args.repeat / 256 for rate in (args.blr, args.min_lr))
    warmup = int(args.warmup_epochs * steps_per_epoch)
    optimizer = make_optimizer(model, args)
    step, processes_then = go_on(saved, model, optimizer, args, data) if saved else (0, None)
    if rank == 0:
        describe(args, model, data, share, steps_per_epoch, step, processes_then)
    if (
        args.compile
    ):  # each by itself: between them the mask's counts are read, which breaks a graph
        model.encoder.compile()
        model.decoder.compile()
    net = model
    if (
        world > 1
    ):  # no device_ids: inputs stay where they are; the predictor's buffers are equal anyway
        net = DistributedDataParallel(model, broadcast_buffers=False)
    clipped = clip_together(model, args)

    def state():
        return {
            "config": asdict(model.config),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": run.step // steps_per_epoch,
            "videos": share.videos,
            "args": settings(args, data),
        }

    with tgmae.Run(args, step, steps_per_epoch) as run:
        if rank == 0:
            (run.out / "args.json").write_text(json.dumps(settings(args, data), indent=1))
        stream = tgmae.training_batches(data, share, args, step, steps_per_epoch, collate)
        while run.step < run.total:
            lr = tgmae.learning_rate(run.step, warmup, run.total, peak, last)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            statistics = [buffer.clone() for buffer in model.predictor.buffers()]
            began, waited, sums, videos = time.perf_counter(), 0.0, 0, []
            for micro in range(args.accum):
                asked = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - asked
                videos += batch["names"]
                run.note_bad(batch["bad"])
                with (
                    contextlib.nullcontext()
                    if world == 1 or micro == args.accum - 1
                    else net.no_sync()
                ):
                    sums = sums + losses_and_gradients(net, batch, clip, args, model.config)
            limit = args.clip_grad or math.inf
            norms = [torch.nn.utils.clip_grad_norm_(part, limit).item() for part in clipped]
            sums, blamed = run.agree(sums, norms, videos)
            if blamed:  # BatchNorm has seen the bad numbers
                for buffer, value in zip(model.predictor.buffers(), statistics):
                    buffer.copy_(value)
            else:
                optimizer.step()
            epoch, took = run.step // steps_per_epoch, time.perf_counter() - began
            run.log(
                log_line(
                    args,
                    data.text_from,
                    world,
                    sums,
                    run.step + 1,
                    epoch,
                    lr,
                    norms[0],
                    took,
                    waited,
                ),
                blamed,
            )
            if val and run.step % steps_per_epoch == 0:
                losses = validate(net, val, clip, args, rank, world)
                if rank == 0:
                    tgmae.append_log(
                        run.out / "log.jsonl", {"step": run.step, "epoch": epoch, **losses}
                    )
            run.save(state)


def finish(args, model, clip, data):
    """The pictures, and what the reader should know."""
    out = Path(args.out)
    batch = collate([data[0, i * len(data) // 4] for i in range(min(4, len(data)))])
    video, mask, _ = prepare(batch, clip, args, model.config)
    with torch.compiler.set_stance("force_eager"):  # so few clips are not worth compiling for
        draw_samples(out / "samples.png", model, video, mask, batch["captions"], args.mae)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    skipped = [line["step"] for line in steps if "skipped" in line]
    last = [line for line in steps[-max(1, len(steps) // 20) :] if "skipped" not in line]
    names = [name for name in ("mae", "vt") if last and name in last[0]]
    means = ", ".join(
        f"{name} {sum(line[name] for line in last) / len(last):.3f}" for name in names
    )
    print(f"done    {means} (mean of the last {len(last)} steps); {out}/samples.png, {out}/last.pt")
    if skipped:
        print(
            f"numbers {len(skipped)} step(s) were not finite and left out, such as {skipped[0]}: "
            f"{out}/log.jsonl"
        )
    bad, no_motion = (sum(line[name] for line in steps) for name in ("bad", "no_motion"))
    if bad:
        print(
            f"bad     {bad} times a video could not be read, another took its place: "
            f"{out}/bad_videos.txt"
        )
    if no_motion:
        print(
            f"motion  {no_motion} times a video had no motion vectors: the difference of frames "
            "stood in"
        )


def main(argv=None):
    less = "a smaller --batch-size (with a larger --accum), --grad-checkpointing, --amp, "
    less += "a smaller --preset"
    with tgmae.one_line_errors("train.py", less):
        args = parse_args(argv)
        rank, world = tgmae.start_processes(args)
        saved = tgmae.load_last(args)
        share = tgmae.share_step(
            args.batch_size // args.repeat, args.accum, saved and saved["videos"]
        )
        args.batch_size, args.accum = share.forward * args.repeat, share.accum
        records, val, text_from = load_data(args, rank, world)
        model, clip = build_model(args, text_from, records[0], init=not saved)
        data = Clips(records, model.config, args, text_from=text_from)
        val = val and Clips(val, model.config, args, text_from=text_from, replace_bad=False)
        train(args, share, saved, model, clip, data, val)
        if rank == 0:
            finish(args, model, clip, val or data)


if __name__ == "__main__":
    main()
