"""Every section of tgmae.py and dataset.py lifts out: run alone, with what README names and
nothing else, and used. The method's ten lines run; who imports whom."""

import ast
import dis
import operator
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

import dataset
import tgmae

MODULES = {"tgmae": tgmae, "dataset": dataset}
README = (ROOT / "README.md").read_text()
ROOMS = {}  # module -> {section: body}
for name in MODULES:
    _, *parts = re.split(r"^# ==== (?=\w)", (ROOT / f"{name}.py").read_text(), flags=re.M)
    ROOMS[name] = {part.split(":")[0]: part.partition("\n")[2] for part in parts}
PLACES = [(room, title) for room, sections in ROOMS.items() for title in sections]


def imports_of(room):
    """{name that it binds: statement}."""
    found = {}
    for node in ast.parse((ROOT / f"{room}.py").read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                one = type(node)(**vars(node) | {"names": [alias]})
                found[alias.asname or alias.name] = ast.unparse(one)
    return found


def promised(title):
    """README's row of a section -> names of imports; names and sections that it needs, too."""
    (row,) = re.findall(rf"^\| {title}(?:, of `\w+\.py`)? \|(.*)\|$", README, re.M)
    _, imports, others = row.split("|")
    others = {name.strip() for name in re.findall(r"\w[\w ]*", others)}
    return re.findall(r"`(\w+)`", imports), others


def defined(body):
    names = set()
    for node in ast.parse(body).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            inside = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            names |= {part.id for part in inside if isinstance(part.ctx, ast.Store)}
    return names


def globals_of(code):
    """Names that a section looks up outside of its functions, wherever that is."""
    looks = {"LOAD_GLOBAL", "LOAD_NAME"}
    found = {step.argval for step in dis.get_instructions(code) if step.opname in looks}
    return found.union(*(globals_of(part) for part in code.co_consts if hasattr(part, "co_code")))


def lift(room, title):
    """A section, and what its row names, copied into a namespace of its own."""
    imports, others = promised(title)
    pieces = []  # in the file's order
    for section, body in ROOMS[room].items():
        nodes = [ast.unparse(node) for node in ast.parse(body).body]
        whole = section == title or section in others
        pieces += [node for node in nodes if whole or others & defined(node)]
    copied = "\n".join(pieces)
    assert others - ROOMS[room].keys() <= defined(copied) - defined(ROOMS[room][title])
    space, statements = {"__name__": "lifted"}, imports_of(room)
    for name in imports:
        exec(statements[name], space)
    code = compile(copied, title, "exec", dont_inherit=True)
    builtins = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
    known = {"__module__", "__qualname__", "__annotations__", "__conditional_annotations__"}
    asked = globals_of(code) - defined(copied) - builtins.keys() - known
    assert asked == set(imports), title
    assert others - ROOMS[room].keys() <= globals_of(code), title
    exec(code, space)
    return space


VIDEO, FRAMES = torch.randn(2, 3, 4, 32, 32), torch.randint(0, 256, (4, 48, 64, 3)).byte()
MASK = torch.arange(32).expand(2, -1) % 2 == 0
USES = {  # of a section s, that holds
    "Config": lambda s, world: s.Config(**TINY).num_patches == 32,
    "Cubes": lambda s, world: s.unpatchify(s.patchify(VIDEO, 8, 2), (2, 4, 4), 8, 2).equal(VIDEO),
    "CLIP scores": lambda s, world: (
        (clip := s.load_clip(f"local-dir:{world / 'clip'}"))
        and s.text_scores(clip[0], VIDEO, s.encode_text(*clip, ["a", "b"]), 8, 2).shape
        == (2, 2, 4, 4)
    ),
    "Top k": lambda s, world: s.topk_mask(torch.rand(1, 2, 4, 4), 0.5).sum() == 16,
    "Noise and motion": lambda s, world: (
        s.motion_scores(torch.rand(1, 4, 8, 8), (2, 4, 4)).shape == (1, 2, 4, 4)
        and s.tube_scores(1, (2, 4, 4)).shape == (1, 2, 4, 4)
    ),
    "Transformer": lambda s, world: (
        s.Encoder(tgmae.Config(**TINY))(tgmae.patchify(VIDEO, 8, 2)).shape == (2, 32, 48)
    ),
    "Losses": lambda s, world: s.ContrastiveHead(8, 8).loss(torch.eye(8), torch.eye(8)) > 0,
    "Model": lambda s, world: s.TGMAE(tgmae.Config(**TINY))(VIDEO, MASK)["mae"] > 0,
    "Reading": lambda s, world: s.probe_video(next(world.rglob("*.mp4"))).size == (64, 64),
    "Manifest": lambda s, world: len(s.read_manifest(world / "manifest.jsonl", "test")) == 16,
    "Crop": lambda s, world: (
        s.crop_frames(FRAMES, s.multi_scale_crop((48, 64)), 32).shape == (3, 4, 32, 32)
    ),
}


def test_all_sections_are_used():
    assert list(USES) == [title for _, title in PLACES]
    order = "Config, Cubes, CLIP scores, Top k, Noise and motion, Transformer, Losses, Model"
    assert order.split(", ") == list(ROOMS["tgmae"])  # that of the ten lines
    table = re.search(r"^    3\.1 \(1\).*?\n\n", tgmae.__doc__, re.S | re.M).group()
    for tag in ("(1)", "(2)", "(3)", "MSE", "3.2", "3.3", "3.4", "(4)", "3.5"):
        assert tag in table
    for name in re.findall(r"\b[a-z]+_\w+|[A-Z]\w*[a-z]\w*\.\w+|[A-Z]\w+Head", table):
        assert name == "captions.py" or operator.attrgetter(name)(tgmae)


@pytest.mark.parametrize("room, title", PLACES)
def test_section_lifts_out(room, title, world):
    assert USES[title](SimpleNamespace(**lift(room, title)), world)


def test_the_method_in_ten_lines(world, monkeypatch):
    """As they stand in the header, with the toy CLIP and sizes."""
    block = re.search(r"at random \(3.2\):\n\n(.*?)\n\n", tgmae.__doc__, re.S).group(1)
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) == 10
    load = tgmae.load_clip
    space = vars(tgmae) | {
        "load_clip": lambda: load(f"local-dir:{world / 'clip'}"),
        "PRESETS": {"base": tgmae.PRESETS["toy"]},
        "video": torch.randint(256, (2, 3, 4, 64, 64), dtype=torch.uint8),
        "captions": ["a red circle moving left", "the blue square goes up"],
    }
    exec("\n".join(lines), space)
    assert space["loss"].item() == pytest.approx((space["out"]["mae"] + space["out"]["vt"]).item())
    assert space["mask"].sum().item() == 2 * 2 * 38 and space["scores"].shape == (2, 2, 8, 8)
    grads = [p.grad for p in space["model"].parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    train = (ROOT / "train.py").read_text()
    for call in ("encode_text(", "text_scores(", "topk_mask(", "normalize("):
        assert call in block and call in train


def test_equations_stand_where_they_are_computed():
    """(1) to (4) and the MSE, at the line of code."""
    lines = (ROOT / "tgmae.py").read_text().splitlines()
    for label, code in (
        ("equation (1)", "self.proj(cubes)"),
        ("(2) selects ~mask", "scatter("), ("(2) applied", "take("),
        ("the encoder of (3)", "self.encode("), ("the decoder of (3)", "self.decode("),
        ("the MSE of 3.1", "F.mse_loss("), ("(4), both ways", "F.cross_entropy("),
    ):  # fmt: skip
        (line,) = [line for line in lines if label in line]
        assert code in line.split("#")[0], label


def test_the_module_is_the_method():
    """No files, processes, signals or command line; the central line is soon there."""
    text = (ROOT / "tgmae.py").read_text()
    allowed = {"math", "collections", "dataclasses", "torch", "open_clip"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
    assert text[: text.index("def topk_mask")].count("\n") < 220


ARROWS = {  # room: whom it imports
    "tgmae": "", "dataset": "", "pictures": "tgmae", "weights": "tgmae dataset",
    "runs": "tgmae dataset weights", "toy": "tgmae dataset runs",
    "captions": "tgmae dataset weights runs", "train": "tgmae dataset weights runs pictures",
    "eval": "tgmae dataset weights runs pictures",
}  # fmt: skip


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_go_one_way(room):
    body = ast.parse((ROOT / f"{room}.py").read_text()).body
    asked = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    asked |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert asked & ARROWS.keys() <= set(ARROWS[room].split())
