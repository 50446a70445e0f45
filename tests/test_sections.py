"""Every section of tgmae.py lifts out: run alone, with what its banner names and nothing else, and
used."""

import ast
import dis
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import tgmae

SOURCE = (ROOT / "tgmae.py").read_text()
HEAD, *PARTS = re.split(r"^# =+\n(?=# \w)", SOURCE, flags=re.M)
SECTIONS = {
    part[2:].split(":")[0]: re.split(r"^# =+\n", part, maxsplit=1, flags=re.M) for part in PARTS
}
IMPORTS = {  # as a banner writes them -> statement
    f"{alias.name} as {alias.asname}" if alias.asname else alias.name: ast.unparse(
        type(node)(**vars(node) | {"names": [alias]})
    )
    for node in ast.parse(HEAD).body
    if isinstance(node, (ast.Import, ast.ImportFrom))
    for alias in node.names
}
ALONE = {
    "functional as TF": "torchvision.transforms.v2.functional as TF"
}  # says too little by itself


def promised(banner):
    """What a banner names -> (imports, {section: names})."""
    text = banner.replace("\n# ", " ")
    imports = re.search(r"Needs: (.*?)\.(?= [A-Z]|$)", text.strip()).group(1).split(", ")
    named = {
        section: re.findall(r"\b\w+\b", names)
        for section, names in re.findall(r"From ([\w ]+): (.*?)\.", text)
    }
    return imports, named


def defined(body):
    names = set()
    for node in ast.parse(body).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


def globals_of(code):
    """Names that a section looks up outside of its functions, wherever that is."""
    found = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return found.union(*(globals_of(part) for part in code.co_consts if hasattr(part, "co_code")))


def lift(title):
    """A section in a namespace of its own."""
    banner, body = SECTIONS[title]
    imports, named = promised(banner)
    space = {"__name__": "lifted"}
    for name in imports:
        short = next((key for key, long in ALONE.items() if long == name), name)
        exec(IMPORTS[short], space)
    names = {name for others in named.values() for name in others if hasattr(tgmae, name)}
    space |= {name: getattr(tgmae, name) for name in names}
    given = space.keys() - {"__name__", "__builtins__"}
    code = compile(body, title, "exec", dont_inherit=True)
    asked = (
        globals_of(code)
        - defined(body)
        - set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
    )
    asked -= {
        "__name__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__conditional_annotations__",
    }
    assert asked == given, (
        f"{title}: its banner lacks {asked - given}, names {given - asked} for nothing"
    )
    for section, those in named.items():
        assert set(those) & defined(SECTIONS[section][1]), (
            f"{title}: nothing of {those} stands in {section}"
        )
    exec(code, space)
    return space


def use_reading(s, world, tmp_path):
    path = tgmae.read_manifest(world / "manifest.jsonl")[0]["path"]
    assert torch.equal(s["read_clip"](path, [0, 4]), tgmae.read_clip(path, [0, 4]))


def use_manifest(s, world, tmp_path):
    assert len(s["read_manifest"](world / "manifest.jsonl", "test")) == 200
    with pytest.raises(ValueError, match="not a whole text map"):
        s["read_map"](world / "manifest.jsonl", [])


def use_augmentation(s, world, tmp_path):
    frames = torch.randint(0, 256, (4, 48, 64, 3), dtype=torch.uint8)
    crop = s["multi_scale_crop"]((48, 64), generator=torch.Generator().manual_seed(0))
    assert s["crop_frames"](frames, crop, 32).shape == (3, 4, 32, 32)


def use_cubes(s, world, tmp_path):
    video = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(s["unpatchify"](s["patchify"](video, 8, 2), (2, 4, 4), 8, 2), video)


def use_maskers(s, world, tmp_path):
    assert s["topk_mask"](s["motion_scores"](torch.rand(1, 4, 8, 8), (2, 4, 4)), 0.5).sum() == 16


def use_clip(s, world, tmp_path):
    clip = s["load_clip"](f"local-dir:{world / 'clip'}")
    assert s["encode_text"](*clip, ["a red circle moving left"]).norm().item() == pytest.approx(
        1, abs=1e-3
    )


def use_transformer(s, world, tmp_path):
    config = tgmae.Config(**TINY)
    cubes = tgmae.patchify(torch.randn(1, 3, 4, 32, 32), 8, 2)
    assert s["Encoder"](config)(cubes, None).shape == (1, config.num_patches, config.embed_dim)


def use_losses(s, world, tmp_path):
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    assert s["info_nce"](x, x, 0.07) < s["info_nce"](x, x.flip(0), 0.07)


def use_tgmae(s, world, tmp_path):
    config = tgmae.Config(**TINY)
    mask = tgmae.topk_mask(torch.rand(2, *config.grid), 0.5)
    assert s["TGMAE"](config)(torch.randn(2, 3, 4, 32, 32), mask)["mae"].isfinite()


def use_weights(s, world, tmp_path):
    torch.save({"config": TINY, "model": {}}, tmp_path / "a.pt")
    assert s["load_checkpoint"](tmp_path / "a.pt")[0] == tgmae.Config(**TINY)


def use_runs(s, world, tmp_path):
    s["save_checkpoint"](tmp_path / "last.pt", step=3)
    assert torch.load(tmp_path / "last.pt")["step"] == 3 and s["share_step"](4, 2) == (8, 4, 2)


USES = {
    "Config": lambda s, *_: np.testing.assert_equal(s["Config"](**TINY).num_patches, 32),
    "Reading": use_reading, "Manifest": use_manifest, "Augmentation": use_augmentation,
    "Cubes": use_cubes, "Maskers": use_maskers, "CLIP": use_clip,
    "Transformer": use_transformer, "Losses": use_losses, "TGMAE": use_tgmae,
    "Weights in and out": use_weights,
    "Runs": use_runs,
}  # fmt: skip


def test_all_sections_are_used():
    assert list(USES) == list(SECTIONS)
    order = re.search(r"Config -> .*?Runs", tgmae.__doc__, re.S).group().replace("\n", " ")
    assert [name.strip() for name in order.split("->")] == list(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_section_lifts_out(title, world, tmp_path):
    USES[title](lift(title), world, tmp_path)


@pytest.mark.parametrize("script", ["tgmae.py", "toy.py", "captions.py", "train.py", "eval.py"])
def test_leaves_stand_before_their_users(script):
    """Read top to bottom, a file never asks for what stands further down."""
    body = ast.parse((ROOT / script).read_text()).body
    functions = [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    line = {node.name: node.lineno for node in functions}
    for node in functions:
        own = {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
        own |= {
            x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }
        used = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} - own
        assert not [name for name in used if line.get(name, 0) > node.lineno], node.name
