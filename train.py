"""Pre-trains a (text-guided) video masked autoencoder.

    torchrun train.py --mask tgm --vt                      # toy world: no download, any machine
    torchrun --nproc_per_node 8 train.py --data k400.jsonl --preset base --mask tgm --vt

Loss = MAE + vt_weight * VT (3.5). The paper's runs (Table 2): --mask tube|mgm|tgm, with nothing
more (MAE), with --vt (MAE + VT), and tube and mgm with --vt --no-mae (VT). With --no-mae alone the
encoder stays random, and the predictor learns, where VT is watched: a control for Figure 4.

The first command builds the toy world (data/toy) and ends by itself in under five minutes on two
CPU cores; the MAE loss ends near 0.8 (predicting flat cubes gives 0.99) and samples.png shows
clip, mask and reconstruction. Run again, any command goes on from where its last checkpoint stands.

From top to bottom: flags, samples, data, model and optimiser, the loop. What a run needs whatever
it trains (processes, loaders, the run folder, signals) is in runs.py."""

import functools
import itertools
import json
import math
import os
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

# Loader processes share the cores with us: threads without work must sleep, after a short spin that
# spares small models much waking. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch

import dataset
import pictures
import runs
import tgmae
import weights
from dataset import UserError
from tgmae import MASK_RATIOS, PRESETS

# ==== Flags =======================================================================================
# few: from a few to a few thousand clips, on one machine, in minutes. Its epochs: FEW_STEPS steps.
RECIPES = {
    "paper": {"preset": "base", "epochs": 200, "warmup_epochs": 40.0, "batch_size": 64,
              "repeat": 1, "blr": 1.5e-4, "min_lr": 1e-5, "flip": True},
    "few": {"preset": "toy", "epochs": None, "warmup_epochs": None, "batch_size": 16,
            "repeat": 4, "blr": 0.032, "min_lr": 1e-4, "flip": True},
    "toy": {"preset": "toy", "epochs": 14, "warmup_epochs": 1.0, "batch_size": 16,
            "repeat": 1, "blr": 0.016, "min_lr": 1e-4, "flip": False},
}  # fmt: skip
FEW_STEPS, LEAST_STEPS, MANY_VIDEOS = 2000, 150, 20_000


def add_flags(parser):
    flag = functools.partial(runs.add_flag, parser)

    def by_recipe(name, help, **more):
        """A flag whose default depends on --recipe."""
        key = name[2:].replace("-", "_")
        own = [f"{recipe} {of[key]}" for recipe, of in RECIPES.items() if of[key] is not None]
        flag(name, None, f"{help}; {', '.join(own)}", **more)

    flag("--data", "toy", "toy, a folder that toy.py made, or a manifest (see captions.py)")
    whose = "whose defaults to take; toy for a toy world, else paper; few: for few videos"
    flag("--recipe", None, whose, choices=RECIPES)
    flag("--split", "train", "split of the manifest to train on")
    flag("--val-split", None, "split for held-out losses after each epoch")
    by_recipe("--preset", "size of the model", choices=PRESETS)
    flag("--num-frames", None, "frames of a clip; the preset's", type=runs.positive_int)
    flag("--image-size", None, "pixels of a clip's side; the preset's", type=runs.positive_int)
    flag("--mask", "tube", "noise, most motion, or most like the caption", choices=MASK_RATIOS)
    flag("--mask-ratio", None, f"share of the cubes; {MASK_RATIOS}", type=runs.proper_fraction)
    flag("--bottom-k", False, "mask the lowest scores instead of the highest")
    flag("--vt", False, "optimise the video-text contrastive loss")
    flag("--mae", True, "optimise the reconstruction loss")
    flag("--vt-weight", 1.0, "weight of the contrastive loss", type=runs.not_negative)
    flag("--temperature", 0.07, "of the contrastive loss", type=runs.positive)
    clips = "open_clip model, hf-hub:NAME or local-dir:FOLDER; if given, vt is at least watched"
    flag("--clip", None, f"{clips}; a toy world's own, else ViT-B-32-quickgelu")
    flag("--clip-pretrained", "openai", "tag of open_clip, or a file of weights")
    flag("--maps", True, "use the text maps of --data; --no-maps: CLIP online", dest="use_maps")
    flag("--num-captions", 0, "captions to draw from, evenly spread; 0: all", type=runs.natural)
    flag("--init", None, "checkpoint to start from: ours, VideoMAE's, transformers'")
    flag("--grad-checkpointing", False, "less memory for about a third more time")
    passes = f"passes over the data; few: as many as make {FEW_STEPS:,} steps"
    by_recipe("--epochs", passes, type=runs.positive_int)
    warmup = "epochs of linear warm-up, at most a fifth of a typed --epochs; few: a twentieth"
    by_recipe("--warmup-epochs", warmup, type=runs.not_negative)
    by_recipe("--batch-size", "clips per process and forward", type=runs.positive_int)
    flag("--accum", 1, "forwards per step", type=runs.positive_int)
    by_recipe("--repeat", "clips of the same frames, each its own crop", type=runs.positive_int)
    by_recipe("--blr", "learning rate per 256 clips of global batch", type=runs.not_negative)
    by_recipe("--min-lr", "last learning rate per 256 clips", type=runs.not_negative)
    flag("--weight-decay", 0.05, "of AdamW, on matrices only", type=runs.not_negative)
    flag("--clip-grad", 0.0, "largest gradient norm; 0: no limit", type=runs.not_negative)
    flag("--stride", 4, "frames from one of a clip to the next", type=runs.positive_int)
    by_recipe("--flip", "mirror half the clips", action=runs.YES_NO)
    flag("--workers", None, runs.WORKERS, type=runs.natural)
    flag("--device", "auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    flag("--amp", None, "bf16 autocast; where the hardware has it", action=runs.YES_NO)
    flag("--compile", False, "torch.compile encoder and decoder")
    flag("--seed", 0, "of weights, order, crops and masks", type=runs.seed)
    flag("--out", None, "run folder; runs/DATA-MASK...")
    flag("--save-minutes", 10.0, "minutes between saves; 0: epochs alone", type=runs.not_negative)
    flag("--resume", True, "go on from the run folder's last.pt")


def parse_args(argv=None):
    parser = runs.Parser(prog="train.py", description=__doc__.splitlines()[0])
    add_flags(parser)
    first = parser.parse_args(argv)
    world = runs.toy_world(first.data)
    recipe = first.recipe or ("toy" if world else "paper")
    late = RECIPES[recipe] | {"recipe": recipe, "clip_given": False}
    if first.epochs and recipe != "few":
        late["warmup_epochs"] = min(late["warmup_epochs"], first.epochs / 5)
    if recipe == "toy":
        world = world or Path("data/toy")
    late["clip"] = f"local-dir:{world}/clip" if world else "ViT-B-32-quickgelu"
    late["mask_ratio"] = MASK_RATIOS[first.mask]
    loss = ("" if first.mae else "-no-mae") + ("-vt" if first.vt else "")
    late["out"] = runs.name_run("runs/", first.data, f"-{first.mask}{loss}")
    parser.set_defaults(**late)
    args = parser.parse_args(argv)
    args, typed = runs.parse_like_run(parser, lambda: parser.parse_args(argv), args)
    args.clip_typed = bool({"clip", "clip_pretrained"} & typed)
    args.clip_given = args.clip_given or "clip" in typed
    check_args(args)
    return args


def check_args(args):
    """What holds between flags; what holds of one of them its type says."""
    patch_size, tubelet_size = PRESETS[args.preset].patch_size, PRESETS[args.preset].tubelet_size
    if args.image_size and args.image_size % patch_size:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of {patch_size}")
    if args.num_frames and args.num_frames % tubelet_size:
        raise UserError(f"--num-frames {args.num_frames}: must be a multiple of {tubelet_size}")
    if args.batch_size % args.repeat:
        raise UserError(
            f"--batch-size {args.batch_size} is not divisible by --repeat {args.repeat}"
        )


# ==== Samples =====================================================================================
class Clips(runs.TrainingClips):
    """Samples for training: `repeat` clips of the same frames of a video, each with its own crop,
    mask and caption. text_from: None, "clip" (which will embed the captions) or "maps" (for which
    it has done so)."""

    def __init__(self, records, config, args, *, text_from, replace_bad=True):
        super().__init__(records, args.seed, replace_bad=replace_bad)
        self.config, self.args, self.text_from = config, args, text_from
        # Where CLIP sees clips online, `prepare` makes their masks; all others `load` makes.
        self.masks_from_clip = args.mask == "tgm" and text_from == "clip"

    def load(self, place, seed):
        record, args, c = self.records[place], self.args, self.config
        generator = torch.Generator().manual_seed(seed)
        frames, motion, numbers, order, no_motion = self.read(record, generator)
        size, firsts = frames.shape[1:3], numbers[:: c.tubelet_size]
        chosen = self.draw_captions(record, args.repeat, generator)
        text_map = None
        if self.text_from == "maps":
            text_map = dataset.read_map(
                record["map_path"], record["captions"], args.clip, order, record["path"], numbers
            )
        videos, masks = [], []
        for number in chosen:  # a clip of the same frames for each caption
            crop = dataset.multi_scale_crop(size, flip=args.flip, generator=generator)
            videos.append(dataset.crop_frames(frames, crop, c.image_size))
            if self.masks_from_clip:
                continue
            if args.mask == "tube":
                scores = tgmae.tube_scores(1, c.grid, generator=generator)
            elif args.mask == "mgm":
                cropped = dataset.crop_motion(motion, crop, c.grid)
                scores = tgmae.motion_scores(cropped[None], c.grid, generator=generator)
            elif args.mask == "tgm":
                scores = dataset.map_scores(text_map, number, firsts, crop, size, c.grid)[None]
            else:
                raise RuntimeError(f"--mask {args.mask}: Clips.load computes no scores for it")
            masks.append(tgmae.topk_mask(scores, args.mask_ratio, bottom_k=args.bottom_k))
        return {
            "video": torch.stack(videos),  # (repeat,3,T,S,S) uint8
            "mask": torch.cat(masks) if masks else None,  # (repeat,N)
            "captions": [record["captions"][i] for i in chosen if i is not None],
            "text": text_map.text[chosen] if text_map else None,  # (repeat,E)
            "name": record["video"],
            "group": place,
            "no_motion": no_motion,
            "short": len(set(numbers)) < len(numbers),
        }

    def read(self, record, generator):
        """-> frames (T,H,W,3), motion (T,H/8,W/8) or None, numbers of the frames and their order,
        whether motion is the difference of frames."""
        args, with_motion = self.args, self.args.mask == "mgm"
        with (
            dataset.open_video(record["path"], motion=with_motion) as video,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", dataset.NoMotionVectors)
            span = dataset.frame_range(video, record.get("start"), record.get("end"))
            count = self.config.num_frames
            numbers = dataset.clip_indices(*span, count, args.stride, generator=generator)
            read = dataset.read_clip(video, numbers, motion=with_motion)
        frames, motion = read if with_motion else (read, None)
        no_motion = any(w.category is dataset.NoMotionVectors for w in caught)
        return frames, motion, numbers, video.index.order, no_motion

    def captions_used(self, record):
        """Numbers of the --num-captions captions, evenly spread, of which one is drawn."""
        total = len(record["captions"])
        among = min(self.args.num_captions or total, total)
        return [(2 * i + 1) * total // (2 * among) for i in range(among)]

    def draw_captions(self, record, count, generator):
        """Numbers of `count` captions."""
        if not self.text_from:
            return [None] * count
        used = self.captions_used(record)
        return [used[i] for i in torch.randint(len(used), (count,), generator=generator).tolist()]


def collate(samples):
    """Samples -> a batch of their clips: video (B,3,T,S,S) uint8, mask (B,N) or None, captions,
    text (B,E) or None, ... If one of them is unreadable: {"unreadable": [(video, why), ...]}."""
    unreadable = sum((sample.get("unreadable", []) for sample in samples), [])
    if unreadable:
        return {"unreadable": unreadable}
    repeat = len(samples[0]["video"])

    def joined(key):
        return None if samples[0][key] is None else torch.cat([sample[key] for sample in samples])

    return {
        "video": joined("video"),
        "mask": joined("mask"),
        "captions": sum((sample["captions"] for sample in samples), []),
        "text": joined("text"),
        "names": [sample["name"] for sample in samples],
        "groups": torch.tensor([sample["group"] for sample in samples]).repeat_interleave(repeat),
        "bad": sum((sample["bad"] for sample in samples), []),
        "no_motion": sum(sample["no_motion"] for sample in samples),
        "short": sum(sample["short"] for sample in samples),
    }


def prepare(batch, clip, args, config):
    """A batch -> video (B,3,T,S,S) float, on the device, mask (B,N) on the CPU, text (B,E) or None.
    clip: (clip, tokenizer), or None where text comes from maps, or there is none."""
    to_gpu = args.device == "cuda"  # elsewhere the source may be gone before it is copied
    video = tgmae.normalize(batch["video"].to(args.device, non_blocking=to_gpu))
    text, mask = batch["text"], batch["mask"]
    if text is not None:
        text = text.to(args.device, torch.float32, non_blocking=to_gpu)
    elif clip:
        text = tgmae.encode_text(*clip, batch["captions"])
    if mask is None:  # text masks of CLIP, online
        scores = tgmae.text_scores(clip[0], video, text, config.patch_size, config.tubelet_size)
        mask = tgmae.topk_mask(scores.cpu(), args.mask_ratio, bottom_k=args.bottom_k)
    return video, mask, text


# ==== Data ========================================================================================
def load_data(args):
    """-> training records, validation records or None, and where text comes from: see Clips."""
    manifest = manifest_of(args.data)
    records = dataset.read_manifest(manifest, args.split)
    val = dataset.read_manifest(manifest, args.val_split) if args.val_split else None
    if val:
        sides = {f"--split {args.split}": records, f"--val-split {args.val_split}": val}
        dataset.refuse_shared_clips(manifest, sides)
    # VT is watched where that costs no download that nobody asked for: on the toy world, or with
    # --clip.
    watched = runs.toy_world(args.data) or args.clip_given
    if not (args.mask == "tgm" or args.vt or watched):
        if not args.mae:
            raise UserError("--no-mae without --vt leaves nothing to learn, unless VT is watched")
        if args.clip_typed:
            tag = args.clip_pretrained
            raise UserError(f"--clip-pretrained {tag}: needs --mask tgm, --vt or --clip")
        return records, val, None
    records = without_failed(manifest, records)
    val = val and without_failed(manifest, val)
    with_maps = args.use_maps and len(records) > 0 and "map_path" in records[0]
    for record in itertools.chain(records, val or ()):
        check_text(args, manifest, record, with_maps)
    if with_maps:
        args.clip = clip_of_maps(args, manifest, records[0])
    return records, val, "maps" if with_maps else "clip"


def manifest_of(data):
    """For --data: the path of a manifest, that of a toy world, or "toy": of the world in data/toy,
    made if need be."""
    if data == "toy":
        import toy

        return toy.manifest_of()
    return runs.manifest_path(data)


def check_sizes(args, records, val, text_from):
    """UserError if there are fewer clips than a step takes, or no negatives for VT."""
    world = runs.rank_and_world()[1]
    videos = world * args.batch_size // args.repeat
    for part, name, accum in ((records, args.split, args.accum), (val, args.val_split, 1)):
        if part is not None and len(part) < videos * accum:
            few = "; --recipe few has settings for few videos" if args.recipe == "paper" else ""
            raise UserError(
                f"{part.path}: {len(part)} clips of split {name!r} are fewer than a step takes "
                f"({world} processes x --batch-size {args.batch_size} x --accum {accum} / --repeat "
                f"{args.repeat}){few}"
            )
    if text_from and videos < 2:
        what = "--vt" if args.vt else "VT, which is watched,"
        raise UserError(f"{what} with a global batch of {videos} video: no negatives")


def without_failed(manifest, records):
    """Leaves out what captions.py could not read."""
    failed = np.fromiter(("failed" in record for record in records), bool, len(records))
    if failed.any():
        example = records[failed][0]["video"]
        runs.say(
            f'{manifest}: {failed.sum()} clips marked "failed" are left out, such as {example}'
        )
    return records[~failed]


def check_text(args, manifest, record, with_maps):
    """UserError if a record lacks what its text needs."""
    clip, maps = f"{manifest}: {record['video']}", f"python captions.py maps {manifest} makes them"
    if not record.get("captions"):
        raise UserError(
            f"{clip} has no captions, which --mask tgm, --vt and --clip need; python captions.py "
            f"caption {manifest} --source ... makes them"
        )
    if with_maps and "map_path" not in record:
        raise UserError(f"{clip} has no text map, others have; {maps}")
    if args.use_maps and not with_maps and "map_path" in record:
        raise UserError(f"{clip} has a text map, others have none; {maps}")
    if with_maps and not os.path.exists(record["map_path"]):
        raise UserError(f"{clip} has no text map at {record['map_path']}; {maps}")


def clip_of_maps(args, manifest, record):
    """The CLIP that made the text maps, of which one is read. UserError if --clip is another."""
    made_by = dataset.read_map(record["map_path"], record["captions"]).clip
    wanted = dataset.clip_name(args.clip, args.clip_pretrained)
    if not args.clip_typed or args.clip == made_by:  # the latter in a run that goes on
        return made_by
    folder = args.clip.removeprefix("local-dir:")
    if os.path.isdir(folder) or os.path.isfile(args.clip_pretrained):  # two paths may end alike
        clip, _ = weights.load_clip(args.clip, args.clip_pretrained, "cpu")
        wanted = f"{wanted} {weights.digest(clip.state_dict(), torch.bfloat16)}"
    if wanted not in (made_by, made_by.rsplit(" ", 1)[0]):
        raise UserError(
            f"--clip: {wanted} is not the CLIP of the text maps, {made_by}; python captions.py "
            f"maps {manifest} makes them again, with --force"
        )
    return made_by


# ==== Model and optimiser =========================================================================
def build_model(args, text_from, record, saved=None):
    """-> model on the device, with the weights of --init unless the run goes on from `saved`, and
    (clip, tokenizer), or None where there are text maps, or no text."""
    config = replace(PRESETS[args.preset], temperature=args.temperature)
    if args.num_frames:
        config = replace(config, num_frames=args.num_frames)
    if args.image_size:
        config = replace(config, image_size=args.image_size)
    clip = None
    if text_from == "clip":
        clip = weights.load_clip(args.clip, args.clip_pretrained, args.device)
        config = replace(config, text_dim=tgmae.encode_text(*clip, ["a"]).shape[1])
    elif text_from == "maps":
        maps = dataset.read_map(record["map_path"], record["captions"])
        config = replace(config, text_dim=maps.text.shape[1])
        side, patch = config.image_size, config.patch_size
        if (min(maps.resized), maps.patch_size) != (side, patch):
            runs.say(
                f"note    text maps of {min(maps.resized)} pixels in patches of "
                f"{maps.patch_size}; the model sees {side} in patches of {patch}: captions.py maps "
                f"--image-size {side} --patch-size {patch} --force makes such maps"
            )
    runs.check_mask_ratio(args.mask_ratio, config.grid)
    if args.device == "cpu" and args.amp and config.num_patches < 256:
        # Of so few tokens torch's fused attention in bf16 takes three times as long as the plain.
        torch.backends.cuda.enable_flash_sdp(False)  # on a CPU, too
    state = {}
    if saved:  # it may be that of --init
        config = replace(config, layer_norm_eps=saved["config"]["layer_norm_eps"])
    elif args.init:
        config, state = load_weights(config, args)
    torch.manual_seed(args.seed)
    model = tgmae.TGMAE(config)
    model.load_state_dict(state, strict=False)
    if args.grad_checkpointing:
        runs.checkpoint_blocks(model)
    freeze_unused(model, args, text_from)
    return model.to(args.device), clip


def freeze_unused(model, args, text_from):
    """What gets no gradient is frozen: DDP would wait for it, and stop at the second step."""
    if not text_from:
        model.predictor.requires_grad_(False)
    if not args.mae:
        model.decoder.requires_grad_(False)
        model.encoder_to_decoder.requires_grad_(False)
        model.mask_token.requires_grad_(False)
    if not (args.mae or args.vt):  # the predictor learns by itself: a control for Figure 4
        model.encoder.requires_grad_(False)


# What --init may have another value of than the model; and where it has no decoder.
OTHER = {"num_frames", "image_size", "text_dim", "temperature", "layer_norm_eps"}
OF_DECODER = {"decoder_embed_dim", "decoder_depth", "decoder_num_heads"}


def load_weights(config, args):
    """-> config with the layer_norm_eps of --init, and its weights: the encoder, the decoder if it
    has one, the predictor if it has one for a CLIP of the same width. Says what begins anew.
    UserError if the sizes are others."""
    theirs, state, rest = weights.load_checkpoint(args.init)
    then, now = asdict(theirs), asdict(config)
    free = OTHER if "mask_token" in state else OTHER | OF_DECODER
    names = [name for name in now if name not in free and then[name] != now[name]]
    if names:
        unfit = ", ".join(f"{name} {then[name]}, not {now[name]}" for name in names)
        raise UserError(f"--init {args.init}: does not fit --preset {args.preset}: {unfit}")
    if not rest["norm_pix_loss"]:
        if args.mae and "mask_token" in state:
            raise UserError(f"--init {args.init}: its decoder's targets are not normalised")
        state = {name: v for name, v in state.items() if weights.part_of(name) != "decoder"}
    if theirs.text_dim != config.text_dim:
        state = {name: v for name, v in state.items() if not name.startswith("predictor.")}
    ours = {"encoder", "encoder.norm", "decoder", "predictor"}
    there = {weights.part_of(name) for name in state}
    line = f"init    {args.init}: {', '.join(sorted(ours & there))}"
    if ours - there:
        line += f"; begin anew: {', '.join(sorted(ours - there))}"
    if there - ours:
        line += f"; left out: {', '.join(sorted(there - ours))}"
    runs.say(line)
    runs.note_unended(args.init, rest)
    if rest["assumed"]:
        runs.say(
            f"note    {args.init} does not say the size of its clips: {rest['assumed']} assumed"
        )
    if theirs.layer_norm_eps != config.layer_norm_eps:
        runs.say(f"init    layer_norm_eps {theirs.layer_norm_eps:g}, as there")
    if (theirs.num_frames, theirs.image_size) != (config.num_frames, config.image_size):
        runs.say(
            f"init    {args.init}: trained on clips of {theirs.num_frames} frames, "
            f"{theirs.image_size} pixels; positions are computed for {config.num_frames} frames, "
            f"{config.image_size} pixels"
        )
    return replace(config, layer_norm_eps=theirs.layer_norm_eps), state


def make_optimizer(model, args):
    """AdamW as in VideoMAE: betas .9/.95, no decay on 1-D parameters and the mask token."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if p.ndim > 1 and name != "mask_token"]
    rest = [p for name, p in params if p.ndim <= 1 or name == "mask_token"]
    groups = [{"params": decay, "weight_decay": args.weight_decay}]
    groups += [{"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def clip_gradients(model, args):
    """Limits the gradient's norm to --clip-grad. -> the norm before. A predictor that only watches
    is limited by itself: it must not change what the others learn. Its norm counts if it is not
    finite."""
    limit = args.clip_grad or math.inf
    watching = [] if args.vt else list(model.predictor.parameters())
    watched = set(watching)
    others = [p for p in model.parameters() if p not in watched]
    norm = torch.nn.utils.clip_grad_norm_(others, limit)
    of_watching = torch.nn.utils.clip_grad_norm_(watching, limit)
    return norm.item() if of_watching.isfinite() else of_watching.item()


def go_on(saved, model, optimizer, args, settings, total):
    """Loads a checkpoint of the same run; another one's is refused. -> its step, of `total`."""
    defaults = vars(parse_args(["--data", args.data, "--no-resume"]))
    older = {"in_chans": 3, "norm_pix_loss": True}  # what older checkpoints could have otherwise
    runs.refuse_another_run(args, saved, settings | asdict(model.config) | older, defaults)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
    saved.clear()  # gigabytes
    finished = ": finished, --no-resume starts over" if step == total else ""
    runs.say(f"resume  at step {step} of {total}{finished}")
    return step


# ==== The loop ====================================================================================
# Why a run that was killed goes on to the same weights: last.pt holds the weights, the moments and
# the step. All else follows from (seed, epoch, index): which clips a step takes, their crops, masks
# and captions; nothing else draws. What comes after last.pt in the log is cut off, and done again.
#
# What a second process changes: each takes every other clip of a step, gradients are averaged over
# both, and VT's negatives are the clips of both. So a step of one forward is what it would be in
# one process. With --accum, or fewer processes, negatives are fewer: they are those of a forward.


def train(args, share, saved, settings, model, clip, data, val):
    """saved: the checkpoint from which it goes on, or None. settings: what checkpoints keep of the
    run, and compare. Leaves last.pt and log.jsonl in --out."""
    rank, world = runs.rank_and_world()
    out, c, steps_per_epoch = Path(args.out), model.config, len(data) // share.videos
    total, warmup = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)
    # Both rates, like VideoMAE's, are given per 256 clips.
    peak = args.blr * share.videos * args.repeat / 256
    least = args.min_lr * share.videos * args.repeat / 256
    optimizer = make_optimizer(model, args)
    describe(args, c, data, val, share, total, clip)
    start = go_on(saved, model, optimizer, args, settings, total) if saved else 0
    if args.compile:  # each by itself: between them the mask's counts break a graph
        model.encoder.compile()
        model.decoder.compile()
    net = runs.distributed(model)
    logged = runs.open_log(out, start)
    if rank == 0 and start < total:
        with runs.replacing(out / "args.json", "w") as file:
            file.write(json.dumps(settings, indent=1))
    ends_with_a_step = "lr" in logged  # not with the validation after it
    if val and start and start % steps_per_epoch == 0 and ends_with_a_step:
        validate(start, start // steps_per_epoch - 1, net, val, clip, args)
    done, last_saved_step = start, start
    last_saved_at = time.monotonic()
    draws = functools.partial(draw, out, model, val or data, clip, args)
    draw_at = last_saved_at + 60
    zero = torch.zeros((), device=args.device)
    runs.listen()
    with runs.progress(total=total, initial=start, unit="step", disable=rank > 0) as bar:
        for step, batches in runs.steps(data, share, args, start, collate):
            epoch, began = step // steps_per_epoch, time.perf_counter()
            lr = runs.learning_rate(step, warmup, total, peak, least)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            mae_sum = vt_sum = zero
            bad = no_motion = short = 0
            waited, names = 0.0, []
            for micro, batch in enumerate(batches, 1):
                video, mask, text = prepare(batch, clip, args, c)
                groups = batch["groups"].to(args.device)
                with runs.averaging_if(net, last=micro == share.accum):
                    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                        losses = net(
                            video, mask, text, mae=args.mae, watch=not args.vt, groups=groups
                        )
                    mae, vt = losses.get("mae", zero), losses.get("vt", zero)
                    # (3.5). VT that is only watched gives the encoder no gradient; it trains the
                    # predictor, which AdamW does alike whatever the weight.
                    loss = mae + args.vt_weight * vt
                    (loss / share.accum).backward()
                mae_sum = mae_sum + mae.detach().float() / share.accum
                vt_sum = vt_sum + vt.detach().float() / share.accum
                bad += len(batch["bad"])
                no_motion += batch["no_motion"]
                short += batch["short"]
                waited += batch["waited"]
                names += batch["names"]
                runs.list_bad(out / "bad_videos.txt", batch["bad"])

            norm = clip_gradients(model, args)
            loss_finite = bool((mae_sum + vt_sum).isfinite())
            broken = not (loss_finite and math.isfinite(norm))
            counts = zero.new_tensor([broken, runs.asked_to_stop(), bad, no_motion, short])
            sums = runs.sum_over_ranks(torch.cat([torch.stack([mae_sum, vt_sum]), counts]))
            all_mae, all_vt, any_broken, any_stop = sums[:4]  # of all processes
            all_bad, all_no_motion, all_short = map(int, sums[4:])
            if any_broken:
                runs.stop_not_finite(args, step + 1, names if world == 1 or not loss_finite else [])
            optimizer.step()
            done = step + 1

            took = time.perf_counter() - began
            line = {"step": done, "epoch": epoch}
            if args.mae:
                line["mae"] = round(all_mae / world, 6)
            if data.text_from:
                line["vt"] = round(all_vt / world, 6)
            line |= {"lr": lr, "grad_norm": round(norm, 4)}
            line["clips_per_s"] = round(args.batch_size * share.accum * world / took, 2)
            line |= {"wait": round(waited / took, 3)}
            line |= {"bad": all_bad, "no_motion": all_no_motion, "short": all_short}
            if rank == 0:
                runs.append_log(out / "log.jsonl", line)
            bar.set_postfix({k: line[k] for k in ("mae", "vt", "wait") if k in line}, refresh=False)
            bar.update()

            epoch_ends = done % steps_per_epoch == 0
            late = 0 < 60 * args.save_minutes <= time.monotonic() - last_saved_at
            if rank == 0 and (epoch_ends or late or any_stop):
                state = {"config": asdict(c), "model": model.state_dict(), "step": done}
                state |= {"optimizer": optimizer.state_dict(), "epoch": done // steps_per_epoch}
                state |= {"videos": share.videos, "args": settings}
                runs.save_checkpoint(out / "last.pt", **state)
                last_saved_step, last_saved_at = done, time.monotonic()
            if any_stop and done < total:
                break  # the run that goes on validates first
            if val and epoch_ends:
                validate(done, epoch, net, val, clip, args)
            if rank == 0 and last_saved_step == done < total and time.monotonic() > draw_at:
                drawn_at = time.monotonic()
                draws()
                # Once a minute, and for a twentieth of the time, at most.
                draw_at = drawn_at + max(60, 20 * (time.monotonic() - drawn_at))

    runs.leave(out, last_saved_step, unfinished=done < total, draw=draws)


@torch.no_grad()
def validate(step, epoch, net, data, clip, args):
    """Held-out losses after an epoch go into the log: of the same clips and masks each time. All
    processes leave out a batch in which one has a clip that cannot be read."""
    rank, world = runs.rank_and_world()
    net.eval()
    mine = range(rank, len(data) // world * world, world)
    size, samples, losses, bad = args.batch_size // args.repeat, [(0, i) for i in mine], [], []
    batches = runs.batches_of(
        data, args.workers, batch_size=size, sampler=samples, drop_last=True, collate_fn=collate
    )
    for batch in batches:
        unreadable = sum(runs.gather_objects(batch.get("unreadable", [])), [])
        if unreadable:
            bad.append(unreadable)
            continue
        video, mask, text = prepare(batch, clip, args, data.config)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = net(video, mask, text, mae=args.mae, groups=batch["groups"].to(args.device))
        names = [name for name in ("mae", "vt") if name in out]
        losses.append([out[name].item() for name in names])
    net.train()
    line = {"step": step, "epoch": epoch}
    if losses:
        mean = torch.tensor(losses).mean(0)
        for name, total in zip(names, runs.sum_over_ranks(mean.to(args.device))):
            line[f"val_{name}"] = total / world
    if bad:
        line["val_bad"] = len(bad)
        runs.say(
            f"note    {len(bad)} of {len(bad) + len(losses)} held-out batches left out, since a "
            f"clip cannot be read: {bad[0][0][1]}"
        )
    if rank == 0:
        runs.list_bad(Path(args.out) / "bad_videos.txt", sum(bad, []))
        runs.append_log(Path(args.out) / "log.jsonl", line)


# ==== The run =====================================================================================
def describe(args, c, data, val, share, total, clip):
    """Prints what the run of `total` steps is. c: the model's Config."""
    world, patches = runs.rank_and_world()[1], c.grid[1] * c.grid[2]
    batch, clips = args.batch_size * world, share.videos * args.repeat
    text, loss = "", "MAE"
    if args.vt:
        loss = f"MAE + {args.vt_weight:g} VT" if args.mae else f"{args.vt_weight:g} VT"
    elif data.text_from:
        loss = "MAE, VT watched" if args.mae else "VT, of the predictor alone"
    if data.text_from:
        how = {"clip": "CLIP online", "maps": "text maps"}[data.text_from]
        distinct = {r["captions"][i] for r in data.records for i in data.captions_used(r)}
        runs.note_sides(args, distinct)
        if clip:
            runs.note_clip(args, clip[1], distinct)
        text = f"; {how} ({args.clip}); {len(distinct):,} distinct captions"
        negatives = batch - args.repeat
        loss += f"; {negatives} negatives a clip: by chance VT is {math.log(negatives + 1):.2f}"
        loss += f"; temperature {c.temperature:g}"
    which, masked = "lowest" if args.bottom_k else "highest", int(args.mask_ratio * patches)
    of_videos = f", {args.repeat} of each video" if args.repeat > 1 else ""
    left = clips - batch * share.accum
    left = f", {left} left out of each step" if left else ""
    runs.say(f"""\
model   {args.preset}; clips of {c.num_frames} frames, {c.image_size}x{c.image_size}
recipe  {args.recipe}
data    {args.data}, split {args.split}: {len(data)} videos{text}
mask    {args.mask}, {which} {masked} of {patches} patches in each of {c.grid[0]} slices
loss    {loss}
batch   {clips} clips = {world} x {args.batch_size} x {share.accum}{of_videos}{left}
steps   {args.epochs} epochs x {total // args.epochs}, {args.warmup_epochs:g} of them warm-up; \
rate {args.blr * clips / 256:.3g}
device  {args.device}, {"bf16" if args.amp else "fp32"}; run folder {args.out}""")
    if val:
        whole = len(val) // (batch // args.repeat) * (batch // args.repeat)
        runs.say(
            f"val     {whole} of the {len(val)} videos of split {args.val_split}, in whole batches"
        )
    if args.recipe == "paper" and len(data) < MANY_VIDEOS:
        fit = "--recipe few has settings for few videos"
        runs.say(f"note    {len(data):,} videos are few for the paper's settings; {fit}")
    if total < LEAST_STEPS:
        runs.say(f"note    {total} steps are too few to learn from; {LEAST_STEPS} at least")


def draw(out, model, data, clip, args):
    """losses.png: what log.jsonl holds, and samples.png."""
    with runs.replacing(out / "losses.png") as file:
        pictures.draw_losses(runs.read_log(out)).savefig(file, format="png")
    draw_samples(out / "samples.png", model, data, clip, args)


@torch.no_grad()
def draw_samples(path, model, data, clip, args):
    """samples.png: of four clips the frames, the mask, and, if a decoder was trained, the
    reconstruction, in which masked cubes have their own mean and std put back."""
    c, count = model.config, min(4, len(data))
    samples = [data[0, i * len(data) // count] for i in range(count)]
    readable = [sample for sample in samples if "unreadable" not in sample]
    if not readable:
        runs.say(f"note    {path} is not drawn: {samples[0]['unreadable'][0][1]}")
        return
    batch = collate(readable)
    video, mask, _ = prepare(batch, clip, args, c)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # so few clips are not worth compiling for
        pred = model(video, mask)["pred"].float() if args.mae else None
    model.train()
    made = pictures.reconstruct(video, mask, pred, c)
    mask = f"{args.mask} mask {args.mask_ratio:.0%}"
    page = pictures.draw_samples(made, batch["captions"], mask, every=args.repeat)
    with runs.replacing(path) as file:
        page.save(file, "PNG")


def finish(out):
    """Says how the run ended."""
    lines = [line for line in runs.read_log(out) if "lr" in line]  # of steps, not of validation
    last = lines[-max(1, len(lines) // 20) :]
    for name in ("mae", "vt"):
        if found := [line[name] for line in last if line.get(name) is not None]:
            print(f"{name:<8}{sum(found) / len(found):.3f}, mean of the last {len(found)} steps")
    runs.say_counts(out)
    print(f"done    {out}/samples.png, {out}/losses.png, {out}/last.pt")
    print(f"next    python eval.py show {out}/last.pt")


def facts_of(args, records, text_from, clip, goes_on):
    """What a run learns from, beside its flags: digests, and how its text maps were made."""
    keys = ["video", "start", "end"]
    if text_from:
        keys.append("captions")
    facts = {"clips": len(records), "text_from": text_from, "world": runs.rank_and_world()[1]}
    whole = dataset.read_manifest(runs.manifest_path(args.data), args.split)  # failed ones, too
    facts["split_clips"] = runs.digest_of_clips(whole)
    facts |= {"torch": str(torch.__version__), "records": runs.digest_of_records(records, keys)}
    if clip:
        facts["clip_weights"] = weights.digest(clip[0].state_dict(), torch.bfloat16)
    if text_from == "maps":
        found = dataset.read_map(records[0]["map_path"], records[0]["captions"])
        every = int(found.frames.diff()[0]) if len(found.frames) > 1 else 0
        facts["maps"] = f"{min(found.resized)} pixels, patches of {found.patch_size}, every {every}"
    if args.init:
        facts |= runs.digest_of_weights(args.init, goes_on)
    return facts


def run(args):
    """All of it, in a folder that is locked."""
    saved = runs.load_last(args)
    own = Path(args.out, "last.pt").resolve()
    if args.init and not saved and Path(args.init).resolve() == own:
        raise UserError(f"--init {args.init}: a new run in its folder replaces it; another --out")
    records, val, text_from = load_data(args)
    if args.recipe == "few":
        runs.fit_to_few(args, len(records), FEW_STEPS, clips_of_video=args.repeat)
    if not saved:  # else a typed --epochs is refused as another run's
        runs.check_warmup(args)
    share = runs.share_step(args.batch_size // args.repeat, args.accum, saved and saved["videos"])
    flags = dict(vars(args))  # as given; from here on batch_size and accum are a process's share
    del flags["clip_typed"]
    args.batch_size, args.accum = share.forward * args.repeat, share.accum
    check_sizes(args, records, val, text_from)
    model, clip = build_model(args, text_from, records[0], saved)
    settings = flags | facts_of(args, records, text_from, clip, goes_on=bool(saved))
    data = Clips(records, model.config, args, text_from=text_from)
    val = val and Clips(val, model.config, args, text_from=text_from, replace_bad=False)
    train(args, share, saved, settings, model, clip, data, val)
    if runs.rank_and_world()[0] == 0:
        draw(Path(args.out), model, val or data, clip, args)
        finish(Path(args.out))


def main(argv=None):
    less = "a smaller --batch-size (with a larger --accum) or --preset, --grad-checkpointing, --amp"
    with runs.one_line_errors("train.py", less):
        args = parse_args(argv)
        runs.start_processes(args)
        with runs.lock_folder(Path(args.out)):
            run(args)


if __name__ == "__main__":
    main()
