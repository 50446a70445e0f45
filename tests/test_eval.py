"""eval.py: its arithmetic against loops, hand-made tables, transformers; its commands in full."""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, TINY, needs_transformers
from PIL import Image, ImageSequence
from test_ranks import torchrun

import dataset
import eval as ev
import pictures
import runs
import tgmae
import weights


def words(command, workers=0):
    return shlex.split(command) + ([] if command.startswith("export") else [f"--workers={workers}"])


def run(capsys, command, workers=0):
    """Runs a command in this process -> what it wrote to --json, what it said."""
    ev.main([*words(command, workers), "--json", "out.json"])
    return json.loads(open("out.json").read()), capsys.readouterr().out


def fails(command):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        ev.main(words(command))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


CLASSES = [f"class {i}" for i in range(4)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    """A checkpoint as train.py writes it, never trained."""
    config = tgmae.Config(**TINY)
    model = tgmae.TGMAE(config)
    for name, value in model.state_dict().items():  # so that no part is as it began
        if value.is_floating_point():
            value.add_(0.02 * torch.randn_like(value))
    saved = {"config": asdict(config), "model": model.state_dict()}
    torch.save(saved | {"args": {"clip": "x", "mask": "tube"}}, folder / "small.pt")
    return folder / "small.pt"


def save_tuned(path, **more):
    """A fine-tuned checkpoint of random weights, no part as it began."""
    model = ev.Classifier(tgmae.Config(**TINY), len(CLASSES))
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    torch.save({"config": TINY, "model": model.state_dict(), **more}, path)


@pytest.fixture
def clips(world, folder):
    """clips(train, test, {line: changes of its record}) -> a manifest of so many toy clips, whose
    labels take turns."""

    def make(train=8, test=5, changes={}, name="data.jsonl"):
        lines = []
        for split, count in (("train", train), ("test", test)):
            records = dataset.read_manifest(world / "manifest.jsonl", split)[:count]
            for label, record in zip(itertools.cycle(CLASSES), records):
                line = {"video": record["path"], "captions": record["captions"]}
                line |= {"label": label, "split": split} | changes.get(len(lines), {})
                lines.append(json.dumps(line) + "\n")
        (folder / name).write_text("".join(lines))
        return folder / name

    return make


# ---- arithmetic ---------------------------------------------------------------------------------

VIEWS = [  # first, stop, frames, stride, sampling, views; their frames
    # 75 strided frames, starts 59 * v / 4 of them, rounded down
    ((0, 300, 16, 4, "dense", 5), [range(4 * i, 4 * i + 64, 4) for i in (0, 14, 29, 44, 59)]),
    ((0, 300, 16, 4, "dense", 1), [range(4 * 29, 4 * 29 + 64, 4)]),
    ((10, 30, 4, 2, "dense", 3), [[10, 12, 14, 16], [16, 18, 20, 22], [22, 24, 26, 28]]),
    ((0, 10, 4, 4, "dense", 2), [[0, 4, 8, 8]] * 2),  # too short: the last one again
    # SSv2's test: the even and the odd ones of 32 frames
    ((0, 32, 16, 2, "tsn", 2), [range(0, 32, 2), range(1, 32, 2)]),
    ((5, 21, 4, 2, "tsn", 1), [[7, 11, 15, 19]]),
    ((0, 2, 4, 2, "tsn", 1), [[0, 0, 1, 1]]),
]


@pytest.mark.parametrize("how, expected", VIEWS)
def test_views_by_hand(how, expected):
    assert ev.view_frames(*how) == [list(view) for view in expected]


@pytest.mark.parametrize("n", [20, 33, 47, 117])
def test_tsn_views_are_dealt_out(n):
    """The same as sorting both halves together and dealing them out."""
    tick = n / 16
    middle, left = ([int(start + tick * i) for i in range(16)] for start in (tick / 2, 0))
    both = sorted(middle + left)
    assert ev.view_frames(0, n, 16, 2, "tsn", 2) == [both[0::2], both[1::2]]


def test_crops_by_hand():
    assert ev.view_crops((240, 320), 3) == [dataset.Crop(0, left, 240, 240) for left in (0, 40, 80)]
    assert ev.view_crops((100, 61), 3) == [dataset.Crop(top, 0, 61, 61) for top in (0, 19, 39)]
    assert ev.view_crops((240, 320), 1) == [dataset.Crop(0, 40, 240, 240)]


def test_views_are_averaged_after_the_softmax(clips):
    """By hand: the mean of the logits favours class 1, the mean of their softmax class 0."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 5.0, 4.9]])
    exps = [[math.exp(x) for x in row] for row in logits.tolist()]
    mean = [(a / sum(exps[0]) + b / sum(exps[1])) / 2 for a, b in zip(*exps)]
    assert logits.mean(0).argmax() == 1 and mean.index(max(mean)) == 0

    class Fixed(torch.nn.Module):
        config = tgmae.Config(**TINY)

        def forward(self, video):
            return logits.repeat(len(video) // 2, 1)

    records = dataset.read_manifest(clips(), "test")
    args = ev.parse_args("linear x.pt --data toy --batch-size 4 --workers 0 --stride 2".split())
    args.amp, args.device = False, "cpu"
    found = ev.test_scores(Fixed(), "test", records, args, (2, 1))
    torch.testing.assert_close(found.values, torch.tensor(mean).expand(5, 3))
    found = ev.view_scores(torch.nn.Identity(), logits[None])
    torch.testing.assert_close(found, torch.tensor([mean]))


def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    found = ev.accuracy(scores, torch.tensor([1, 2, -1]), ks=(1, 2, 3, 5))
    assert found == pytest.approx({"top-1": 1 / 3, "top-2": 1 / 3, "top-3": 2 / 3, "top-5": 2 / 3})
    assert ev.chosen_on(19) == "19 clip(s), so few that it is luck"
    assert ev.chosen_on(20) == "20 clip(s)"
    assert ev.chance_row("model", 4) == {"model": "chance", "top-1": 0.25, "top-5": 1.0}


def test_recall_is_a_loop():
    queries, gallery = torch.randn(37, 6), torch.randn(61, 6)
    a, b = torch.randint(0, 9, (37,)), torch.randint(0, 9, (61,))
    expected = dict.fromkeys(("R@1", "R@5", "R@10"), 0)
    for q, label in zip(queries.tolist(), a.tolist()):
        dots = [sum(x * y for x, y in zip(q, g)) / math.hypot(*g) for g in gallery.tolist()]
        order = sorted(range(61), key=lambda i: -dots[i])
        for k in (1, 5, 10):
            expected[f"R@{k}"] += any(b[i] == label for i in order[:k]) / 37
    assert ev.recall(queries, gallery, a, b) == pytest.approx(expected)
    assert ev.recall(gallery, gallery, b, b) == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0}


def test_chance_is_all_orders():
    """Over all orders of a small gallery, and with a class that it lacks."""
    queries, gallery = torch.tensor([0, 0, 1, 7]), torch.tensor([0, 0, 1, 2, 2])
    found = ev.recall_by_chance(queries, gallery, ks=(1, 2, 9))
    for k in (1, 2, 9):
        orders = [order[:k] for order in itertools.permutations(gallery.tolist())]
        expected = np.mean([q in top for q in queries.tolist() for top in orders])
        assert found[f"R@{k}"] == pytest.approx(expected)


def test_layer_decay_by_hand():
    """VideoMAE's numbers for ViT-B: 0.75 for block 11, ..., 0.75^12 for block 0, then 0.75^13."""
    with torch.device("meta"):
        model = ev.Classifier(tgmae.PRESETS["base"], 10)
    blocks = [0.031676, 0.042235, 0.056314, 0.075085, 0.100113, 0.133484,
              0.177979, 0.237305, 0.316406, 0.421875, 0.5625, 0.75]  # fmt: skip
    table = {f"encoder.blocks.{i}.": value for i, value in enumerate(blocks)}
    table |= {"encoder.patch_embed.": 0.023757, "fc_norm.": 1.0, "head.": 1.0}
    scales = ev.layer_scales(model, 0.75)
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        (expected,) = [value for part, value in table.items() if name.startswith(part)]
        assert scale == pytest.approx(expected, abs=1e-6), name


def test_optimizer_groups():
    model = ev.Classifier(tgmae.Config(**TINY), 3)
    optimizer = ev.make_optimizer(model, argparse.Namespace(layer_decay=0.5, weight_decay=0.05))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert group_of[id(p)]["scale"] == ev.layer_scales(model, 0.5)[name]
        assert group_of[id(p)]["weight_decay"] == (0.05 if p.ndim == 2 else 0.0), name


def test_fresh_head_and_norm():
    model = ev.Classifier(tgmae.PRESETS["toy"], 1000)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert not model.head.bias.any() and (model.fc_norm.weight == 1).all()


def test_drop_path_grows_with_depth():
    """Of 2000 clips, a block's attention and MLP are each left out as often as they should, and
    what is kept is scaled so that the mean stays; names of weights stay, too."""
    config = replace(tgmae.PRESETS["toy"], depth=3, embed_dim=8, num_heads=1)
    encoder = tgmae.Encoder(config)
    names = encoder.state_dict().keys()
    ev.add_drop_path(encoder, 0.5)
    assert encoder.state_dict().keys() == names
    x = torch.randn(1, 4, 8).expand(2000, -1, -1)
    for rate, block in zip((0, 0.25, 0.5), encoder.blocks):
        for part in (block.attn, block.mlp):
            whole = part.eval()(x)
            dropped = part.train()(x)
            gone = (dropped == 0).all((1, 2))
            assert gone.float().mean().item() == pytest.approx(rate, abs=0.05)
            torch.testing.assert_close(dropped[~gone], whole[~gone] / (1 - rate))


@needs_transformers
def test_a_decoder_of_other_targets(checkpoint, clips, capsys):
    """Its reconstruction is not drawn, as ours are, and what is exported says it on."""
    saved = torch.load(checkpoint, weights_only=True)
    saved["config"]["norm_pix_loss"] = False
    torch.save(saved, "odd.pt")
    data = clips(2, 2, {2: {"captions": None}})  # no text mask: no CLIP
    ev.main(words("export odd.pt --out folder"))
    for source in ("odd.pt", "folder/model.pt", "folder"):
        capsys.readouterr()
        ev.main(words(f"show {source} --data {data} --out seen"))
        said = capsys.readouterr().out
        assert f"note    {source}: its targets are not normalised: no reconstruction" in said
    with pytest.raises(SystemExit, match="--mask-ratio 0.001: masks 0 of"):
        ev.main(words(f"show odd.pt --data {data} --mask-ratio 0.001 --out seen"))


# ---- augmentation -------------------------------------------------------------------------------


def finetune_args(flags=""):
    return ev.parse_args(f"finetune x.pt --data a.jsonl --recipe k400 {flags}".split())


def test_augmentation_treats_frames_alike():
    """16 equal frames stay equal through RandAugment, crop, flip and erasing."""
    frame = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    augment = ev.augmentation(finetune_args("--erasing 1"), 32)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out = augment(frame.expand(16, -1, -1, -1))
        assert out.shape == (16, 3, 32, 32) and out.dtype == torch.float32
        assert all(torch.equal(out[0], other) for other in out)
        seen.add(round(out.mean().item(), 4))
    assert len(seen) == 20


def test_augmentation_off_is_a_crop():
    args = finetune_args("--randaug 0 --erasing 0 --no-flip --crop-scale 1")
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = tgmae.normalize(frames.transpose(0, 1)[None])[0].transpose(0, 1)
    found = [ev.augmentation(args, 32)(frames) for _ in range(8)]  # the aspect is still random
    assert any(torch.allclose(out, expected, atol=1e-5) for out in found)


@pytest.mark.parametrize("flags", ["--cutmix 0", "--mixup 0", ""])
def test_mixing(flags):
    """Shares are what each video contributed."""
    video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 4, 8, 8).contiguous()
    torch.manual_seed(3)
    clips, shares = ev.mix(video, torch.arange(4), 5, finetune_args(flags))
    assert clips.shape == video.shape and type(clips) is torch.Tensor and shares.shape == (4, 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    # Video i holds the number i, so its mean is the shares' mean class.
    torch.testing.assert_close(clips.mean((1, 2, 3, 4)), shares @ torch.arange(5.0))


def test_repeats_of_a_video_are_not_mixed_with_each_other():
    samples = []
    for i in range(4):
        video = torch.full((2, 3, 4, 8, 8), float(i))
        samples.append({"video": video, "target": torch.tensor(i), "name": "", "bad": []})
        samples[-1]["short"] = False
    batch = ev.collate(samples)
    assert batch["target"].tolist() == [0, 1, 2, 3] * 2
    assert batch["video"].mean((1, 2, 3, 4)).tolist() == [0, 1, 2, 3] * 2
    _, shares = ev.mix(batch["video"], batch["target"], 4, finetune_args("--cutmix 0"))
    assert ((shares > 0).sum(1) == 2).all()


SHORT = "--recipe other --stride 2 --views 1x1 --epochs 3 --warmup-epochs 1 --batch-size 4 --lr 0.1"


def test_the_loss_is_smoothed(checkpoint, clips, monkeypatch):
    """The last loss that is logged, from its logits, which differ by then, and unmixed classes."""
    seen = Mock(wraps=F.cross_entropy)
    monkeypatch.setattr(F, "cross_entropy", seen)
    flags = f"{SHORT} --repeat 1 --mixup 0 --cutmix 0"
    ev.main(words(f"finetune {checkpoint} --data {clips(4, 4)} {flags} --out run"))
    logits, target = seen.call_args.args
    smooth = F.one_hot(target, 4) * 0.9 + 0.1 / 4
    logged = json.loads(open("run/log.jsonl").readlines()[-1])["loss"]
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    assert logged == pytest.approx(expected.item(), abs=1e-5)


def test_finetuning_on_few_clips(checkpoint, clips, capsys, monkeypatch):
    """A step of no more clips than there are, steps enough; both stay when the run goes on."""
    monkeypatch.setattr(ev, "FEW_STEPS", 3)
    flags = "--recipe few --views 1x1 --stride 2 --holdout 0 --workers 0 --out run"
    for _ in range(2):
        ev.main(words(f"finetune {checkpoint} --data {clips(4, 4)} {flags}"))
    saved, said = torch.load("run/last.pt", weights_only=True), capsys.readouterr().out
    assert "--batch-size 4, not 16: there are 4 videos" in said and "from step 3" in said
    names = "epochs warmup_epochs batch_size"
    assert [saved["args"][name] for name in names.split()] == [3, 0.15, 4] and saved["step"] == 3
    for epochs, warmup in ((10, 2.0), (75, 5.0)):
        args = ev.parse_args(words(f"finetune {checkpoint} --data data.jsonl --epochs {epochs}"))
        assert args.warmup_epochs == warmup  # Table 9's 5, at most a fifth
    assert "--recipe few is for few clips" in fails(
        f"finetune {checkpoint} --data data.jsonl --recipe other --batch-size 9 --out new"
    )


def test_mirrored_clips_of_sided_classes(checkpoint, clips, capsys):
    names = ["push_right", "Copyright", "push up"]
    clips(6, 6, {i: {"label": names[i % 3]} for i in range(12)})
    flags = "--recipe few --views 1x1 --stride 2 --holdout 0 --epochs 1 --out"
    for more, expected in (("run", 1), ("unmirrored --no-flip", 0)):
        ev.main(words(f"finetune {checkpoint} --data data.jsonl {flags} {more}"))
        said = capsys.readouterr().out
        assert said.count("clips are mirrored, and texts say 'push_right': --no-flip") == expected


@pytest.mark.parametrize("command", ["linear", "retrieve", "finetune --epochs 1 --holdout 0"])
def test_clips_that_were_pretrained_on(command, checkpoint, clips, capsys):
    """They are test clips now: in its manifest, in another one, of a checkpoint before it."""
    clips(6, 4)
    saved = torch.load(checkpoint, weights_only=True)
    args = {"mask": "tube", "data": "data.jsonl", "split": "train", "epochs": 5}
    flags = "--data {} --views 1x1 --stride 2 --batch-size 2".format

    def said(name, data, **more):
        torch.save(saved | {"args": args | more}, "old.pt")
        torch.save(saved | {"args": {**args, "data": "third.jsonl", "init": "old.pt"}}, "new.pt")
        again = "--no-resume" if "finetune" in command else ""
        ev.main(words(f"{command} {name} {flags(data)} {again}"))
        return capsys.readouterr().out

    text = Path("data.jsonl").read_text()
    Path("third.jsonl").write_text(text)
    digest = runs.digest_of_clips(dataset.read_manifest("data.jsonl", "train"))
    others = "note    split 'train' of data.jsonl has changed since old.pt was trained on it"
    assert "note    " not in said("old.pt", "data.jsonl", split_clips=digest)
    assert others in said("old.pt", "data.jsonl", split_clips="another")
    chose = "also of split test of data.jsonl, by which its run chose"
    assert chose in said("old.pt", "data.jsonl", val_split="test", holdout=0.1)
    assert chose not in said("old.pt", "data.jsonl", val_split="test")  # only watched
    other = text.replace('"train"', '"old"').replace('"test"', '"train"').replace('"old"', '"test"')
    Path("other.jsonl").write_text(other)
    note = "6 of 6 clips of --test-split test are on another side, too, such as /"
    of_old = "split train of data.jsonl, on which old.pt was trained"
    found = said("old.pt", "other.jsonl")
    assert note in found and of_old in found
    Path("third.jsonl").unlink()
    found = said("new.pt", "other.jsonl")
    assert "test clips are not compared with those of new.pt: third.jsonl: cannot be read" in found
    assert note in found and of_old in found
    if "finetune" in command:
        assert of_old not in said("old.pt --scratch", "other.jsonl")


def test_what_is_said_of_a_checkpoint(checkpoint, clips, capsys):
    """That its run has not ended, its decoder was never trained, labels have made its features."""
    clips(4, 4)
    saved = torch.load(checkpoint, weights_only=True) | {"optimizer": {}, "epoch": 3}
    torch.save(saved | {"args": {"data": "data.jsonl", "epochs": 5, "mae": False}}, "new.pt")
    save_tuned("tuned.pt", args={"data": "data.jsonl", "epochs": 3}, epoch=3, optimizer={})
    torch.save(saved | {"args": {"data": "data.jsonl", "epochs": 3}}, "ended.pt")
    video = dataset.read_manifest("data.jsonl")[0]["path"]
    for name, unended, drawn, labels in (
        ("new.pt", True, False, False),
        ("tuned.pt", False, False, True),
        ("ended.pt", False, True, False),
    ):
        rows, said = run(capsys, f"show {name} --video {video}")
        assert ("3 of 5 epochs, of a run that has not ended" in said) == unended
        assert ("reconstruction" in str(rows["rows"])) == drawn
        assert ("has no decoder, or an untrained one" in said) != drawn
        _, said = run(capsys, f"retrieve {name} --views 1x1 --stride 2")
        assert ("labels, too, have made these features" in said) == labels


def test_one_video_a_forward_mixes_with_nothing(checkpoint, clips, capsys):
    command = f"finetune {checkpoint} --data {clips(2, 1)} --epochs 1 --holdout 0 --views 1x1"
    for size, flags in ((1, ""), (2, ""), (1, "--mixup 0 --cutmix 0")):
        ev.main(words(f"{command} {flags} --batch-size {size} --no-resume --out run"))
        said = capsys.readouterr().out
        assert ("have no other to mix it with" in said) == (size == 1 and not flags)


def test_unreadable_training_clips_are_counted(checkpoint, clips, capsys):
    Path("bad.mp4").write_bytes(b"x" * 1000)
    data = clips(4, 4, {1: {"video": "bad.mp4"}})
    flags = f"{SHORT} --epochs 2 --stride 24 --holdout 0"
    ev.main(words(f"finetune {checkpoint} --data {data} {flags} --out run"))
    said = capsys.readouterr().out
    for name, count in (("bad", 2), ("short", 8)):
        assert sum(line[name] for line in runs.read_log(Path("run"))) == count
        assert f"{name:<7} {count} times a video" in said


def test_mixed_classes_reach_the_loss(checkpoint, clips, monkeypatch):
    seen = Mock(wraps=F.cross_entropy)
    monkeypatch.setattr(F, "cross_entropy", seen)
    data, more = clips(8, 4), "--epochs 1 --warmup-epochs 0 --mixup 0.8 --cutmix 1 --out run"
    ev.main(words(f"finetune {checkpoint} --data {data} {SHORT} --holdout 0 {more}"))
    targets = [call.args[1] for call in seen.call_args_list]
    assert all(target.shape[1] == 4 for target in targets)
    torch.testing.assert_close(targets[0].sum(1), torch.ones(len(targets[0])))
    assert any(((target > 0.01) & (target < 0.99)).any() for target in targets)


def test_a_step_of_finetuning(checkpoint, clips, monkeypatch):
    """AdamW's first step is the rate of each layer, whatever the gradient; blocks are dropped in
    training alone."""
    drop = Mock(wraps=ev.stochastic_depth)
    monkeypatch.setattr(ev, "stochastic_depth", drop)
    data = clips(4, 4)
    flags = f"{SHORT} --epochs 1 --warmup-epochs 0 --holdout 0 --repeat 1 --no-amp --out run"
    flags += " --layer-decay 0.5 --weight-decay 0 --drop-path 0.3"
    ev.main(words(f"finetune {checkpoint} --data {data} {flags}"))
    before, after = torch.load(checkpoint, weights_only=True), torch.load("run/last.pt")
    depth, rate = before["config"]["depth"], 0.1 * 4 / 256
    scales = {f"encoder.blocks.{i}.mlp.fc1.weight": 0.5 ** (depth - i) for i in range(depth)}
    scales["encoder.patch_embed.proj.weight"] = 0.5 ** (depth + 1)
    for name, scale in scales.items():
        step = (after["model"][name] - before["model"][name]).abs().max().item()
        assert step == pytest.approx(rate * scale, rel=0.02), name
    rates = [i * 0.3 / (depth - 1) for i in range(depth) for _ in range(2)]
    calls = [(call.args[1], call.kwargs["training"]) for call in drop.call_args_list]
    assert calls[: 2 * depth] == [(pytest.approx(p), True) for p in rates]
    assert not any(training for _, training in calls[2 * depth :])  # the test


def training_clips(manifest, flags):
    records, target = dataset.read_manifest(manifest, "train"), torch.arange(8) % 4
    return ev.Augmented(records, target, tgmae.Config(**TINY), finetune_args(flags))


def test_samples_follow_from_the_seed(clips):
    data = training_clips(clips(), "--sampling tsn")
    first, again = data[0, 3], data[0, 3]
    assert first["video"].shape == (2, 3, 4, 32, 32) and first["target"] == 3
    assert torch.equal(first["video"], again["video"])
    assert not torch.equal(first["video"][0], first["video"][1])
    assert not torch.equal(first["video"], data[1, 3]["video"])


@pytest.fixture
def read(monkeypatch):
    """Stands for read_clip, and counts its calls."""
    read = Mock(wraps=dataset.read_clip)
    monkeypatch.setattr(dataset, "read_clip", read)
    return read


def test_the_last_frame_is_the_last(clips, read, monkeypatch):
    """TSN's jitter just below 1 asks for no frame beyond the end."""
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 1 - 2**-24))
    training_clips(clips(), "--sampling tsn --randaug 0 --erasing 0")[0, 0]
    assert read.call_args.args[1][-1] == 23


@pytest.mark.parametrize("sampling", ["tsn", "dense"])
def test_training_frames(sampling, clips, read):
    """tsn: one of each of 4 segments of 24; dense: 4, a stride apart. Drawn anew each epoch."""
    data = training_clips(clips(), f"--sampling {sampling} --repeat 1 --randaug 0 --stride 3")
    for epoch in range(12):
        data[epoch, 0]
    drawn = np.array([call.args[1] for call in read.call_args_list])
    assert len(drawn) == 12 and len(np.unique(drawn, axis=0)) > 6
    if sampling == "tsn":
        assert (drawn // 6 == [0, 1, 2, 3]).all()
    else:
        assert (np.diff(drawn) == 3).all() and drawn.min() >= 0 and drawn.max() < 24


RECIPES = [
    ("k400", 75, 1e-3, "5x3", "val", True, "dense"),
    ("ssv2", 30, 5e-4, "2x3", "val", False, "tsn"),
    ("ucf101", 100, 1e-3, "5x3", "test", True, "dense"),
    ("hmdb51", 50, 1e-3, "5x3", "test", True, "dense"),
    ("diving48", 50, 1e-3, "5x3", "test", True, "dense"),
    ("epic55", 50, 1e-3, "5x3", "val", True, "dense"),
]


@pytest.mark.parametrize("name, epochs, lr, views, test_split, flip, sampling", RECIPES)
def test_recipes(name, epochs, lr, views, test_split, flip, sampling):
    """The paper's Table 9 and DESIGN's table of protocols, by --recipe."""
    args = ev.parse_args(f"finetune x.pt --data a.jsonl --recipe {name}".split())
    assert (args.epochs, args.lr, args.views) == (epochs, lr, views)
    assert (args.test_split, args.flip, args.sampling) == (test_split, flip, sampling)
    assert (args.layer_decay, args.weight_decay, args.warmup_epochs) == (0.75, 0.05, 5)
    assert (args.mixup, args.cutmix, args.smoothing, args.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (args.drop_path, args.repeat) == (0.1, 2)


# ---- against transformers -----------------------------------------------------------------------


@needs_transformers
def test_logits_are_transformers():
    """A fine-tuned model, exported: VideoMAEForVideoClassification's, with its eps; and back."""
    save_tuned("tuned.pt", classes=list("abcd"))
    ev.main("export tuned.pt --out folder".split())
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained("folder").eval()
    assert theirs.config.id2label == dict(enumerate("abcd"))
    video = torch.randn(2, 3, 4, 32, 32)
    (model, _), (again, more) = ev.load_model("tuned.pt"), ev.load_model("folder")
    model.fc_norm.eps = theirs.fc_norm.eps
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2)).logits
        torch.testing.assert_close(model(video), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(video), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(again, ev.Classifier) and more["classes"] == list("abcd")


@needs_transformers
def test_export_is_transformers(checkpoint, capsys):
    """VideoMAEModel's features and VideoMAEForPreTraining's predictions, from one folder."""
    found, said = run(capsys, f"export {checkpoint} --out folder")
    assert found["difference"] < 1e-5 and "VideoMAEForPreTraining" in said
    assert "is there already" in fails(f"export {checkpoint} --out folder")
    model, _ = ev.load_model(checkpoint)
    bare = transformers.VideoMAEModel.from_pretrained("folder").eval()
    full = transformers.VideoMAEForPreTraining.from_pretrained("folder").eval()
    video, mask = torch.randn(2, 3, 4, 32, 32), tgmae.topk_mask(torch.rand(2, 2, 4, 4), 0.5)
    with torch.no_grad():
        found = bare(video.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(found, model.encode(video), atol=1e-5, rtol=1e-5)
        pred = full(video.transpose(1, 2), bool_masked_pos=mask).logits
        torch.testing.assert_close(pred, model(video, mask)["pred"], atol=1e-4, rtol=1e-4)
    transformers.VideoMAEImageProcessor(image_mean=[0.5] * 3).save_pretrained("folder")
    assert "folder: its image_mean is [0.5, 0.5, 0.5]; ours is [0.485" in fails("linear folder")


@needs_transformers
def test_every_form_of_the_same_weights(checkpoint, monkeypatch):
    """The exported folder, its model.pt, the official layout, transformers' encoder alone."""
    ev.main(f"export {checkpoint} --out folder".split())
    transformers.VideoMAEModel.from_pretrained("folder").save_pretrained("encoder")
    model, _ = ev.load_model(checkpoint)
    official = {k: v for k, v in model.state_dict().items() if not k.startswith("predictor")}
    conv = official["encoder.patch_embed.proj.weight"].view(48, 2, 8, 8, 3)
    official["encoder.patch_embed.proj.weight"] = conv.permute(0, 4, 1, 2, 3)
    # Such a file does not name its heads: the preset of that width does.
    monkeypatch.setitem(tgmae.PRESETS, "toy", tgmae.Config(**TINY))
    args = argparse.Namespace(input_size=32, num_frames=4)
    torch.save({"model": official, "args": args}, "official.pth")
    video = torch.randn(2, 3, 4, 32, 32)
    for source in ("folder", "folder/model.pt", "official.pth", "encoder"):
        again, _ = ev.load_model(source)
        with torch.no_grad():
            found, expected = again.encode(video), model.encode(video)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert again.has_decoder == (source != "encoder")
    for source, parts in (("encoder", {"encoder"}), ("official.pth", {"encoder", "decoder"})):
        ev.main(f"export {source} --out {source}.again".split())  # no more than was there
        state = torch.load(f"{source}.again/model.pt", weights_only=True)["model"]
        assert {name.split(".")[0] for name in state} & {"encoder", "decoder", "predictor"} == parts
        assert ev.load_model(f"{source}.again/model.pt")[0].has_decoder == ("decoder" in parts)


@needs_transformers
def test_attention_is_transformers(checkpoint):
    """From each cube, in each layer: what transformers returns with output_attentions."""
    model, _ = ev.load_model(checkpoint)
    for value in model.encoder.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    theirs = ev.huggingface_of(model).videomae
    theirs.set_attn_implementation("eager")
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        layers = theirs(video.transpose(1, 2), output_attentions=True).attentions
    expected = torch.stack([attention[0].mean(0) for attention in layers])
    found = pictures.attention_maps(model, video, [0, 1])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_toy_features(fully_trained, full_workdir, capsys):
    """Probe and retrieval far above random weights and chance; fine-tuning above the probe."""
    found, said = run(capsys, f"linear {fully_trained}", workers=2)
    probe, random, chance = found["rows"]
    assert random["encoder"].startswith("random") and chance["top-1"] == 1 / 16
    assert probe["top-1"] > random["top-1"] + 0.2 and random["top-1"] > chance["top-1"]
    assert "learning rate" in said.lower()
    assert found["clips"]["test"]["clips"] == "200 of 200 clips"
    zero_shot, random, chance = run(capsys, f"retrieve {fully_trained}", workers=2)[0]["rows"]
    assert zero_shot["R@1"] > 2 * max(random["R@1"], chance["R@1"])
    assert (zero_shot["queries"], zero_shot["gallery"]) == (200, 800)
    tuned = run(capsys, f"finetune {fully_trained} --out tuned", workers=2)[0]["rows"]
    assert [row["model"] for row in tuned] == ["tuned/last.pt", "tuned/best.pt", "chance"]
    assert tuned[0]["top-1"] > probe["top-1"]


def test_linear_leaves_the_backbone_alone(checkpoint, clips, capsys, monkeypatch):
    model, saved = ev.load_model(checkpoint)
    monkeypatch.setattr(ev, "load_model", lambda source: (model, saved))
    flags = "--epochs 3 --views 2x1 --train-views 2x2"
    found, said = run(capsys, f"linear {checkpoint} --data {clips(12, 5)} {flags}")
    before, after = torch.load(checkpoint, weights_only=True)["model"], model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].cpu()) for name in before)
    _, chance = found["rows"]
    assert chance == {"encoder": "chance", "top-1": 0.25, "top-5": 1.0}
    ((name, chosen),) = found["rates"].items()
    assert chosen["held-out top-1"].keys() == {f"{rate:g}" for rate in ev.RATES}
    assert "the best of 6 on 20% of the training clips (2 clip(s), so few that it is luck)" in said
    assert f"luck): {chosen['rate']:g} for {name}" in said


def test_bars_say_whose_they_are(checkpoint, clips, capsys):
    ev.main(words(f"retrieve {checkpoint} --data {clips(8, 4)} --random"))
    said = capsys.readouterr().err
    for whose in (checkpoint, "random weights, same sizes"):
        assert f"train clips, {whose}: " in said and f"test clips, {whose}: " in said


def test_the_rate_is_chosen_without_test_clips(monkeypatch):
    """Of features that a rate of 1 separates and 1e-6 cannot, 1 is chosen, by training clips."""
    head = Mock(wraps=ev.train_head)
    monkeypatch.setattr(ev, "train_head", head)
    y = torch.arange(40) % 4
    x = F.one_hot(y, 4).float()[:, None] + 0.01 * torch.randn(40, 1, 4)
    args = argparse.Namespace(seed=0, holdout=0.25, rates=(1e-6, 1.0), epochs=30)
    rate, found = ev.choose_rate(x, y, 4, args)
    assert rate == 1.0 and found[1.0] == 1.0 > found[1e-6]
    assert [len(call.args[0]) for call in head.call_args_list] == [30, 30]


BROKEN = {"video": "broken.mp4"}
WITH_RANDOM = ["linear small.pt --epochs 5 --random", "retrieve small.pt --random"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [*WITH_RANDOM, "finetune tuned.pt --epochs 0"])
def test_two_processes_are_one(command, checkpoint, clips, folder):
    """Exactly the same numbers, for 11 and 7 clips of which one of each cannot be read."""
    for name in ("train.mp4", "broken.mp4"):
        (folder / name).write_bytes(b"no video")
    save_tuned("tuned.pt", classes=CLASSES)
    data = clips(11, 7, {3: {"video": "train.mp4"}, 13: BROKEN})
    command += f" --data {data} --views 2x1 --batch-size 4"
    results = []
    for processes in (1, 2):
        flags = words(f"{command} --json {processes}.json")
        done = torchrun(processes, ROOT / "eval.py", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n| --- |") == 1
        assert "6 of 7 clips" in done.stdout and "broken.mp4" in done.stdout
        results.append(json.loads(open(f"{processes}.json").read()))
    for part in ("rows", "clips", "rates"):
        assert results[0].get(part) == results[1].get(part)
    tested = results[0]["clips"]["test"]
    assert tested["clips"] == "6 of 7 clips" and [v for v, _ in tested["failed"]] == ["broken.mp4"]


def test_finetune_resumes_exactly(checkpoint, clips, capsys, monkeypatch):
    """The full recipe, stopped and run again: the weights and the log of an undisturbed run."""
    data = clips(10, 4)
    command = f"finetune {checkpoint} --data {data} {SHORT} --holdout 0.2 --out"
    run(capsys, f"{command} whole")
    save = runs.save_checkpoint

    def stop(path, **state):
        save(path, **state)
        if path.name == "last.pt" and state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", stop)
        run(capsys, f"{command} parts")
    with open("parts/log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1}\n{"st')  # after the checkpoint
    found, said = run(capsys, f"{command} parts")
    assert "from step 4" in said
    assert "on 20% of the training clips (2 clip(s), so few that it is luck), never" in said
    whole, parts = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    logs = [[json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("whole", "parts")]
    for line in sum(logs, []):
        line.pop("clips_per_s", None)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    best = max(line["val top-1"] for line in logs[0][2::3])
    assert torch.load("whole/best.pt", weights_only=True)["best"] == best
    assert [row["model"] for row in found["rows"]] == ["parts/last.pt", "parts/best.pt", "chance"]
    # Warm-up from the least rate, then down to it, each times the global batch of 4 videos / 256.
    rates = [line["lr"] for line in logs[0] if "lr" in line]
    assert rates[:2] == pytest.approx([1e-6 * 4 / 256, 0.1 * 4 / 256]) and rates[2] > rates[3]
    _, said = run(capsys, f"finetune parts/last.pt --data {data} {SHORT} --epochs 1 --out next")
    assert "parts/last.pt is fine-tuned: its encoder is taken, a new head begins" in said
    # Tested again as it is; another run is not resumed from it.
    again, _ = run(capsys, f"finetune parts/last.pt --data {data} {SHORT} --epochs 0")
    assert again["rows"][0]["top-1"] == found["rows"][0]["top-1"]
    assert "of another run (lr 0.1 -> 0.2" in fails(f"{command} parts --lr 0.2")
    assert "of another run (scratch False -> True" in fails(f"{command} parts --scratch")


def test_finetune_of_other_weights_or_classes_is_another_run(checkpoint, clips, folder, capsys):
    """Compared by what they hold, not by their paths."""
    shutil.copy(checkpoint, "start.pt")
    data = clips(10, 4)
    command = f"finetune start.pt --data {data} {SHORT} --out tuned"
    run(capsys, command)
    assert not Path("tuned/last.pt.old").exists()
    run(capsys, f"{command} --workers 1 --views 2x1 --test-split test")  # all that may change
    os.rename("start.pt", "moved.pt")
    _, said = run(capsys, command)
    assert "not compared with the weights that it began with: start.pt" in said
    _, said = run(capsys, "finetune start.pt --out tuned")  # all is the run's own
    assert f"Data: {data}" in said
    saved = torch.load("moved.pt", weights_only=True)
    saved["model"] = {name: value + 0.1 for name, value in saved["model"].items()}
    torch.save(saved, "start.pt")
    assert "of another run (init_weights " in fails(command)
    os.rename("moved.pt", "start.pt")
    text = Path(data).read_text()
    Path(data).write_text(text.replace("class 0", "class 9"))
    said = fails(command)
    assert "(classes [" in said and "records " in said
    Path(data).write_text(text)
    assert "batch_size x accum 4 -> 2" in fails(f"{command} --batch-size 2")
    run(capsys, f"{command} --batch-size 2 --accum 2")
    command = f"finetune start.pt --data {data} {SHORT} --out chosen --val-split"
    Path(data).write_text(text.replace('"test"', '"a"', 1).replace('"test"', '"b"', 1))
    run(capsys, f"{command} a")
    assert "another run (best_chosen_on a -> b)" in fails(f"{command} b")


def test_finetune_saves_before_it_is_validated(checkpoint, clips, capsys, monkeypatch):
    """One that was stopped in between validates first, so that best.pt is the same."""
    command = f"finetune {checkpoint} --data {clips(10, 4)} {SHORT} --epochs 2 --holdout 0.2 --out"
    run(capsys, f"{command} whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    for step in (2, 4):
        choose = ev.choose_best
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                ev, "choose_best",
                lambda state, *rest: interrupt() if state["step"] == step else choose(state, *rest),
            )  # fmt: skip
            ev.main(f"{command} parts".split())
        assert torch.load("parts/last.pt", weights_only=True)["step"] == step
    run(capsys, f"{command} parts")
    for name in ("last", "best"):
        one, other = (
            torch.load(f"{run}/{name}.pt", weights_only=True) for run in ("whole", "parts")
        )
        assert one["step"] == other["step"]
        assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    logs = [[json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("whole", "parts")]
    assert [line["step"] for line in logs[0]] == [1, 2, 2, 3, 4, 4]
    assert [line.get("val top-1") for line in logs[0]] == [
        line.get("val top-1") for line in logs[1]
    ]


def test_finetune_begins_with_the_checkpoint(checkpoint, clips, monkeypatch):
    """Or, with --scratch, with random weights. The last norm is in neither."""
    seen = []
    monkeypatch.setattr(ev, "fit", lambda args, model, *_: seen.append(model.cpu().state_dict()))
    for scratch in ("", "--scratch"):
        with pytest.raises(SystemExit):  # nothing was trained, so there is no last.pt to test
            ev.main(f"finetune {checkpoint} --data {clips()} --out none {scratch}".split())
    own, scratch = seen
    saved = torch.load(checkpoint, weights_only=True)["model"]
    blocks = [name for name in own if name.startswith("encoder.")]
    assert blocks and "encoder.norm.weight" not in own
    assert all(torch.equal(own[name], saved[name]) for name in blocks)
    assert not any(torch.equal(scratch[name], saved[name]) for name in blocks)


@pytest.mark.slow
def test_finetune_under_torchrun(checkpoint, clips, folder):
    """Two processes train, and a bad training video's place is taken by another."""
    (folder / "broken.mp4").write_bytes(b"no video")
    changes = {2: BROKEN, 8: {"split": "val"}, 9: {"split": "val"}}
    command = f"finetune {checkpoint} --data {clips(10, 3, changes)} {SHORT} --out tuned "
    command += "--batch-size 2 --val-split val --accum 2 --grad-checkpointing --sampling tsn"
    done = torchrun(2, ROOT / "eval.py", *words(command, workers=1), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "8 videos = 2 x 2 x 2" in done.stdout and "split val (2 clip(s)" in done.stdout
    assert open("tuned/bad_videos.txt").read().startswith("broken.mp4\t")
    log = [json.loads(line) for line in open("tuned/log.jsonl")]
    assert sum(line.get("bad", 0) for line in log) >= 1
    assert all(math.isfinite(line.get("loss", 0)) for line in log)


@needs_transformers
def test_a_head_without_names(clips, capsys):
    """Fine-tuned weights that do not name their classes: the manifest's, in order."""
    save_tuned("bare.pt")
    torch.save(torch.load("bare.pt") | {"classes": CLASSES}, "named.pt")
    ev.main("export bare.pt --out folder".split())
    flags, tops = f"--data {clips(8, 8)} --epochs 0 --views 1x1", []
    for source in ("named.pt", "bare.pt", "folder"):
        found, said = run(capsys, f"finetune {source} {flags}")
        tops.append(found["rows"][0]["top-1"])
        assert ("does not name its classes: assumed" in said) == (source != "named.pt")
    assert tops[0] == tops[1] == tops[2] > 0
    three = clips(3, 3, name="three.jsonl")
    assert "a head of 4 classes" in fails(f"finetune bare.pt --data {three} --epochs 0")


TRAINED = {"clip": "ViT-B-16", "clip_pretrained": "laion", "text_from": "clip"}
MAPS = {"clip": "ViT-B-16/laion 012", "clip_pretrained": "openai", "text_from": "maps"}
CLIPS = [
    (TRAINED, "--data toy", "ViT-B-16", "laion"),
    (TRAINED, "--data toy --clip a", "a", "openai"),
    (TRAINED, "--data toy --clip-pretrained x", "ViT-B-16", "x"),
    (MAPS | {"clip": "local-dir:clip 012"}, "--data toy", "local-dir:data/toy/clip", "openai"),
    (MAPS, "--data toy", "x.pt: trained with text maps of the CLIP ViT-B-16/laion 012", None),
    (MAPS, "--video x.mp4", "x.pt: trained with text maps of the CLIP ViT-B-16/laion 012", None),
    (MAPS, "--data a --clip y --clip-pretrained z", "y", "z"),
    ({}, "--data toy", "local-dir:data/toy/clip", "openai"),
    ({}, "--data a", "ViT-B-32-quickgelu", "openai"),
    ({}, "--video x.mp4", "ViT-B-32-quickgelu", "openai"),
]


@pytest.mark.parametrize("trained, flags, clip, pretrained", CLIPS)
def test_the_clip_that_a_run_was_trained_with(trained, flags, clip, pretrained, monkeypatch):
    """Its model and its weights; --clip and --clip-pretrained come before them."""
    monkeypatch.setattr(weights, "load_clip", lambda *which: which)
    args = ev.parse_args(f"show x.pt --device cpu {flags}".split())
    if pretrained:
        assert ev.clip_of(args, {"args": trained}) == (clip, pretrained, "cpu")
    else:
        with pytest.raises(ValueError, match=clip):
            ev.clip_of(args, {"args": trained})


def test_show(world, checkpoint, clips, folder, capsys):
    """The checkpoint's own CLIP, mask and ratio; or those that are asked for."""
    clip = f"local-dir:{world / 'clip'}"
    trained = {"clip": clip, "clip_pretrained": "openai", "text_from": "clip"}
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": trained | {"mask": "tgm", "mask_ratio": 0.5}}, "text.pt")
    _, said = run(capsys, f"show text.pt --data {clips()} --number 2")
    assert "tgm mask 50%" in said and (folder / "show.png").exists()
    _, said = run(capsys, f"show text.pt --data {clips()} --mask tube --mask-ratio 0.75")
    assert "tube mask 75%" in said
    video = dataset.read_manifest(clips())[0]["path"]
    flags = f"--caption 'a red circle moving left' --clip {clip} --mask tgm"
    found, said = run(capsys, f"show text.pt --video {video} {flags}")
    assert "a red circle moving left" in said and "tgm mask 50%" in said
    names = [re.split("[: ]", row["shows"])[0] for row in found["rows"][:5]]
    assert names == ["clip", "similarity", "tube", "mgm", "tgm"]


def test_show_on_toy(trained, workdir, capsys):
    found, said = run(capsys, f"show {trained} --out pictures/toy --layers 1 4")
    sheet, moving = Image.open("pictures/toy.png"), Image.open("pictures/toy.gif")
    assert len(found["rows"]) == 10 and sheet.width > 400 and sheet.height > 10 * 112
    assert "similarity " in said and "reconstruction" in said and "as predicted" in said
    pages = [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(moving)]
    assert len(pages) == 4 and moving.width < 990 and (pages[0] != pages[2]).any()


def test_principal_components(config):
    """Of tokens that vary along three axes, most along the first: each is a colour, from 0 to 1,
    up to its sign."""
    N = config.num_patches
    parts = torch.randn(N, 3)
    parts = parts - parts.mean(0)
    parts = torch.linalg.qr(parts).Q * torch.tensor([9.0, 3.0, 1.0])  # orthogonal, centred
    axes = torch.linalg.qr(torch.randn(16, 3)).Q  # (16,3)
    frames = pictures.principal_components(parts @ axes.T + 5, config)
    p, t = config.patch_size, config.tubelet_size
    found = frames[::t, ::p, ::p].reshape(N, 3) / 255
    for colour, part in zip(found.T, parts.T):
        part = (part - part.min()) / (part.max() - part.min())
        assert min((colour - part).abs().max(), (1 - colour - part).abs().max()) < 0.01


@needs_transformers
def test_show_on_footage(footage, checkpoint, capsys):
    """A video without caption; another chosen mask; a codec without motion vectors; no decoder."""
    video, hevc = footage / "sports" / "basketball.mp4", footage / "odd" / "h265_video.mp4"
    found, said = run(capsys, f"show {checkpoint} --video {video} --mask mgm --start 1")
    assert "no --caption: no text mask" in said and "mgm mask 75%" in said
    assert len(found["rows"]) == 8
    ev.main(f"export {checkpoint} --out folder".split())
    assert len(run(capsys, f"show folder --video {video}")[0]["rows"]) == 8
    transformers.VideoMAEModel.from_pretrained("folder").save_pretrained("encoder")
    with pytest.warns(dataset.NoMotionVectors):
        found, said = run(capsys, f"show encoder --video {hevc}")
    assert "has no decoder, or" in said and len(found["rows"]) == 6


def test_heat_map():
    frames, scores = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 2, 2)
    scores[1, 0, 1] = 1
    light = pictures.heat_map(scores, frames).float().sum(-1)
    assert (light[2:, :4, 4:] > 300).all()
    assert (light[:2] < 20).all() and (light[2:, 4:] < 20).all()


def test_box():
    config = tgmae.Config(**{**TINY, "image_size": 8, "patch_size": 4})
    frames = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    boxed = pictures.mark(frames, 4 + 3, config)  # slice 1, row 1, column 1
    assert (boxed[2:, 4, 4:] == 255).all() and not boxed[:2].any() and not boxed[:, :4].any()
    assert not boxed[2, 5, 5].any()


# ---- which clips, which data, which classes -----------------------------------------------------

SHARED = [
    ("linear small.pt --data none.jsonl", "8 of 8 clips of --test-split test", "--split train"),
    ("retrieve small.pt --data none.jsonl", "8 of 8 clips of --test-split test", "--split train"),
    ("finetune small.pt --data none.jsonl", "8 of 8 clips of --test-split test", "--split train"),
    ("retrieve small.pt --data data.jsonl --test-split train",
     "4 of 4 clips of --test-split train", "--split train"),
    ("finetune small.pt --data data.jsonl --val-split train",
     "4 of 4 clips of --val-split train", "--split train"),
    ("finetune small.pt --data data.jsonl --val-split test",
     "4 of 4 clips of --test-split test", "--val-split test"),
    ("finetune tuned.pt --epochs 0 --test-split train",
     "4 of 4 clips of --test-split train", "split train of data.jsonl, on which .*"),
    ("finetune tuned.pt --epochs 0 --data again.jsonl --recipe other",
     "3 of 7 clips of --test-split test", "split train of data.jsonl, on which .*"),
]  # fmt: skip


@pytest.mark.parametrize("command, clips_of, other", SHARED)
def test_test_clips_are_no_training_clips(command, clips_of, other, checkpoint, clips):
    clips(4, 4, dict.fromkeys(range(8), {"split": None}), name="none.jsonl")
    data = clips(4, 4)
    lines = open(data).read().replace('"train"', '"test"', 3)  # 3 of them train no more
    Path("again.jsonl").write_text(lines)
    save_tuned("tuned.pt", classes=CLASSES, args={"data": "data.jsonl", "split": "train"})
    said = fails(command)
    assert re.search(f"{clips_of} are on another side, too, such as /.*, also of {other}[.]", said)
    assert 'Give each clip one "split"' in said


def test_the_data_are_those_of_the_checkpoint(checkpoint, clips, folder, monkeypatch):
    """Data and recipe, and what follows from them; what is typed comes first."""
    clips(), clips(name="other.jsonl")
    small = torch.load(checkpoint, weights_only=True)
    for name, args in (
        ("toy", {"data": "toy"}), ("own", {"data": "data.jsonl"}), ("gone", {"data": "gone.jsonl"}),
        ("tuned", {"data": "data.jsonl", "recipe": "ssv2"}),
        ("odd", {"data": "data.jsonl", "recipe": "mine"}), ("world", {"data": "world"}),
        ("few", {"data": "data.jsonl", "recipe": "few"}),
        ("paper", {"data": "data.jsonl", "recipe": "paper"}),
    ):  # fmt: skip
        torch.save(small | {"args": args}, f"{name}.pt")
    (folder / "export").mkdir()
    (folder / "world").mkdir()
    (folder / "world/world.json").write_text("{}")
    torch.save(small | {"args": {"data": "data.jsonl"}}, "export/model.pt")
    monkeypatch.setattr(torch, "load", Mock(wraps=torch.load))
    for flags, data, recipe in (
        ("toy.pt", "toy", "toy"), ("own.pt", "data.jsonl", "other"),
        ("export", "data.jsonl", "other"), ("tuned.pt", "data.jsonl", "ssv2"),
        ("odd.pt", "data.jsonl", "other"), ("own.pt --recipe k400", "data.jsonl", "k400"),
        ("own.pt --data toy", "toy", "toy"),
        ("toy.pt --data ./data.jsonl", "./data.jsonl", "other"),
        ("tuned.pt --data ./data.jsonl", "./data.jsonl", "ssv2"),
        ("tuned.pt --data other.jsonl", "other.jsonl", "other"),
        ("world.pt", "world", "toy"), ("own.pt --data world", "world", "toy"),
        ("few.pt", "data.jsonl", "few"), ("paper.pt", "data.jsonl", "other"),
        ("few.pt --data other.jsonl", "other.jsonl", "other"),
        ("gone.pt --data toy", "toy", "toy"), ("small.pt --data data.jsonl", "data.jsonl", "other"),
    ):  # fmt: skip
        for command in ("linear", "retrieve", "finetune", "features", "show"):
            args = ev.parse_args(f"{command} {flags}".split())
            assert (args.data, args.recipe) == (data, recipe), (command, flags)
            assert args.stride == ev.RECIPES[recipe]["stride"], (command, flags)
        out = ev.parse_args(f"finetune {flags}".split()).out
        assert Path(out).name == f"finetune-{Path(data).stem}"
    own = {"data": "data.jsonl", "stride": 3, "flip": False}
    torch.save(small | {"args": own}, "own.pt")
    for flags, stride, flip in (
        ("", 3, False), ("--recipe k400", 4, True), ("--data other.jsonl", 4, True),
    ):  # fmt: skip
        args = ev.parse_args(f"finetune own.pt {flags}".split())
        assert (args.stride, args.flip) == (stride, flip)
        assert ev.parse_args(f"show own.pt {flags}".split()).stride == stride
    assert all(call.kwargs["mmap"] for call in torch.load.call_args_list)  # reads no weights


NO_DATA = [
    ("small.pt", "--data: small.pt does not say what it was trained on; a manifest, or toy"),
    ("nowhere", "nowhere: neither a checkpoint nor a folder or hub name"),
    ("junk.pt", "junk.pt: cannot be loaded as a checkpoint"),
    ("gone.pt", "--data: gone.pt was trained on gone.jsonl, which is not there now"),
]


@pytest.mark.parametrize("command", ["linear", "retrieve", "finetune", "features", "show"])
@pytest.mark.parametrize("source, reason", NO_DATA)
def test_a_checkpoint_that_does_not_say(command, source, reason, checkpoint, folder):
    """No toy world takes the place of its data."""
    (folder / "junk.pt").write_bytes(b"junk")
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": {"data": "gone.jsonl"}}, "gone.pt")
    assert reason in fails(f"{command} {source}")
    assert not (folder / "data").exists()


@pytest.mark.parametrize("source", ["small.pt", "own.pt"])
def test_given_videos_need_no_data(source, checkpoint, clips, capsys):
    torch.save(torch.load(checkpoint) | {"args": {"data": "data.jsonl"}}, "own.pt")
    video = dataset.read_manifest(clips())[0]["path"]
    for command in (f"features {source} {video}", f"show {source} --video {video}"):
        found, said = run(capsys, command)
        assert found["settings"]["data"] is None and "Data: " not in said
    said = fails(f"features {source} {video} --data data.jsonl")
    assert "--data data.jsonl: and videos that are given; one of the two" in said


@pytest.mark.parametrize("command", ["linear", "retrieve", "features", "show"])
def test_the_output_names_its_data(command, checkpoint, clips, capsys):
    clips(8, 4, dict.fromkeys(range(12), {"captions": None}), name="own.jsonl")
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": {"data": "own.jsonl"}}, "own.pt")
    flags = "--epochs 1" if command == "linear" else ""
    found, said = run(capsys, f"{command} own.pt {flags}")
    note = found["notes"][-1]
    split = "" if command == "features" else ", split test"
    assert note == f"Data: own.jsonl{split}, recipe other." and f"\n{note}\n" in said
    assert found["settings"]["data"] == "own.jsonl"


def test_class_names_hold(clips, capsys):
    """Also numbers: an output is the class that the checkpoint says, whatever the test set has."""
    names, numbers = ["0", "1", "10", "12"], [0, 1, 10, 12]
    save_tuned("tuned.pt", classes=names)
    labels = {i: {"label": numbers[i % 4]} for i in range(16)}
    data = clips(8, 8, labels)
    videos = [record["path"] for record in dataset.read_manifest(data, "test")]
    how = "--views 1x1 --stride 4"
    best = run(capsys, f"predict tuned.pt {' '.join(videos)} {how}")[0]["rows"][::4]
    right = [row["class"] == str(numbers[i % 4]) for i, row in enumerate(best)]
    found, said = run(capsys, f"finetune tuned.pt --data {data} --epochs 0 {how}")
    assert found["rows"][0]["top-1"] == pytest.approx(sum(right) / 8) and "assumed" not in said
    # Fewer classes, another order, other numbers beside them; no split to train on.
    for label in (0, 1, 12):
        of = dict.fromkeys(range(8, 16), {"label": label}) | {8: {"label": 9}}
        data = clips(0, 8, {i - 8: change for i, change in of.items()}, name=f"{label}.jsonl")
        right = [row["class"] == str(label) for row in best[1:]]
        found, said = run(capsys, f"finetune tuned.pt --data {data} --epochs 0 {how}")
        assert found["rows"][0]["top-1"] == pytest.approx(sum(right) / 8), label
        assert found["rows"][-1]["top-1"] == 1 / 4 and "such as '9': misses" in said


# ---- features and predictions -------------------------------------------------------------------


def test_features(checkpoint, clips, capsys, monkeypatch):
    """Exactly what `linear` computes, averaged over views; who cannot be read is left out."""
    data = clips(changes={10: {"video": "gone.mp4"}})
    compute, computed = ev.compute_clips, {}

    def keeps(split, *more, **by):
        return computed.setdefault(split, compute(split, *more, **by))

    monkeypatch.setattr(ev, "compute_clips", keeps)
    flags = f"{checkpoint} --data {data} --views 2x2 --batch-size 8"
    run(capsys, f"linear {flags} --epochs 1")
    expected = computed.pop("test").values.mean(1).numpy()
    _, said = run(capsys, f"features {flags} --split test --out f.npz")
    with np.load("f.npz", allow_pickle=False) as file:
        found = dict(file)
    assert (found["features"] == expected).all() and found["features"].dtype == np.float32
    assert "gone.mp4: No such file" in said and "test: 4 of 5 clips" in said
    records = [r for r in dataset.read_manifest(data, "test") if r["video"] != "gone.mp4"]
    for key in ("video", "label", "split"):
        assert found[f"{key}s"].tolist() == [record[key] for record in records]
    assert json.loads(str(found["settings"]))["views"] == "2x2"
    run(capsys, f"features {checkpoint} --data {data}")  # all splits, beside the checkpoint
    with np.load("features.npz") as file:
        assert set(file["splits"]) == {"train", "test"} and len(file["features"]) == 12


def test_features_of_layers_and_tokens(checkpoint, clips, capsys):
    """Against hooks on the blocks; the mean of tokens is what is written without --tokens."""
    data, found = clips(3, 2), {}
    depth = torch.load(checkpoint, weights_only=True)["config"]["depth"]
    for name, more in (
        ("mean", ""), ("last", f"--layer {depth}"), ("first", "--layer 1"), ("tokens", "--tokens"),
        ("first tokens", "--layer 1 --tokens"),
    ):  # fmt: skip
        flags = f"--views 1x1 --no-amp --batch-size 2 --out {name.replace(' ', '-')}.npz"
        run(capsys, f"features {checkpoint} --data {data} {flags} {more}")
        found[name] = np.load(f"{name.replace(' ', '-')}.npz")["features"]
    assert (found["mean"] == found["last"]).all()
    assert found["tokens"].dtype == np.float16 and found["tokens"].ndim == 3
    for mean, tokens in (("mean", "tokens"), ("first", "first tokens")):
        of_tokens = found[tokens].astype(np.float32).mean(1)
        np.testing.assert_allclose(of_tokens, found[mean], atol=2e-3)
    model, _ = ev.load_model(checkpoint)
    seen = {}
    model.encoder.blocks[0].register_forward_hook(lambda *hooked: seen.update(first=hooked[2]))
    args = ev.parse_args(f"features {checkpoint} --data {data}".split())
    video = ev.Views(dataset.read_manifest(data), model.config, args, (1, 1))[0][1]
    model.encode(tgmae.normalize(video))
    np.testing.assert_allclose(seen["first"].mean(1)[0].detach(), found["first"][0], atol=1e-5)
    command = f"features {checkpoint} --data {data}"
    assert f"--layer 9: the encoder has 1 to {depth}" in fails(f"{command} --layer 9")
    assert "--tokens, --views 2x1: tokens are of one view" in fails(
        f"{command} --tokens --views 2x1"
    )


def test_features_of_files_and_folders(checkpoint, world, folder, capsys):
    (folder / "some/deep").mkdir(parents=True)
    records = dataset.read_manifest(world / "manifest.jsonl")
    for record, name in zip(records, ("some/a.mp4", "some/deep/b.mp4", "c.mp4")):
        (folder / name).symlink_to(record["path"])
    (folder / "notes.txt").write_text("no video")
    _, said = run(capsys, f"features {checkpoint} c.mp4 some notes.txt --out f.npz")
    assert "failed  notes.txt: " in said and "given: 3 of 4 clips" in said
    with np.load("f.npz") as file:
        assert file["videos"].tolist() == ["c.mp4", "some/a.mp4", "some/deep/b.mp4"]


@needs_transformers
def test_predict(clips, capsys):
    """The classes that finetune --epochs 0 counts, by the checkpoint's own views, both; the
    exported folder finds the same probabilities."""
    args = {"views": "2x1", "stride": 2, "sampling": "dense"}
    save_tuned("tuned.pt", args=args, classes=CLASSES)
    data = clips(8, 8)
    records = dataset.read_manifest(data, "test")
    videos = [record["path"] for record in records]
    tested, said = run(capsys, f"finetune tuned.pt --data {data} --epochs 0")
    assert "Mean over 2x1 views, time x space (dense, stride 2)." in said
    assert (
        ev.parse_args(words("finetune tuned.pt --data a --epochs 0 --recipe ssv2")).views == "2x3"
    )
    found, said = run(capsys, f"predict tuned.pt {' '.join(videos)}")
    rows = [found["rows"][i : i + 4] for i in range(0, 32, 4)]  # of each video, the likeliest first
    right = [best[0]["class"] == record["label"] for best, record in zip(rows, records)]
    assert sum(right) / 8 == tested["rows"][0]["top-1"] and "Mean over 2x1 views" in said
    assert all(row["video"] == path for best, path in zip(rows, videos) for row in best)
    assert all(sum(row["probability"] for row in best) == pytest.approx(1) for best in rows)
    ev.main("export tuned.pt --out folder".split())
    again, _ = run(capsys, f"predict folder {' '.join(videos)}")
    for one, other in zip(found["rows"], again["rows"], strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    with pytest.raises(SystemExit, match="required: VIDEO"):
        ev.main(["predict", "tuned.pt"])


@pytest.mark.slow
def test_features_of_two_processes(checkpoint, clips, folder):
    command = f"features {checkpoint} --data {clips(9, 6)} --batch-size 2"
    for processes in (1, 2):
        flags = words(f"{command} --out {processes}.npz", workers=1)
        done = torchrun(processes, ROOT / "eval.py", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
    with np.load("1.npz") as one, np.load("2.npz") as two:
        assert (one["features"] == two["features"]).all()
        assert one["videos"].tolist() == two["videos"].tolist() and len(one["videos"]) == 15


# ---- bad input ----------------------------------------------------------------------------------

BAD = [
    ("linear small.pt --data data.jsonl --test-split nowhere", "no clips of split 'nowhere'"),
    ("linear small.pt --data data.jsonl --views 5", "--views 5: must be like 5x3"),
    ("linear small.pt --data data.jsonl --seed -1", "--seed -1: must not be negative"),
    ("linear small.pt --data data.jsonl --holdout 0", "--holdout 0"),
    ("linear small.pt --data data.jsonl --json no/out.json", "no such folder"),
    ("linear small.pt --data data.jsonl.gone", "data.jsonl.gone"),
    ("linear nowhere --data data.jsonl", "nowhere: neither a checkpoint nor a folder"),
    ("linear junk.pt --data data.jsonl", "junk.pt: cannot be loaded"),
    ("linear wrong.pt --data data.jsonl", "wrong.pt: not the weights of a video MAE"),
    ("finetune small.pt --data data.jsonl --randaug 40", "--randaug 40: must lie in 0 to"),
    ("finetune small.pt --data data.jsonl --crop-scale 2", "--crop-scale 2: must lie in 0 to"),
    ("finetune small.pt --data data.jsonl --smoothing 2", "--smoothing 2: must lie in 0 to"),
    ("finetune small.pt --data data.jsonl --mixup -1", "--mixup -1: must not be negative"),
    ("finetune small.pt --data data.jsonl --holdout 0.99", "--holdout 0.99: leaves 0 of 8"),
    ("finetune small.pt --data data.jsonl --epochs 0", "is not fine-tuned"),
    ("finetune small.pt --data data.jsonl --batch-size 9", "fewer than a step takes"),
    ("show small.pt --data data.jsonl --number 5", "--number 5: split 'test' has clips 0 to 4"),
    ("show small.pt --data silent.jsonl --layers 3", "--layers 3: the encoder has 1 to 2"),
    ("show small.pt --data silent.jsonl --mask tgm", "--mask tgm: needs --caption"),
    ("features small.pt empty", "empty: a folder without videos"),
    ("features small.pt junk.pt", "none of the 1 given clips can be read: junk.pt: Invalid data"),
    ("features small.pt junk.pt --out no/f.npz", "--out no/f.npz: no such folder no"),
    ("features small.pt junk.pt --views 0x1", "--views 0x1: must be like 5x3"),
    ("predict small.pt junk.pt", "small.pt: pre-trained, not fine-tuned"),
    ("linear small.pt --data gone", "none of the 5 test clips can be read: gone.mp4: No such file"),
]


@pytest.mark.parametrize("command, reason", BAD)
def test_bad_input(command, reason, checkpoint, clips, folder):
    clips()
    clips(changes=dict.fromkeys(range(13), {"captions": None}), name="silent.jsonl")
    clips(changes=dict.fromkeys(range(8, 13), {"video": "gone.mp4"}), name="gone")
    (folder / "empty").mkdir()
    (folder / "junk.pt").write_bytes(b"junk")
    torch.save({"config": TINY, "model": {"a": torch.ones(1)}}, "wrong.pt")
    assert reason in fails(command)


LAST = "encoder.blocks.1.mlp.fc2.weight"


@pytest.mark.parametrize("command, split, weight", [
    ("linear small.pt", "train", LAST), ("retrieve small.pt", "test", LAST),
    ("features small.pt", "train", LAST), ("finetune tuned.pt --epochs 0", "test", LAST),
    ("predict tuned.pt", "test", LAST), ("show small.pt", "test", "decoder.norm.bias"),
    ("show tuned.pt", "test", LAST), ("export small.pt", None, LAST),
    ("export small.pt", None, "decoder.norm.bias"),
])  # fmt: skip
def test_bad_numbers_are_no_answers(command, split, weight, checkpoint, clips):
    """NaN in the weights is an error that names the clip, the first of a split, or the weight."""
    data, (run, source) = clips(), command.split()[:2]
    save_tuned("tuned.pt", classes=CLASSES)
    saved = torch.load(source, weights_only=True)
    saved["model"][weight].view(-1)[0] = math.nan
    torch.save(saved, source)
    named = dataset.read_manifest(data, split)[0]["path"] if split else f"{source}, {weight}"
    more = {"predict": named, "show": f"--video {named}", "export": ""}.get(run, f"--data {data}")
    assert f"{named}: not finite" in fails(f"{command} {more}")


def test_bad_numbers_of_one_clip(checkpoint, clips):
    """Where the weights are fine, the clip is named, in every process's order."""
    records = dataset.read_manifest(clips(), "test")
    args = ev.parse_args("linear x.pt --data toy --batch-size 2 --workers 0 --device cpu".split())
    args.amp, calls = False, iter([1.0, math.inf, 1.0])

    def compute(video):
        return torch.tensor([[1.0], [next(calls)]])[: len(video)]

    with pytest.raises(ValueError, match=f"^{records[3]['video']}: not finite"):
        ev.compute_clips("test", records, args, tgmae.Config(**TINY), (1, 1), compute)
    bad = torch.tensor([[1.0, math.nan]])
    with pytest.raises(ValueError, match="scores: not finite"):
        ev.accuracy(bad, torch.tensor([1]))
    for sides in ((bad, bad.nan_to_num()), (bad.nan_to_num(), bad)):
        with pytest.raises(ValueError, match="not finite"):
            ev.recall(*sides, torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("command", ["linear", "retrieve", "finetune"])
def test_labels_must_be_there_and_known(command, checkpoint, clips):
    clips(changes=dict.fromkeys(range(13), {"label": None}), name="bare.jsonl")
    split, n = ("test", 5) if command == "finetune" else ("train", 8)
    said = fails(f"{command} {checkpoint} --data bare.jsonl")
    assert f"bare.jsonl: {n} of {n} clips of split {split!r} have no label, such as" in said
    clips(changes=dict.fromkeys(range(8, 13), {"label": "unseen"}), name="other.jsonl")
    said = fails(f"{command} {checkpoint} --data other.jsonl")
    assert "other.jsonl, split 'test': none of its classes is known, such as 'unseen'" in said


def test_what_is_said_and_goes_on(checkpoint, clips, capsys):
    """A class that training lacks is a miss; a clip shorter than a view repeats frames."""
    data = clips(changes={10: {"label": "unseen"}})
    found, said = run(capsys, f"retrieve {checkpoint} --data {data} --stride 8 --views 2x1")
    assert "1 clips are of 1 classes that training lacks, such as 'unseen': misses" in said
    # 8 in the gallery: all are found but that one
    assert found["rows"][0]["R@10"] == pytest.approx(0.8)
    assert "5 of the test clips are shorter than a view" in said
    assert found["clips"]["test"]["shorter than a view"] == 5
