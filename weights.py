"""Weights in and out: official VideoMAE files, transformers' folders and hub names, and our own
checkpoints, all in the names of tgmae.py.

    config, state, rest = load_checkpoint("MCG-NJU/videomae-base")
    model = tgmae.TGMAE(config)
    model.load_state_dict(state, strict=False)  # the predictor is ours alone

Nothing here needs transformers, of which some versions zero biases as they load.
"""

import argparse
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tgmae import PRESETS, Config


def work_offline_if_no_hub(timeout=5):
    """Asks the Hugging Face hub once whether it is there. If not, open_clip and transformers are
    told to use what is on disk, and fail at once where that is not enough, not after a minute of
    retries.

    Call before they are imported. Returns whether the hub may be used."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


# (ours, transformers'), each replaced wherever it stands. ".attention.output.dense." before
# ".output.dense.".
_HUGGINGFACE = (
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."),
    ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    ("head.", "classifier."),
)


def from_videomae(state_dict):
    """The state dict of an official VideoMAE model, or of transformers' VideoMAE, for pre-training
    or fine-tuned -> in our names, without the predictor, which they lack. Fine-tuned ones bring
    fc_norm and head. Raises ValueError for anything else."""
    old, new = state_dict, {}
    if any(name.startswith(("embeddings.", "videomae.")) for name in old):
        for name, value in old.items():
            bare = name.startswith(("embeddings.", "encoder.layer.", "layernorm."))
            name = "videomae." + name if bare else name  # of a bare VideoMAEModel
            for ours, theirs in _HUGGINGFACE:
                name = name.replace(theirs, ours)
            name = name.replace(".attention.attention.", ".attn.")
            name = name.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias")
            new[name] = value
        for name in [name for name in new if name.endswith(".query.weight")]:
            stem = name.removesuffix("query.weight")
            parts = [new.pop(f"{stem}{part}.weight") for part in ("query", "key", "value")]
            new[f"{stem}qkv.weight"] = torch.cat(parts)
    elif any(name.endswith("patch_embed.proj.weight") for name in old):
        bare = "patch_embed.proj.weight" in old  # fine-tuned: no encoder. in front
        for name, value in old.items():
            ours = bare and name.startswith(("patch_embed.", "blocks.", "norm."))
            new["encoder." + name if ours else name] = value
    if "encoder.patch_embed.proj.weight" not in new:
        raise ValueError(f"not VideoMAE's weights: names like {', '.join(list(old)[:3])}")
    weight = new["encoder.patch_embed.proj.weight"]  # (D,C,frame,row,column) -> (D,P)
    new["encoder.patch_embed.proj.weight"] = weight.permute(0, 2, 3, 4, 1).flatten(1)
    return new


def to_huggingface(model):
    """TGMAE -> state dict of transformers' VideoMAEForPreTraining (config: use_mean_pooling=False);
    a fine-tuned model of eval.py -> VideoMAEForVideoClassification."""
    c, new = model.config, {}
    for name, value in model.state_dict().items():
        if name.startswith("predictor."):
            continue
        if name == "encoder.patch_embed.proj.weight":  # (D,P) -> (D,C,frame,row,column)
            value = value.view(-1, c.tubelet_size, c.patch_size, c.patch_size, c.in_chans).permute(
                0, 4, 1, 2, 3
            )
        for ours, theirs in _HUGGINGFACE:
            name = name.replace(ours, theirs) if ours != "head." or name.startswith(ours) else name
        name = name.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix("attn.qkv.weight")
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                new[f"{stem}attention.attention.{part}.weight"] = third.contiguous()
        else:
            new[name.replace(".attn.", ".attention.attention.")] = value.contiguous()
    return new


_SCALAR = np.float64(0).__reduce__()[0]
DATA = [  # no code: the flags of official files, and NumPy's scalars, as NumPy 1 and 2 name them
    argparse.Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
]  # fmt: skip


def load_file(path):
    """torch.load of a checkpoint, of which no pickled code is run; ValueError if it is not one."""
    try:
        with torch.serialization.safe_globals(DATA):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of other contents makes torch raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {refused[1]}, which is no data" if refused else reason
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error


def _tensors(path):
    """The tensors of a safetensors file; ValueError if it is none."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: cannot be loaded as safetensors: {error}") from error


def _official_config(state, flags):
    """Config of official weights, in our names except for the patch embedding. Neither the clip's
    size nor heads are in weights: those are what the file's flags say, and the published model's of
    that width; ValueError for another width."""
    D, C, tubelet, patch, _ = state["encoder.patch_embed.proj.weight"].shape
    heads = {p.embed_dim: p.num_heads for p in PRESETS.values()} | {1408: 16}  # VideoMAEv2's giant
    decoder_heads = {p.decoder_embed_dim: p.decoder_num_heads for p in PRESETS.values()}

    def known(table, width):
        if width not in table:
            widths = ", ".join(map(str, sorted(table)))
            raise ValueError(f"{width} wide: how many heads is not said, and known of {widths}")
        return table[width]

    def depth(part):
        return 1 + max(
            int(name.split(".")[2]) for name in state if name.startswith(f"{part}.blocks.")
        )

    sizes = dict(
        image_size=getattr(flags, "input_size", 224),
        num_frames=getattr(flags, "num_frames", 16),
        patch_size=patch,
        tubelet_size=tubelet,
        in_chans=C,
        embed_dim=D,
        depth=depth("encoder"),
        mlp_ratio=len(state["encoder.blocks.0.mlp.fc1.weight"]) / D,
        num_heads=known(heads, D),
    )
    if "encoder_to_decoder.weight" in state:
        width = len(state["encoder_to_decoder.weight"])
        sizes |= dict(
            decoder_embed_dim=width,
            decoder_depth=depth("decoder"),
            decoder_num_heads=known(decoder_heads, width),
        )
    return Config(**sizes)


def _config(source, sizes):
    try:
        return Config(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its config makes no model: {error}") from error


SIZES = {  # of a Config: in transformers' config.json
    "image_size": "image_size", "patch_size": "patch_size", "num_frames": "num_frames",
    "tubelet_size": "tubelet_size", "in_chans": "num_channels", "embed_dim": "hidden_size",
    "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "decoder_embed_dim": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads", "norm_pix_loss": "norm_pix_loss",
    "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip


def _load_huggingface(source):
    """A folder or hub name of transformers, read without it: some of its versions zero biases."""
    from huggingface_hub import errors, hf_hub_download

    def find(name):
        """Path of that file, from the hub if source is no folder; None if there is none."""
        if Path(source).is_dir():
            return Path(source, name) if Path(source, name).exists() else None
        try:
            return Path(hf_hub_download(str(source), name))
        except errors.EntryNotFoundError:
            return None

    state = {}
    try:
        if not (path := find("config.json")):
            raise OSError("no config.json, on disk or at a hub that can be reached")
        theirs = json.loads(path.read_text())
        if theirs.get("model_type") != "videomae":
            raise ValueError(f"{source}: a {theirs.get('model_type')}, not a VideoMAE")
        for name, load in (("model.safetensors", _tensors), ("pytorch_model.bin", load_file)):
            shards = [name] if find(name) else []
            if not shards and (index := find(f"{name}.index.json")):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            for shard in shards:
                state |= load(find(shard) or Path(source, shard))
            if shards:
                break
        else:
            raise OSError("no model.safetensors and no pytorch_model.bin")
    except (OSError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source}: neither a checkpoint nor a folder or hub name of transformers: {reason}"
        ) from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: its config.json or index is none of transformers'") from error
    try:
        state = from_videomae(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    wide, D = state["encoder.blocks.0.mlp.fc1.weight"].shape
    sizes = {"layer_norm_eps": 1e-12, "mlp_ratio": wide / D}  # what is unsaid: VideoMAEConfig's
    sizes |= {ours: theirs[name] for ours, name in SIZES.items() if name in theirs}
    saved = {"transformers": theirs.get("architectures")}
    if "head.bias" in state:
        names = theirs.get("id2label", {})
        saved["classes"] = [names.get(str(i), f"LABEL_{i}") for i in range(len(state["head.bias"]))]
    return _config(source, sizes), state, saved


def load_checkpoint(source):
    """-> (Config, state dict in our names, what else was there, a dict) from a checkpoint of
    train.py or eval.py, an official VideoMAE .pth, or a folder or hub name of transformers'
    VideoMAE. Sizes are read from it. Raises ValueError if it is none of these."""
    if not Path(source).is_file():
        if not Path(source).is_dir():
            work_offline_if_no_hub()
        return _load_huggingface(source)
    saved = load_file(source)
    if not isinstance(saved, dict):
        raise ValueError(f"{source}: holds a {type(saved).__name__}, not a checkpoint's dict")
    state = next((saved.pop(key) for key in ("model", "module") if key in saved), saved)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: its weights are no dict of names and tensors")
    if "config" in saved:
        return _config(source, saved["config"]), state, saved
    conv = next(
        (value for name, value in state.items() if name.endswith("patch_embed.proj.weight")), None
    )
    try:
        ours = from_videomae(state)
        if conv is None:
            raise ValueError(
                "transformers' weights alone; the folder with their config.json is needed"
            )
        return (
            _official_config(ours | {"encoder.patch_embed.proj.weight": conv}, saved.get("args")),
            ours,
            {},
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
