"""eval.py: its arithmetic against loops, tables made by hand, and transformers; its commands end to
end."""

import argparse
import itertools
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, TINY, needs_transformers
from PIL import Image
from test_ranks import torchrun

import dataset
import eval as ev
import tgmae
import train


def run(capsys, *argv, workers=0):
    """Runs a command in this process -> what it wrote to --json, what it said."""
    ev.main(
        [
            *map(str, argv),
            "--json",
            "out.json",
            *(() if argv[0] == "export" else ("--workers", str(workers))),
        ]
    )
    return json.loads(open("out.json").read()), capsys.readouterr().out


def fails(*argv):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        ev.main([*map(str, argv), *(() if argv[0] == "export" else ("--workers", "0"))])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


SMALL = dict(image_size=64, patch_size=16, num_frames=4, embed_dim=48, depth=2, num_heads=3,
             decoder_embed_dim=96,
             decoder_depth=1, decoder_num_heads=3, text_dim=64)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as train.py writes it, never trained."""
    config = tgmae.Config(**SMALL)
    model = tgmae.TGMAE(config)
    for name, value in model.state_dict().items():  # so that no part is as it began
        if value.is_floating_point():
            value.add_(0.02 * torch.randn_like(value))
    path = tmp_path / "small.pt"
    torch.save(
        {
            "config": asdict(config),
            "model": model.state_dict(),
            "args": {"clip": "x", "mask": "tube"},
        },
        path,
    )
    return path


@pytest.fixture
def clips(world, tmp_path):
    """clips(train, test, **changes of a record) -> a manifest of so many toy clips of 4 classes
    (number % 4)."""

    def make(train=8, test=5, name="data.jsonl", edit=lambda record: record):
        records = []
        for split, count in (("train", train), ("test", test)):
            for i, record in enumerate(
                dataset.read_manifest(world / "manifest.jsonl", split)[:count]
            ):
                record = {
                    "video": record["path"],
                    "captions": record["captions"],
                    "label": f"class {i % 4}",
                    "split": split,
                }
                records.append(edit(record))
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return make


# ---- arithmetic ---------------------------------------------------------------------------------


def test_dense_views_by_hand():
    frames = ev.view_frames(
        0, 300, 16, 4, "dense", 5
    )  # 75 strided frames, starts 59 * v / 4 of them, rounded down
    assert [view[0] for view in frames] == [0, 4 * 14, 4 * 29, 4 * 44, 4 * 59]
    assert all(np.diff(view).tolist() == [4] * 15 for view in frames) and frames[4][-1] == 296
    assert ev.view_frames(0, 300, 16, 4, "dense", 1)[0][0] == 4 * 29
    assert ev.view_frames(10, 30, 4, 2, "dense", 3) == [
        [10, 12, 14, 16],
        [16, 18, 20, 22],
        [22, 24, 26, 28],
    ]
    # Too short: the last strided frame again, in every view.
    assert ev.view_frames(0, 10, 4, 4, "dense", 2) == [[0, 4, 8, 8]] * 2


def test_tsn_views_by_hand():
    """SSv2's test: the even and the odd ones of 32 frames."""
    assert ev.view_frames(0, 32, 16, 2, "tsn", 2) == [list(range(0, 32, 2)), list(range(1, 32, 2))]
    even = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    odd = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19]
    assert ev.view_frames(0, 20, 16, 2, "tsn", 2) == [even, odd]
    assert ev.view_frames(5, 21, 4, 2, "tsn", 1) == [[7, 11, 15, 19]]
    assert ev.view_frames(0, 2, 4, 2, "tsn", 1) == [[0, 0, 1, 1]]
    for n in (33, 47, 117):  # the same as sorting both halves together and dealing them out
        tick = n / 16
        both = sorted(
            [int(tick / 2 + tick * x) for x in range(16)] + [int(tick * x) for x in range(16)]
        )
        assert ev.view_frames(0, n, 16, 2, "tsn", 2) == [both[0::2], both[1::2]]


def test_crops_by_hand():
    assert ev.view_crops((240, 320), 3) == [dataset.Crop(0, left, 240, 240) for left in (0, 40, 80)]
    assert ev.view_crops((100, 61), 3) == [dataset.Crop(top, 0, 61, 61) for top in (0, 19, 39)]
    assert ev.view_crops((240, 320), 1) == [dataset.Crop(0, 40, 240, 240)]


def test_views_are_averaged_after_the_softmax(checkpoint, clips):
    """By hand: two views whose logits' mean favours class 1, and the mean of whose softmax favours
    class 0."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 5.0, 4.9]])
    softmax = [
        [math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in logits.tolist()
    ]
    mean = [(a + b) / 2 for a, b in zip(*softmax)]
    assert logits.mean(0).argmax() == 1 and mean.index(max(mean)) == 0

    class Fixed(torch.nn.Module):
        config = tgmae.Config(**SMALL)

        def forward(self, video):
            return logits.repeat(len(video) // 2, 1)

    records = dataset.read_manifest(clips(), "test")
    args = argparse.Namespace(
        batch_size=4, workers=0, device="cpu", amp=False, stride=2, sampling="dense"
    )
    found = ev.test_scores(Fixed(), "test", records, args, (2, 1))
    torch.testing.assert_close(found.values, torch.tensor(mean).expand(5, 3))
    torch.testing.assert_close(
        ev.view_scores(torch.nn.Identity(), logits[None]), torch.tensor([mean])
    )


def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    found = ev.accuracy(scores, torch.tensor([1, 2, -1]), ks=(1, 2, 3, 5))
    assert found == pytest.approx({"top-1": 1 / 3, "top-2": 1 / 3, "top-3": 2 / 3, "top-5": 2 / 3})
    assert ev.chance_row("model", 4) == {"model": "chance", "top-1": 0.25, "top-5": 1.0}


def test_recall_is_a_loop():
    queries, gallery = torch.randn(37, 6), torch.randn(61, 6)
    a, b = torch.randint(0, 9, (37,)), torch.randint(0, 9, (61,))
    expected = dict.fromkeys(("R@1", "R@5", "R@10"), 0)
    for q, label in zip(queries.tolist(), a.tolist()):
        cosines = [
            sum(x * y for x, y in zip(q, g)) / math.hypot(*q) / math.hypot(*g)
            for g in gallery.tolist()
        ]
        order = sorted(range(61), key=lambda i: -cosines[i])
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
    """VideoMAE's numbers for ViT-B at 0.75: block 11 at 0.75, ..., block 0 at 0.75^12, the
    embedding 0.75^13."""
    with torch.device("meta"):
        model = ev.Classifier(tgmae.PRESETS["base"], 10)
    scales = ev.layer_scales(model, 0.75)
    table = {"encoder.patch_embed.proj.weight": 0.023757, "encoder.patch_embed.proj.bias": 0.023757,
             "fc_norm.weight": 1.0, "fc_norm.bias": 1.0, "head.weight": 1.0,
             "head.bias": 1.0}  # fmt: skip
    blocks = [
        0.031676, 0.042235, 0.056314, 0.075085, 0.100113, 0.133484, 0.177979, 0.237305, 0.316406,
        0.421875,
        0.5625, 0.75,
    ]  # fmt: skip
    names = "norm1.weight norm1.bias norm2.weight norm2.bias attn.qkv.weight attn.q_bias "
    names += "attn.v_bias attn.proj.weight "
    names += "attn.proj.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
    table |= {
        f"encoder.blocks.{i}.{name}": value
        for i, value in enumerate(blocks)
        for name in names.split()
    }
    assert scales == pytest.approx(table, abs=1e-6)


def test_optimizer_groups():
    model = ev.Classifier(tgmae.Config(**SMALL), 3)
    optimizer = ev.make_optimizer(model, argparse.Namespace(layer_decay=0.5, weight_decay=0.05))
    name_of = {id(p): name for name, p in model.named_parameters()}
    seen = {
        name_of[id(p)]: (g["scale"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert seen.keys() == set(name_of.values())
    for name, (scale, decay) in seen.items():
        assert scale == ev.layer_scales(model, 0.5)[name]
        assert decay == (0.05 if dict(model.named_parameters())[name].ndim == 2 else 0.0), name


def test_fresh_head_and_norm():
    model = ev.Classifier(tgmae.PRESETS["toy"], 1000)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert not model.head.bias.any() and (model.fc_norm.weight == 1).all()


def test_drop_path_grows_with_depth():
    with torch.device("meta"):
        model = ev.Classifier(replace(tgmae.PRESETS["base"], drop_path=0.1), 10)
    rates = [block.drop_path.p for block in model.encoder.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


# ---- augmentation -------------------------------------------------------------------------------


def finetune_args(*more):
    return ev.parse_args(["finetune", "x.pt", "--recipe", "k400", *more])


def test_augmentation_treats_frames_alike():
    """16 equal frames stay equal through RandAugment, crop, flip and erasing."""
    frame = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    augment = ev.augmentation(finetune_args("--erasing", "1"), 32)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out = augment(frame.expand(16, -1, -1, -1))
        assert out.shape == (16, 3, 32, 32) and out.dtype == torch.float32
        assert all(torch.equal(out[0], other) for other in out)
        seen.add(round(out.mean().item(), 4))
    assert len(seen) == 20


def test_augmentation_off_is_a_crop():
    args = finetune_args("--randaug", "0", "--erasing", "0", "--no-flip", "--crop-scale", "1")
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = tgmae.normalize(frames.transpose(0, 1)[None])[0].transpose(0, 1)
    found = [ev.augmentation(args, 32)(frames) for _ in range(8)]  # the aspect is still random
    assert any(torch.allclose(out, expected, atol=1e-5) for out in found)


def test_mixing():
    """Shares are what each video contributed; label smoothing on top is timm's."""
    video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 4, 8, 8).contiguous()
    target = torch.tensor([0, 1, 2, 3])
    for flags in (("--cutmix", "0"), ("--mixup", "0"), ()):
        torch.manual_seed(3)
        clips, shares = ev.mix(video, target, 5, finetune_args(*flags))
        assert clips.shape == video.shape and type(clips) is torch.Tensor and shares.shape == (4, 5)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        # Video i holds the number i, so its mean is the shares' mean class.
        torch.testing.assert_close(clips.mean((1, 2, 3, 4)), shares @ torch.arange(5.0))
    assert ev.mix(video, target, 5, finetune_args("--mixup", "0", "--cutmix", "0"))[1] is target


def test_the_loss_is_smoothed(checkpoint, clips, tmp_path, capsys, monkeypatch):
    """The loss that is logged, from the logits and classes that it was computed of."""
    monkeypatch.chdir(tmp_path)
    seen, cross_entropy = [], F.cross_entropy

    def sees(logits, target, **more):
        seen.append((logits.detach(), target))
        return cross_entropy(logits, target, **more)

    monkeypatch.setattr(F, "cross_entropy", sees)
    flags = (
        *SHORT,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--repeat",
        1,
        "--mixup",
        0,
        "--cutmix",
        0,
    )
    run(capsys, "finetune", checkpoint, "--data", clips(4, 4), *flags, "--out", "run")
    logits, target = seen[0]
    smooth = F.one_hot(target, logits.shape[1]) * 0.9 + 0.1 / logits.shape[1]
    logged = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])["loss"]
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    assert logged == pytest.approx(expected.item(), abs=1e-5)


def test_repeats_of_a_video_are_not_mixed_with_each_other():
    samples = [
        {
            "video": torch.full((2, 3, 4, 8, 8), float(i)),
            "target": torch.tensor(i),
            "name": "",
            "bad": [],
        }
        for i in range(4)
    ]
    batch = ev.collate(samples)
    assert (
        batch["target"].tolist() == [0, 1, 2, 3] * 2
        and batch["video"].mean((1, 2, 3, 4)).tolist() == [0, 1, 2, 3] * 2
    )
    _, shares = ev.mix(batch["video"], batch["target"], 4, finetune_args("--cutmix", "0"))
    assert ((shares > 0).sum(1) == 2).all()


def test_samples_follow_from_the_seed(clips):
    records = dataset.read_manifest(clips(), "train")
    args = finetune_args("--sampling", "tsn")
    data = ev.Augmented(records, torch.arange(8) % 4, tgmae.Config(**SMALL), args)
    first, again = data[0, 3], data[0, 3]
    assert first["video"].shape == (2, 3, 4, 64, 64) and first["target"] == 3
    assert torch.equal(first["video"], again["video"]) and not torch.equal(
        first["video"][0], first["video"][1]
    )
    assert not torch.equal(first["video"], data[1, 3]["video"])
    both = ev.collate([first, data[0, 2]])
    assert both["video"].shape == (4, 3, 4, 64, 64) and both["target"].tolist() == [3, 2, 3, 2]


def test_the_last_frame_is_the_last(clips, monkeypatch):
    """TSN's jitter just below 1 asks for no frame beyond the end."""
    records, asked, read = dataset.read_manifest(clips(), "train"), [], dataset.read_clip
    monkeypatch.setattr(
        dataset, "read_clip", lambda path, frames: asked.append(frames) or read(path, frames)
    )
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 1 - 2**-24))
    config = tgmae.Config(**{**SMALL, "num_frames": 16})
    ev.Augmented(
        records,
        torch.zeros(8),
        config,
        finetune_args("--sampling", "tsn", "--randaug", "0", "--erasing", "0"),
    )[0, 0]
    assert asked[0][-1] == 23


def test_training_frames(clips, monkeypatch):
    """tsn: a frame of each of 4 equal segments of 24; dense: 4 frames, a stride apart; drawn anew
    each epoch."""
    records, asked = dataset.read_manifest(clips(), "train"), []
    read = dataset.read_clip
    monkeypatch.setattr(
        dataset, "read_clip", lambda path, frames: asked.append(frames) or read(path, frames)
    )
    for sampling in ("tsn", "dense"):
        args = finetune_args(
            "--sampling", sampling, "--repeat", "1", "--randaug", "0", "--stride", "3"
        )
        data = ev.Augmented(records, torch.zeros(8, dtype=torch.long), tgmae.Config(**SMALL), args)
        asked.clear()
        for epoch in range(12):
            data[epoch, 0]
        assert len({tuple(frames) for frames in asked}) > 6
        for frames in asked:
            if sampling == "tsn":
                assert [frame // 6 for frame in frames] == [0, 1, 2, 3]
            else:
                assert np.diff(frames).tolist() == [3, 3, 3] and 0 <= frames[0] and frames[-1] < 24


def test_recipes():
    """The paper's Table 9 and DESIGN's table of protocols, by --recipe."""
    for name, epochs, lr, views in (("k400", 75, 1e-3, "5x3"), ("ssv2", 30, 5e-4, "2x3"),
                                    ("ucf101", 100, 1e-3, "5x3"),
                                    ("hmdb51", 50, 1e-3, "5x3"), ("diving48", 50, 1e-3, "5x3"),
                                    ("epic55", 50, 1e-3, "5x3")):  # fmt: skip
        args = ev.parse_args(["finetune", "x.pt", "--data", "a.jsonl", "--recipe", name])
        assert (args.epochs, args.lr, args.views) == (epochs, lr, views)
        assert args.test_split == ("val" if name in ("k400", "ssv2", "epic55") else "test")
        assert (args.layer_decay, args.drop_path, args.mixup, args.cutmix, args.smoothing) == (
            0.75,
            0.1,
            0.8,
            1.0,
            0.1,
        )
        assert args.flip == (name != "ssv2") and args.sampling == (
            "tsn" if name == "ssv2" else "dense"
        )
        assert (args.warmup_epochs, args.repeat, args.erasing, args.weight_decay) == (
            5,
            2,
            0.25,
            0.05,
        )


# ---- against transformers -----------------------------------------------------------------------


@needs_transformers
def test_logits_are_transformers(tmp_path, monkeypatch):
    """A fine-tuned model, exported: VideoMAEForVideoClassification's logits, with its fc_norm's
    eps; and back."""
    monkeypatch.chdir(tmp_path)
    config = tgmae.Config(**SMALL)
    model = ev.Classifier(config, 5)
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    saved = {
        "config": asdict(config),
        "model": model.state_dict(),
        "classes": list("abcde"),
        "args": {},
    }
    torch.save(saved, "tuned.pt")
    ev.main(["export", "tuned.pt", "--out", "folder"])
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained("folder").eval()
    assert theirs.config.id2label == dict(enumerate("abcde"))
    video = torch.randn(2, 3, 4, 64, 64)
    model.eval().fc_norm.eps = theirs.fc_norm.eps
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2)).logits
        torch.testing.assert_close(model(video), expected, atol=1e-4, rtol=1e-4)
        again, more = ev.load_model("folder")
        torch.testing.assert_close(again(video), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(again, ev.Classifier) and more["classes"] == list("abcde")


@needs_transformers
def test_export_gives_the_same_features(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, said = run(capsys, "export", checkpoint, "--out", "folder")
    assert found["difference"] < 1e-5 and "VideoMAEForPreTraining" in said
    model, _ = ev.load_model(checkpoint)
    video, mask = torch.randn(2, 3, 4, 64, 64), tgmae.topk_mask(torch.rand(2, 2, 4, 4), 0.5)
    bare = transformers.VideoMAEModel.from_pretrained("folder").eval()
    full = transformers.VideoMAEForPreTraining.from_pretrained("folder").eval()
    with torch.no_grad():
        expected = model.encode(video)
        torch.testing.assert_close(
            bare(video.transpose(1, 2)).last_hidden_state, expected, atol=1e-5, rtol=1e-5
        )
        pred = full(video.transpose(1, 2), bool_masked_pos=mask).logits
        torch.testing.assert_close(pred, model(video, mask)["pred"], atol=1e-4, rtol=1e-4)
        # And every other form of the same weights: the folder, model.pt, the official
        # layout.
        conv = (
            model.state_dict()["encoder.patch_embed.proj.weight"]
            .view(48, 2, 16, 16, 3)
            .permute(0, 4, 1, 2, 3)
        )
        official = {k: v for k, v in model.state_dict().items() if not k.startswith("predictor")}
        official["encoder.patch_embed.proj.weight"] = conv
        flags = argparse.Namespace(input_size=64, num_frames=4)
        monkeypatch.setitem(
            tgmae.PRESETS, "toy", tgmae.Config(**SMALL)
        )  # whose heads are of that width
        torch.save({"model": official, "args": flags}, "official.pth")
        for source in ("folder", "folder/model.pt", "official.pth"):
            again, _ = ev.load_model(source)
            torch.testing.assert_close(again.encode(video), expected, atol=1e-5, rtol=1e-5)
            assert again.has_decoder
        bare.save_pretrained("encoder")
        again, _ = ev.load_model("encoder")
        torch.testing.assert_close(again.encode(video), expected, atol=1e-5, rtol=1e-5)
        assert not again.has_decoder
    ev.main(["export", "encoder", "--out", "encoder2"])
    ev.main(["export", "official.pth", "--out", "official"])
    assert "is there already" in fails("export", checkpoint, "--out", "folder")


@needs_transformers
def test_attention_is_transformers(tmp_path):
    """Attention of the centre patch, of each layer: what transformers returns with
    output_attentions."""
    config = tgmae.Config(**SMALL)
    model = tgmae.TGMAE(config).eval()
    for value in model.encoder.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    model.has_decoder = True
    theirs = ev.huggingface_of(model).videomae
    theirs.set_attn_implementation("eager")
    video = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        attentions = theirs(video.transpose(1, 2), output_attentions=True).attentions
    found = ev.attention_maps(model, video, [0, 1], 21)
    assert found.shape == (2, 32)
    for layer in (0, 1):
        torch.testing.assert_close(
            found[layer], attentions[layer][0].mean(0)[21], atol=1e-6, rtol=1e-4
        )


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_toy_features(fully_trained, full_workdir, capsys):
    """Linear probe and retrieval: far above random weights and chance; fine-tuning above the
    probe."""
    found, said = run(capsys, "linear", fully_trained, workers=2)
    probe, random, chance = found["rows"]
    assert random["encoder"].startswith("random") and chance["top-1"] == 1 / 16
    assert probe["top-1"] > random["top-1"] + 0.2 and random["top-1"] > chance["top-1"]
    assert (
        "learning rate" in said.lower()
        and "of 16 classes" in said
        and found["clips"]["test"]["clips"] == "200 of 200 clips"
    )
    rows = run(capsys, "retrieve", fully_trained, workers=2)[0]["rows"]
    zero_shot, random, chance = rows
    assert zero_shot["R@1"] > 2 * max(random["R@1"], chance["R@1"])
    assert (zero_shot["queries"], zero_shot["gallery"]) == (200, 800)
    tuned = run(capsys, "finetune", fully_trained, "--out", "tuned", workers=2)[0]["rows"]
    assert [row["model"] for row in tuned] == ["tuned/last.pt", "tuned/best.pt", "chance"]
    assert tuned[0]["top-1"] > probe["top-1"]


def test_linear_leaves_the_backbone_alone(checkpoint, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept, load = [], ev.load_model
    monkeypatch.setattr(ev, "load_model", lambda source: kept.append(load(source)) or kept[-1])
    data = clips(12, 5)
    found, said = run(
        capsys,
        "linear",
        checkpoint,
        "--data",
        data,
        "--epochs",
        3,
        "--views",
        "2x1",
        "--train-views",
        "2x2",
    )
    before = torch.load(checkpoint, weights_only=True)["model"]
    after = kept[0][0].state_dict()
    assert (
        all(torch.equal(before[name], after[name]) for name in before)
        and before.keys() == after.keys()
    )
    assert len(found["rows"]) == 2 and found["rows"][1] == {
        "encoder": "chance",
        "top-1": 0.25,
        "top-5": 1.0,
    }
    assert set(next(iter(found["rates"].values()))["held-out top-1"]) == {
        f"{rate:g}" for rate in ev.RATES
    }
    ((name, chosen),) = found["rates"].items()
    assert f"the best of 6 on 20% of the training clips: {chosen['rate']:g} for {name}" in said


def test_the_rate_is_chosen_without_test_clips(monkeypatch):
    """Of features that a rate of 1 separates and 1e-6 cannot, 1 is chosen, by rows of the training
    clips."""
    y = torch.arange(40) % 4
    x = F.one_hot(y, 4).float()[:, None] + 0.01 * torch.randn(40, 1, 4)
    args = argparse.Namespace(seed=0, holdout=0.25, rates=(1e-6, 1.0), epochs=30)
    rate, found = ev.choose_rate(x, y, 4, args)
    assert rate == 1.0 and found[1.0] == 1.0 > found[1e-6]
    rows, train = [], ev.train_head
    monkeypatch.setattr(ev, "train_head", lambda x, *more: rows.append(len(x)) or train(x, *more))
    ev.choose_rate(x, y, 4, args)
    assert rows == [30, 30]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["linear", "retrieve", "finetune"])
def test_two_processes_are_one(command, checkpoint, clips, tmp_path):
    """Exactly the same numbers, for 11 and 7 clips of which one of each cannot be read."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    data = clips(11, 7)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[3]["video"] = lines[13]["video"] = "broken.mp4"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {
        "linear": ("--epochs", 5, "--random"),
        "retrieve": ("--random",),
        "finetune": ("--epochs", 0),
    }[command]
    source = checkpoint
    if command == "finetune":
        source, model = tmp_path / "tuned.pt", ev.Classifier(tgmae.Config(**SMALL), 4)
        torch.nn.init.normal_(model.head.weight)
        torch.save(
            {
                "config": SMALL,
                "model": model.state_dict(),
                "classes": [f"class {i}" for i in range(4)],
            },
            source,
        )
    results = []
    for processes in (1, 2):
        flags = ("--data", data, "--views", "2x1", "--batch-size", 4, "--workers", 0, *more)
        done = torchrun(
            processes,
            ROOT / "eval.py",
            command,
            source,
            *flags,
            "--json",
            tmp_path / f"{processes}.json",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.count("\n| --- |") == 1
            and "6 of 7 clips" in done.stdout
            and "broken.mp4" in done.stdout
        )
        results.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    for part in ("rows", "clips", "rates"):
        assert results[0].get(part) == results[1].get(part)
    failed = results[0]["clips"]["test"]["failed"]
    assert [video for video, _ in failed] == ["broken.mp4"] and results[0]["clips"]["test"][
        "clips"
    ] == "6 of 7 clips"


SHORT = ("--epochs", 3, "--warmup-epochs", 1, "--batch-size", 4, "--recipe", "other", "--stride",
         2, "--views", "1x1",
         "--repeat", 2, "--lr", 0.1)  # fmt: skip


def test_finetune_resumes_exactly(checkpoint, clips, tmp_path, capsys, monkeypatch):
    """The full recipe, stopped after an epoch and run again: the weights and the log of an
    undisturbed run."""
    monkeypatch.chdir(tmp_path)
    data = clips(10, 4)
    flags = ("finetune", checkpoint, "--data", data, *SHORT, "--holdout", "0.2", "--out")
    run(capsys, *flags, "whole")
    save = train.save_checkpoint

    def stop(path, **state):
        save(path, **state)
        if path.name == "last.pt" and state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ev, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *flags, "parts")
    monkeypatch.setattr(ev, "save_checkpoint", save)
    (tmp_path / "parts" / "log.jsonl").open("a").write(
        '{"step": 5, "loss": 1}\n{"st'
    )  # after the checkpoint
    found, said = run(capsys, *flags, "parts")
    assert "from step 4" in said
    whole, parts = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    logs = [[json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("whole", "parts")]
    for log in logs:
        assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
        for line in log:
            line.pop("clips_per_s", None)
    assert logs[0] == logs[1] and all("val top-1" in log for log in logs[0][2::3])
    best = max(log["val top-1"] for log in logs[0][2::3])
    assert torch.load("whole/best.pt", weights_only=True)["best"] == best
    assert [row["model"] for row in found["rows"]] == ["parts/last.pt", "parts/best.pt", "chance"]
    # Warm-up from the least rate, then down to it, each times the global batch of 4 videos / 256.
    rates = [line["lr"] for line in logs[0] if "lr" in line]
    assert (
        rates[0] == pytest.approx(1e-6 * 4 / 256)
        and rates[1] == pytest.approx(0.1 * 4 / 256)
        and rates[2] > rates[3]
    )
    # Tested again as it is; another run is not resumed from it.
    again, _ = run(
        capsys,
        "finetune",
        "parts/last.pt",
        "--data",
        data,
        "--epochs",
        0,
        "--stride",
        2,
        "--views",
        "1x1",
        "--recipe",
        "other",
    )
    assert again["rows"][0]["top-1"] == found["rows"][0]["top-1"]
    assert "of another run (lr 0.1 -> 0.2" in fails(*flags, "parts", "--lr", 0.2)
    assert "of another run (scratch False -> True" in fails(*flags, "parts", "--scratch")


def test_finetune_begins_with_the_checkpoint(checkpoint, clips, tmp_path, capsys, monkeypatch):
    """Or with --scratch, with random weights that are none of it. The last norm is none of
    either."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(ev, "fit", lambda args, model, *_: seen.append(model.state_dict()))
    saved = torch.load(checkpoint, weights_only=True)["model"]
    for more in ((), ("--scratch",)):
        with pytest.raises(SystemExit):  # nothing was trained, so there is no last.pt to test
            ev.main(["finetune", str(checkpoint), "--data", str(clips()), "--out", "none", *more])
    own, scratch = seen
    blocks = [name for name in own if name.startswith("encoder.")]
    assert blocks and "encoder.norm.weight" not in own
    assert all(torch.equal(own[name], saved[name]) for name in blocks)
    assert not any(torch.equal(scratch[name], saved[name]) for name in blocks)


@pytest.mark.slow
def test_finetune_under_torchrun(checkpoint, clips, tmp_path):
    """Two processes train, and a bad training video's place is taken by another."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    data = clips(9, 3)
    lines = data.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "video": "broken.mp4"})
    data.write_text("\n".join(lines))
    flags = ("--data", data, *SHORT, "--batch-size", 2, "--val-split", "test", "--workers", 1,
             "--out", "tuned", "--accum", 2,
             "--grad-checkpointing", "--sampling", "tsn")  # fmt: skip
    done = torchrun(2, ROOT / "eval.py", "finetune", checkpoint, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 videos = 2 x 2 x 2" in done.stdout and "split test" in done.stdout
    assert (tmp_path / "tuned" / "bad_videos.txt").read_text().startswith("broken.mp4\t")
    log = [json.loads(line) for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("bad", 0) for line in log) >= 1 and all(
        math.isfinite(line.get("loss", 0)) for line in log
    )


@pytest.fixture
def with_text(checkpoint, tmp_path):
    """with_text(clip) -> that checkpoint, as if a predictor had been trained with that CLIP."""

    def make(clip):
        saved = torch.load(checkpoint, weights_only=True)
        saved["model"]["predictor.1.num_batches_tracked"] += 1
        saved["args"] = {
            "clip": clip,
            "clip_pretrained": "openai",
            "mask": "tgm",
            "mask_ratio": 0.5,
        }
        saved["args"]["text_from"] = "clip" if clip.startswith("local-dir:/") else "maps"
        torch.save(saved, tmp_path / "text.pt")
        return tmp_path / "text.pt"

    return make


def test_the_clip_that_a_run_was_trained_with(monkeypatch):
    """Its model and its weights; --clip and --clip-pretrained come before them."""
    monkeypatch.setattr(ev, "load_clip", lambda *which: which)
    trained = {"args": {"clip": "ViT-B-16", "clip_pretrained": "laion", "text_from": "clip"}}
    by_maps = {
        "args": {"clip": "ViT-B-16/laion 012", "clip_pretrained": "openai", "text_from": "maps"}
    }
    for saved, flags, found in (
        (trained, "", ("ViT-B-16", "laion")),
        (trained, "--clip a", ("a", "openai")),
        (trained, "--clip-pretrained x", ("ViT-B-16", "x")),
        (by_maps, "", ("local-dir:data/toy/clip", "openai")),
        (by_maps, "--clip y --clip-pretrained z", ("y", "z")),
        ({}, "", ("local-dir:data/toy/clip", "openai")),
        ({}, "--video x.mp4", ("ViT-B-32-quickgelu", "openai")),
    ):
        args = ev.parse_args(["show", "x.pt", *flags.split(), "--device", "cpu"])
        assert ev.clip_of(args, saved) == (*found, "cpu")


def test_show(world, with_text, clips, tmp_path, capsys, monkeypatch):
    """The checkpoint's own CLIP, mask and ratio; or those that are asked for."""
    monkeypatch.chdir(tmp_path)
    source = with_text(f"local-dir:{world / 'clip'}")
    _, said = run(capsys, "show", source, "--data", clips(), "--number", 2)
    assert "tgm mask 50%" in said and (tmp_path / "show.png").exists()
    _, said = run(capsys, "show", source, "--data", clips(), "--mask", "tube", "--mask-ratio", 0.75)
    assert "tube mask 75%" in said
    video = dataset.read_manifest(clips())[0]["path"]
    caption = "--caption", "a red circle moving left", "--clip", f"local-dir:{world / 'clip'}"
    found, said = run(capsys, "show", source, "--video", video, *caption, "--mask", "tgm")
    assert "a red circle moving left" in said and "tgm mask 50%" in said
    assert [re.split("[: ]", row["shows"])[0] for row in found["rows"][:5]] == [
        "clip",
        "similarity",
        "tube",
        "mgm",
        "tgm",
    ]


@needs_transformers
def test_a_head_without_names(clips, tmp_path, capsys, monkeypatch):
    """Fine-tuned weights that do not name their classes: the manifest's, in order."""
    monkeypatch.chdir(tmp_path)
    model = ev.Classifier(tgmae.Config(**SMALL), 4)
    torch.nn.init.normal_(model.head.weight)
    state = {"config": SMALL, "model": model.state_dict()}
    torch.save(state | {"classes": [f"class {i}" for i in range(4)]}, "named.pt")
    torch.save(state, "bare.pt")
    ev.main(["export", "bare.pt", "--out", "folder"])
    flags = ("--data", clips(8, 8), "--epochs", 0, "--views", "1x1")
    named, bare, folder = (
        run(capsys, "finetune", f, *flags)[0]["rows"] for f in ("named.pt", "bare.pt", "folder")
    )
    assert named[0]["top-1"] == bare[0]["top-1"] == folder[0]["top-1"] > 0
    three = clips(3, 3, name="three.jsonl")
    assert "a head of 4 classes" in fails("finetune", "bare.pt", "--data", three, "--epochs", 0)


def test_show_on_toy(trained, workdir, capsys):
    found, said = run(capsys, "show", trained, "--out", "pictures/toy", "--layers", 1, 4)
    sheet, moving = Image.open("pictures/toy.png"), Image.open("pictures/toy.gif")
    assert len(found["rows"]) == 9 and sheet.width > 400 and sheet.height > 9 * 112
    assert "similarity " in said and "reconstruction" in said and "as predicted" in said
    assert moving.n_frames == 4 and moving.width < 830
    pages = []
    for i in (0, 2):
        moving.seek(i)
        pages.append(np.asarray(moving.convert("RGB")))
    assert (pages[0] != pages[1]).any()


@needs_transformers
def test_show_on_footage(footage, checkpoint, tmp_path, monkeypatch, capsys):
    """A video without caption; another chosen mask; a codec without motion vectors; no decoder."""
    monkeypatch.chdir(tmp_path)
    video = footage / "sports" / "basketball.mp4"
    found, said = run(capsys, "show", checkpoint, "--video", video, "--mask", "mgm", "--start", 1)
    assert "no --caption: no text mask" in said and "mgm mask 75%" in said
    assert len(found["rows"]) == 7
    ev.main(["export", str(checkpoint), "--out", "folder"])
    transformers.VideoMAEModel.from_pretrained("folder").save_pretrained("encoder")
    hevc = next(
        path
        for path in (footage / "odd").iterdir()
        if "hevc" in path.name.lower() or "h265" in path.name.lower()
    )
    with pytest.warns(dataset.NoMotionVectors):
        found, said = run(capsys, "show", "encoder", "--video", hevc)
    assert "has no decoder" in said and len(found["rows"]) == 5
    ev.main(["export", str(checkpoint), "--out", "again"])
    assert len(run(capsys, "show", "again", "--video", video)[0]["rows"]) == 7
    assert "needs --caption" in fails("show", checkpoint, "--video", video, "--mask", "tgm")


def test_heat_map_and_box():
    frames = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    scores = torch.zeros(2, 2, 2)
    scores[1, 0, 1] = 1
    picture = ev.heat_map(scores, frames)
    bright = picture.float().sum(-1)
    assert (
        (bright[2:, :4, 4:] > 300).all() and (bright[:2] < 20).all() and (bright[2:, 4:] < 20).all()
    )
    config = tgmae.Config(**{**TINY, "image_size": 8, "patch_size": 4})
    boxed = ev.mark(frames, 4 + 3, config)  # slice 1, row 1, column 1
    assert (boxed[2:, 4, 4:] == 255).all() and not boxed[:2].any() and not boxed[:, :4].any()
    assert not boxed[2, 5, 5].any()


# ---- features and predictions -------------------------------------------------------------------


def test_features(checkpoint, clips, tmp_path, capsys, monkeypatch):
    """Exactly what `linear` computes, averaged over views; who cannot be read is left out."""
    monkeypatch.chdir(tmp_path)
    gone = {"video": "gone.mp4", "split": "test", "label": "class 1"}
    data = clips(edit=lambda r: gone if r["video"].endswith("66.mp4") else r)
    compute, computed = ev.compute_clips, {}

    def keeps(split, *more):
        return computed.setdefault(split, compute(split, *more))

    monkeypatch.setattr(ev, "compute_clips", keeps)
    flags = "--data", data, "--views", "2x2", "--batch-size", 8
    run(capsys, "linear", checkpoint, *flags, "--epochs", 1)
    expected = computed.pop("test").values.mean(1).numpy()
    _, said = run(capsys, "features", checkpoint, *flags, "--split", "test", "--out", "f.npz")
    with np.load("f.npz", allow_pickle=False) as file:
        found = dict(file)
    assert (found["features"] == expected).all() and found["features"].dtype == np.float32
    assert "gone.mp4: No such file" in said and "test: 4 of 5 clips" in said
    records = [r for r in dataset.read_manifest(data, "test") if r["video"] != "gone.mp4"]
    for key in ("video", "label", "split"):
        assert found[f"{key}s"].tolist() == [record[key] for record in records]
    assert json.loads(str(found["settings"]))["views"] == "2x2"
    run(capsys, "features", checkpoint, "--data", data)  # all splits, beside the checkpoint
    with np.load("features.npz") as file:
        assert set(file["splits"]) == {"train", "test"} and len(file["features"]) == 12


def test_features_of_files_and_folders(checkpoint, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/deep").mkdir(parents=True)
    paths = [record["path"] for record in dataset.read_manifest(world / "manifest.jsonl")[:3]]
    for path, name in zip(paths, ("some/a.mp4", "some/deep/b.mp4", "c.mp4")):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "notes.txt").write_text("no video")
    given = "c.mp4", "some", "notes.txt"
    _, said = run(capsys, "features", checkpoint, *given, "--out", "f.npz")
    assert "failed  notes.txt: " in said and "given: 3 of 4 clips" in said
    with np.load("f.npz") as file:
        assert file["videos"].tolist() == ["c.mp4", "some/a.mp4", "some/deep/b.mp4"]
    (tmp_path / "empty").mkdir()
    for words, reason in (
        (("empty",), "empty: a folder without videos"),
        (("notes.txt",), "none of the 1 given clips can be read: notes.txt: Invalid data"),
        (("c.mp4", "--out", "no/f.npz"), "--out no/f.npz: no such folder no"),
        (("c.mp4", "--views", "0x1"), "--views 0x1: must be like 5x3"),
    ):
        assert reason in fails("features", checkpoint, *words)


@needs_transformers
def test_predict(clips, checkpoint, tmp_path, capsys, monkeypatch):
    """The classes that finetune --epochs 0 counts, by the checkpoint's own views; the exported
    folder, by those of the flags, finds the same probabilities."""
    monkeypatch.chdir(tmp_path)
    model = ev.Classifier(tgmae.Config(**SMALL), 4)
    torch.nn.init.normal_(model.head.weight)
    state = {"config": SMALL, "model": model.state_dict()}
    state["args"] = {"views": "2x1", "stride": 2, "sampling": "dense"}
    state["classes"] = [f"class {i}" for i in range(4)]
    torch.save(state, "tuned.pt")
    data = clips(8, 8)
    records = dataset.read_manifest(data, "test")
    videos, views = [record["path"] for record in records], ("--views", "2x1", "--stride", 2)
    tested, _ = run(capsys, "finetune", "tuned.pt", "--data", data, "--epochs", 0, *views)
    found, said = run(capsys, "predict", "tuned.pt", *videos)
    rows = [found["rows"][i : i + 4] for i in range(0, 32, 4)]  # of each video, the likeliest first
    right = [best[0]["class"] == record["label"] for best, record in zip(rows, records)]
    assert sum(right) / 8 == tested["rows"][0]["top-1"] and "Mean over 2x1 views" in said
    assert all(row["video"] == path for best, path in zip(rows, videos) for row in best)
    assert all(sum(row["probability"] for row in best) == pytest.approx(1) for best in rows)
    ev.main(["export", "tuned.pt", "--out", "folder"])
    again, _ = run(capsys, "predict", "folder", *videos, *views)
    for one, other in zip(found["rows"], again["rows"], strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert "small.pt: pre-trained, not fine-tuned" in fails("predict", checkpoint, videos[0])
    with pytest.raises(SystemExit, match="2"):
        ev.main(["predict", "tuned.pt"])
    assert "the following arguments are required: VIDEO" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_two_processes(checkpoint, clips, tmp_path):
    data = clips(9, 6)
    for processes in (1, 2):
        flags = "--data", data, "--batch-size", 2, "--out", f"{processes}.npz", "--workers", 1
        done = torchrun(processes, ROOT / "eval.py", "features", checkpoint, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert (one["features"] == two["features"]).all()
        assert one["videos"].tolist() == two["videos"].tolist() and len(one["videos"]) == 15


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input(checkpoint, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = clips()
    bare = clips(
        name="bare.jsonl", edit=lambda record: {k: v for k, v in record.items() if k != "label"}
    )
    for command in ("linear", "retrieve", "finetune"):
        split = "'test' " if command == "finetune" else "'train' "
        said = fails(command, checkpoint, "--data", bare)
        assert "bare.jsonl: " in said and f"clips of split {split}have no label, such as" in said
    other = clips(
        name="other.jsonl", edit=lambda r: r | ({"label": "unseen"} if r["split"] == "test" else {})
    )
    for command in ("linear", "retrieve", "finetune"):
        said = fails(command, checkpoint, "--data", other)
        assert "other.jsonl, split 'test': none of its classes is known, such as 'unseen'" in said
    assert "no clips of split 'nowhere'" in fails(
        "linear", checkpoint, "--data", data, "--test-split", "nowhere"
    )
    assert "--views 5: must be like 5x3" in fails(
        "linear", checkpoint, "--data", data, "--views", "5"
    )
    assert "--seed -1: must not be negative" in fails(
        "linear", checkpoint, "--data", data, "--seed", "-1"
    )
    for flag, value in (("randaug", 40), ("crop-scale", 2.0), ("smoothing", 2.0), ("mixup", -1.0)):
        said = fails("finetune", checkpoint, "--data", data, f"--{flag}", value)
        assert f"--{flag} {value}: must lie in 0 to" in said
    assert "--holdout 0.99: leaves 0 of 8" in fails(
        "finetune", checkpoint, "--data", data, "--holdout", "0.99"
    )
    assert "--holdout 0" in fails("linear", checkpoint, "--data", data, "--holdout", "0")
    assert "is not fine-tuned" in fails("finetune", checkpoint, "--data", data, "--epochs", "0")
    assert "fewer than a step takes" in fails(
        "finetune", checkpoint, "--data", data, "--batch-size", "9"
    )
    assert "nowhere: neither a checkpoint nor a folder" in fails(
        "linear", "nowhere", "--data", data
    )
    assert "--number 5: split 'test' has clips 0 to 4" in fails(
        "show", checkpoint, "--data", data, "--number", 5
    )
    silent = clips(name="silent.jsonl", edit=lambda r: {"video": r["video"], "split": r["split"]})
    assert "--layers 3: the encoder has 1 to 2" in fails(
        "show", checkpoint, "--data", silent, "--layers", 3
    )
    assert "no such folder" in fails("linear", checkpoint, "--data", data, "--json", "no/out.json")
    assert "data.jsonl.gone" in fails("linear", checkpoint, "--data", "data.jsonl.gone")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "junk.pt: cannot be loaded" in fails("linear", "junk.pt", "--data", data)
    torch.save({"config": SMALL, "model": {"a": torch.ones(1)}}, "wrong.pt")
    assert "wrong.pt: not the weights of a video MAE" in fails("linear", "wrong.pt", "--data", data)


def test_every_test_clip_fails(checkpoint, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = clips(edit=lambda r: r | ({"video": "gone.mp4"} if r["split"] == "test" else {}))
    assert "none of the 5 test clips can be read: " in (
        said := fails("retrieve", checkpoint, "--data", data)
    )
    assert "gone.mp4: No such file" in said


def test_what_is_said_and_goes_on(checkpoint, clips, tmp_path, monkeypatch, capsys):
    """A class in test that training lacks: a miss. A clip shorter than a view: it repeats frames.
    Both said."""
    monkeypatch.chdir(tmp_path)

    def edit(record):
        return record | ({"label": "unseen"} if record["video"].endswith("66.mp4") else {})

    data = clips(edit=edit)
    found, said = run(
        capsys, "retrieve", checkpoint, "--data", data, "--stride", 8, "--views", "2x1"
    )
    assert "1 clips are of 1 classes that training lacks, such as 'unseen': misses" in said
    assert found["rows"][0]["R@10"] == pytest.approx(
        0.8
    )  # 8 in the gallery: all are found but that one
    assert (
        "5 of the test clips are shorter than a view" in said
        and found["clips"]["test"]["shorter than a view"] == 5
    )
