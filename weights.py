"""Weights in and out: official VideoMAE files, transformers' folders and hub names, and our own
checkpoints, all in the names of tgmae.py; CLIP, with the ways out where it is missing.

    config, state, rest = load_checkpoint("MCG-NJU/videomae-base")
    model = tgmae.TGMAE(config)
    model.load_state_dict(state, strict=False)  # the predictor is ours alone

Nothing here needs transformers, of which some versions zero biases as they load.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import errors, hf_hub_download

import tgmae
from dataset import UserError


def first_line(error):
    """What an exception says, in one line; one that says nothing is called by its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def bf16_is_fast(device) -> bool:
    """Whether bf16 pays here: on GPUs since Ampere, and on CPUs with bf16 instructions."""
    kind = torch.device(device).type
    if kind != "cpu":
        return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def load_clip(name, pretrained, device):
    """tgmae.load_clip for --clip and --clip-pretrained, its image tower in bf16 where that is fast.
    UserError that names the flags and the ways out."""
    if name.startswith(("local-dir:", "hf-hub:")) and pretrained not in (None, "openai"):
        raise UserError(
            f"--clip-pretrained {pretrained}: --clip {name} has weights of its own; leave it out, "
            "or say openai, the default"
        )
    try:
        clip, tokenizer = tgmae.load_clip(name, pretrained, device)
    except (RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--clip {name} --clip-pretrained {pretrained}: {first_line(error)}. Ways out: "
            "--clip-pretrained FILE (weights on disk), --clip local-dir:FOLDER (an open_clip "
            "folder), or, in training, a manifest with text maps"
        ) from error
    if bf16_is_fast(device):  # the weights: autocast would turn off attention's fast path
        clip.visual.to(torch.bfloat16)
    return clip, tokenizer


PATCH_EMBED = "encoder.patch_embed.proj.weight"
QKV = ("query", "key", "value")
# (ours, transformers'), replaced wherever they stand, in this order. Older files of transformers
# say q_bias and v_bias, as we do.
NAMES = (
    ("encoder.patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "encoder.layer."),
    ("encoder.norm.", "layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.q_bias", ".attention.attention.query.bias"),
    (".attn.v_bias", ".attention.attention.value.bias"),
    (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def our_name(name):
    """A weight's name in a file of VideoMAE's or transformers' -> ours. The latter's query, key and
    value, of which we make one matrix, stay three."""
    name = re.sub(r"^classifier\b", "head", name.removeprefix("videomae."))
    for ours, theirs in NAMES:
        name = name.replace(theirs, ours)
    official_fine_tuned = name.startswith(("patch_embed.", "blocks.", "norm."))
    return f"encoder.{name}" if official_fine_tuned else name


def huggingface_name(name):
    """Our name of a weight -> that of transformers' models."""
    name = re.sub(r"^encoder\.", "videomae.encoder.", re.sub(r"^head\b", "classifier", name))
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def own_name(name, state_dict):
    """What a state dict calls a weight of ours; of a qkv it is the query's name."""
    ours = name, name.replace(".qkv.", ".query.")
    return next((own for own in state_dict if our_name(own) in ours), name)


def from_videomae(state_dict):
    """The state dict of an official VideoMAE model, or of transformers' VideoMAE, for pre-training
    or fine-tuned -> in our names, without the predictor, which they lack. Fine-tuned ones bring
    fc_norm and head. Raises UserError for anything else."""
    new = {our_name(name): value for name, value in state_dict.items()}
    if PATCH_EMBED not in new:
        raise UserError(f"not VideoMAE's weights: names like {', '.join(list(state_dict)[:3])}")
    if new[PATCH_EMBED].ndim != 5:
        shape = tuple(new[PATCH_EMBED].shape)
        raise UserError(f"{own_name(PATCH_EMBED, state_dict)} {shape} is no convolution's")
    # (D,C,frame,row,column) -> (D,P)
    new[PATCH_EMBED] = new[PATCH_EMBED].permute(0, 2, 3, 4, 1).flatten(1)
    for name in [name for name in new if name.endswith(".query.weight")]:
        parts = [new.pop(name.replace("query", part), torch.empty(0)) for part in QKV]
        if len({part.shape for part in parts}) > 1:
            own = own_name(name, state_dict)
            raise UserError(f"{own} lacks a key and a value of its shape")
        new[name.replace("query", "qkv")] = torch.cat(parts)
    return new


def to_huggingface(model):
    """TGMAE -> state dict of transformers' VideoMAEForPreTraining (config: use_mean_pooling=False);
    a fine-tuned model of eval.py -> VideoMAEForVideoClassification."""
    c, new = model.config, {}
    for name, value in model.state_dict().items():
        if name.startswith("predictor."):
            continue
        if name == PATCH_EMBED:  # (D,P) -> (D,C,frame,row,column)
            value = value.view(-1, c.tubelet_size, c.patch_size, c.patch_size, 3)
            value = value.permute(0, 4, 1, 2, 3).contiguous()
        name = huggingface_name(name)
        if name.endswith(".qkv.weight"):
            new |= {name.replace("qkv", part): third for part, third in zip(QKV, value.chunk(3))}
        else:
            new[name] = value
    return new


_SCALAR = np.float64(0).__reduce__()[0]
DATA = [  # no code: the flags of official files, and NumPy's scalars, as NumPy 1 and 2 name them
    argparse.Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
]  # fmt: skip


def load_file(path, *, mmap=False):
    """The tensors of a .safetensors file; of any other torch.load, of which no pickled code is run.
    mmap: tensors are read from disk when they are used. UserError if it cannot be loaded."""
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(DATA):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file of other contents makes torch raise nearly anything
        reason = first_line(error)
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {refused[1]}, which is no data" if refused else reason
        raise UserError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error


def digest(state, dtype=None):
    """The first digits of the SHA-256 of a state dict's values, or of these as `dtype`."""
    sha = hashlib.sha256()
    for _, value in sorted(state.items()):
        value = value.cpu() if dtype is None else value.cpu().to(dtype)
        sha.update(value.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def flags_of(source):
    """The flags of the run that made a checkpoint of train.py or eval.py, or the folder of its
    export; {} where it does not say, or there is none. Reads no weights."""
    path = Path(source, "model.pt") if Path(source).is_dir() else Path(source)
    if not zipfile.is_zipfile(path):  # as torch.save writes it
        return {}
    saved = load_file(path, mmap=True)
    flags = saved.get("args") if isinstance(saved, dict) else None
    return flags if isinstance(flags, dict) else {}


def _find(source, name):
    """Path of a file in a folder or, for a hub name, from the hub; None if there is none."""
    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).exists() else None
    try:
        return Path(hf_hub_download(str(source), name))
    except errors.EntryNotFoundError:
        return None


def _load_huggingface(source):
    """What a folder or hub name of transformers holds: weights, config.json, names of classes."""
    try:
        if not (path := _find(source, "config.json")):
            raise OSError("no config.json, on disk or at a hub that can be reached")
        config, state = json.loads(path.read_text()), {}
        if config.get("model_type") != "videomae":
            raise UserError(f"{source}: a {config.get('model_type')}, not a VideoMAE")
        for name in ("model.safetensors", "pytorch_model.bin"):
            files = {name} if _find(source, name) else set()
            if not files and (index := _find(source, f"{name}.index.json")):
                files = set(json.loads(index.read_text())["weight_map"].values())
            for file in files:
                state |= load_file(_find(source, file) or Path(source, file))
            if files:
                break
        else:
            raise OSError("no model.safetensors and no pytorch_model.bin")
        if path := _find(source, "preprocessor_config.json"):
            colours = json.loads(path.read_text())
            for key, own in (
                ("image_mean", tgmae.IMAGENET_MEAN),
                ("image_std", tgmae.IMAGENET_STD),
            ):
                if tuple(colours.get(key) or own) != own:
                    raise UserError(f"{source}: its {key} is {colours[key]}; ours is {list(own)}")
        saved, names = {"model": state, "transformers": config}, config.get("id2label", {})
        if "classifier.bias" in state:
            count = len(state["classifier.bias"])
            saved["classes"] = [names.get(str(i), f"LABEL_{i}") for i in range(count)]
        return saved
    except (OSError, errors.HFValidationError) as error:
        raise UserError(
            f"{source}: neither a checkpoint nor a folder or hub name of transformers: "
            f"{first_line(error)}"
        ) from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: one of its .json files is none of transformers'") from error


SIZES = {  # of a Config: in transformers' config.json
    "image_size": "image_size", "patch_size": "patch_size", "num_frames": "num_frames",
    "tubelet_size": "tubelet_size", "embed_dim": "hidden_size",
    "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "decoder_embed_dim": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads", "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip
# What else in config.json changes what a model computes, with the only value that we have.
ONLY = {"hidden_act": "gelu", "qkv_bias": True, "qv_bias": True, "num_channels": 3}


def _huggingface_sizes(state, theirs):
    """Fields of Config and norm_pix_loss, of weights in our names and a config.json. What that
    leaves out is VideoMAEConfig's default. UserError for a model that is none of ours."""
    for name, value in ONLY.items():
        if theirs.get(name, value) != value:
            raise UserError(f"its config.json says {name}={theirs[name]!r}, not {value!r}")
    mean_pooling = theirs.get("use_mean_pooling", True)  # without the last norm
    if mean_pooling == ("encoder.norm.weight" in state):
        but = "there is a layernorm" if mean_pooling else "there is no layernorm"
        raise UserError(f"its config.json says use_mean_pooling={mean_pooling}, but {but}")
    wide, D = state["encoder.blocks.0.mlp.fc1.weight"].shape
    said = {ours: theirs[name] for ours, name in SIZES.items() if name in theirs}
    said["norm_pix_loss"] = theirs.get("norm_pix_loss", True)
    return {"layer_norm_eps": 1e-12, "mlp_ratio": wide / D} | said


def _official_sizes(state, conv, flags):
    """Fields of Config and norm_pix_loss, of official weights in our names, whose patch embedding
    had the shape `conv`. Neither the clip's size nor heads are in weights: those are what the
    file's flags say, if it has them, and the published model's of that width; UserError for
    another width."""
    D, _, tubelet_size, patch_size, _ = conv
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    flags = flags if isinstance(flags, dict) else {}
    sizes = {"patch_size": patch_size, "tubelet_size": tubelet_size}
    sizes["mlp_ratio"] = len(state["encoder.blocks.0.mlp.fc1.weight"]) / D
    sizes["norm_pix_loss"] = bool(flags.get("normlize_target", True))  # spelled so
    if flags.get("input_size"):
        sizes["image_size"] = int(flags["input_size"])
    if flags.get("num_frames"):  # fine-tuning takes so many of each segment
        sizes["num_frames"] = int(flags["num_frames"]) * int(flags.get("num_segments") or 1)
    parts = [("encoder", "", D)]
    if "encoder_to_decoder.weight" in state:
        parts.append(("decoder", "decoder_", len(state["encoder_to_decoder.weight"])))
    for part, prefix, width in parts:
        presets = [vars(preset) for preset in tgmae.PRESETS.values()]
        heads = {p[f"{prefix}embed_dim"]: p[f"{prefix}num_heads"] for p in presets}
        heads[1408] = 16  # VideoMAEv2's giant
        if width not in heads:
            widths = ", ".join(map(str, sorted(heads)))
            raise UserError(f"{width} wide: how many heads is not said, and known of {widths}")
        blocks = {name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")}
        sizes[f"{prefix}embed_dim"], sizes[f"{prefix}depth"] = width, len(blocks)
        sizes[f"{prefix}num_heads"] = heads[width]
    return sizes


def part_of(name):
    """A weight of ours -> encoder, encoder.norm, decoder, predictor, ...: what is in a file whole,
    or not at all."""
    if name.startswith("encoder.norm."):
        return "encoder.norm"
    part = name.split(".")[0]
    return "decoder" if part in ("encoder_to_decoder", "mask_token") else part


def _check(source, model, state, theirs):
    """UserError unless these weights in our names make this model: there is an encoder, perhaps
    without its last norm; each other part is whole or not there; all is known and of its shape.
    theirs: the weights in the file's names."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if "head.weight" in state:  # fine-tuned: see eval.Classifier
        D, classes = model.config.embed_dim, len(state["head.weight"])
        shapes = {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}
        shapes |= {"fc_norm.weight": (D,), "fc_norm.bias": (D,)}
        shapes |= {"head.weight": (classes, D), "head.bias": (classes,)}
    needed = {part_of(name) for name in state} | {"encoder"}
    for name, shape in shapes.items():
        if name in state and state[name].shape != shape:
            own = own_name(name, theirs)
            raise UserError(
                f"{source}: its {own} has shape {tuple(theirs[own].shape)}, but by its sizes "
                f"{name} is {tuple(shape)}"
            )
        if name not in state and part_of(name) in needed:
            of_transformers = any("attention.attention" in own for own in theirs)
            own = huggingface_name(name.replace("qkv", "query")) if of_transformers else name
            raise UserError(f"{source}: not the weights of a video MAE, it has no {own}")
    for name in state:
        if name not in shapes:
            raise UserError(
                f"{source}: not the weights of a video MAE, it has an unknown "
                f"{own_name(name, theirs)}"
            )


def load_checkpoint(source):
    """-> (Config, state dict in our names, what else was there, a dict) from a checkpoint of
    train.py or eval.py, an official VideoMAE .pth, or a folder or hub name of transformers'
    VideoMAE. The weights fit the Config: an encoder, perhaps without its last norm; fc_norm and
    head if it is fine-tuned, else perhaps decoder and predictor. In the dict: "assumed", a text,
    what sizes of a clip the file does not say; "norm_pix_loss", whether its decoder predicts
    normalised cubes, as ours do. Raises UserError if it is none of these."""
    here = Path(source)
    if here.suffix in (".pt", ".pth", ".bin", ".safetensors") and not here.exists():
        raise UserError(f"{source}: no such file")  # and nothing to ask the hub for
    saved = load_file(source) if here.is_file() else _load_huggingface(source)
    if not isinstance(saved, dict):
        raise UserError(f"{source}: holds a {type(saved).__name__}, not a checkpoint's dict")
    state = next((saved.pop(key) for key in ("model", "module") if key in saved), saved)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{source}: its weights are no dict of names and tensors")
    try:
        if "config" in saved:
            ours, sizes = state, dict(saved["config"])
        else:
            ours = from_videomae(state)
            if "transformers" in saved:
                sizes = _huggingface_sizes(ours, saved["transformers"])
            else:
                convs = [w for name, w in state.items() if name.endswith("patch_embed.proj.weight")]
                if not convs:
                    raise UserError("transformers' weights alone; their config.json is needed")
                sizes, saved = _official_sizes(ours, convs[0].shape, saved.get("args")), {}
        # What older checkpoints and other models have besides. Other channels do not fit below.
        saved["norm_pix_loss"] = sizes.pop("norm_pix_loss", True)
        own = {name: size for name, size in sizes.items() if name not in ("in_chans", "drop_path")}
        config = tgmae.Config(**own)
        with torch.device("meta"):
            model = tgmae.TGMAE(config)
    except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(f"{source}: makes no model: {first_line(error)}") from error
    except KeyError as error:
        raise UserError(f"{source}: makes no model: it has no {error.args[0]}") from error
    _check(source, model, ours, state)
    clip = {"num_frames": config.num_frames, "image_size": config.image_size}
    assumed = [f"{name}={size}" for name, size in clip.items() if name not in sizes]
    saved["assumed"] = ", ".join(assumed)
    return config, ours, saved
