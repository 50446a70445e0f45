"""Weights in and out: official VideoMAE files, transformers' folders and hub names, and our own
checkpoints, all in the names of tgmae.py.

    config, state, rest = load_checkpoint("MCG-NJU/videomae-base")
    model = tgmae.TGMAE(config)
    model.load_state_dict(state, strict=False)  # the predictor is ours alone

Nothing here needs transformers, of which some versions zero biases as they load.
"""

import argparse
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import constants, errors, hf_hub_download

from tgmae import PRESETS, Config


def work_offline_if_no_hub():
    """Asks the Hugging Face hub once whether it is there. If not, open_clip and transformers are
    told to use what is on disk, and fail at once where that is not enough, not after a minute of
    retries.

    Call before they are imported. Returns whether the hub may be used."""
    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def first_line(error):
    """What an exception says, in one line; one that says nothing is called by its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def from_videomae(state_dict):
    """The state dict of an official VideoMAE model, or of transformers' VideoMAE, for pre-training
    or fine-tuned -> in our names, without the predictor, which they lack. Fine-tuned ones bring
    fc_norm and head. Raises ValueError for anything else."""
    new = {}
    for name, value in state_dict.items():
        name = re.sub(r"^classifier\b", "head", name.removeprefix("videomae."))
        for ours, theirs in NAMES:
            name = name.replace(theirs, ours)
        if name.startswith(("patch_embed.", "blocks.", "norm.")):  # official, fine-tuned
            name = f"encoder.{name}"
        new[name] = value
    if PATCH_EMBED not in new:
        raise ValueError(f"not VideoMAE's weights: names like {', '.join(list(state_dict)[:3])}")
    # (D,C,frame,row,column) -> (D,P)
    new[PATCH_EMBED] = new[PATCH_EMBED].permute(0, 2, 3, 4, 1).flatten(1)
    for name in [name for name in new if name.endswith(".query.weight")]:
        parts = [new.pop(name.replace("query", part)) for part in QKV]
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
            value = value.view(-1, c.tubelet_size, c.patch_size, c.patch_size, c.in_chans)
            value = value.permute(0, 4, 1, 2, 3).contiguous()
        name = "videomae." * name.startswith("encoder.") + re.sub(r"^head\b", "classifier", name)
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
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
    mmap: tensors are read from disk when they are used. ValueError if it cannot be loaded."""
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(DATA):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file of other contents makes torch raise nearly anything
        reason = first_line(error)
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {refused[1]}, which is no data" if refused else reason
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error


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
            raise ValueError(f"{source}: a {config.get('model_type')}, not a VideoMAE")
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
        saved, names = {"model": state, "transformers": config}, config.get("id2label", {})
        if "classifier.bias" in state:
            count = len(state["classifier.bias"])
            saved["classes"] = [names.get(str(i), f"LABEL_{i}") for i in range(count)]
        return saved
    except (OSError, errors.HFValidationError) as error:
        kind = "neither a checkpoint nor a folder or hub name of transformers"
        raise ValueError(f"{source}: {kind}: {first_line(error)}") from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: its config.json or index is none of transformers'") from error


SIZES = {  # of a Config: in transformers' config.json
    "image_size": "image_size", "patch_size": "patch_size", "num_frames": "num_frames",
    "tubelet_size": "tubelet_size", "in_chans": "num_channels", "embed_dim": "hidden_size",
    "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "decoder_embed_dim": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads", "norm_pix_loss": "norm_pix_loss",
    "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip


def _huggingface_config(state, theirs):
    """Config of weights in our names and a config.json. What that leaves out is VideoMAEConfig's
    default."""
    wide, D = state["encoder.blocks.0.mlp.fc1.weight"].shape
    said = {ours: theirs[name] for ours, name in SIZES.items() if name in theirs}
    return Config(**{"layer_norm_eps": 1e-12, "mlp_ratio": wide / D} | said)


def _official_config(state, conv, flags):
    """Config of official weights in our names, whose patch embedding had the shape `conv`. Neither
    the clip's size nor heads are in weights: those are what the file's flags say, and the published
    model's of that width; ValueError for another width."""
    D, C, tubelet_size, patch_size, _ = conv
    sizes = {"patch_size": patch_size, "tubelet_size": tubelet_size, "in_chans": C}
    sizes["mlp_ratio"] = len(state["encoder.blocks.0.mlp.fc1.weight"]) / D
    sizes["image_size"] = getattr(flags, "input_size", 224)
    sizes["num_frames"] = getattr(flags, "num_frames", 16)
    parts = [("encoder", "", D)]
    if "encoder_to_decoder.weight" in state:
        parts.append(("decoder", "decoder_", len(state["encoder_to_decoder.weight"])))
    for part, prefix, width in parts:
        presets = [vars(preset) for preset in PRESETS.values()]
        heads = {p[f"{prefix}embed_dim"]: p[f"{prefix}num_heads"] for p in presets}
        heads[1408] = 16  # VideoMAEv2's giant
        if width not in heads:
            widths = ", ".join(map(str, sorted(heads)))
            raise ValueError(f"{width} wide: how many heads is not said, and known of {widths}")
        blocks = {name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")}
        sizes[f"{prefix}embed_dim"], sizes[f"{prefix}depth"] = width, len(blocks)
        sizes[f"{prefix}num_heads"] = heads[width]
    return Config(**sizes)


def load_checkpoint(source):
    """-> (Config, state dict in our names, what else was there, a dict) from a checkpoint of
    train.py or eval.py, an official VideoMAE .pth, or a folder or hub name of transformers'
    VideoMAE. Raises ValueError if it is none of these."""
    if not Path(source).exists():
        work_offline_if_no_hub()
    saved = load_file(source) if Path(source).is_file() else _load_huggingface(source)
    if not isinstance(saved, dict):
        raise ValueError(f"{source}: holds a {type(saved).__name__}, not a checkpoint's dict")
    state = next((saved.pop(key) for key in ("model", "module") if key in saved), saved)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: its weights are no dict of names and tensors")
    try:
        if "config" in saved:
            return Config(**saved["config"]), state, saved
        ours = from_videomae(state)
        if "transformers" in saved:
            return _huggingface_config(ours, saved["transformers"]), ours, saved
        convs = [w for name, w in state.items() if name.endswith("patch_embed.proj.weight")]
        if not convs:
            raise ValueError("transformers' weights alone; their config.json is needed")
        return _official_config(ours, convs[0].shape, saved.get("args")), ours, {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: makes no model: {error}") from error
