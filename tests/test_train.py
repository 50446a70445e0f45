"""train.py end to end, in this process where that is enough: masks, losses, flags, faults,
resuming."""

import argparse
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_transformers
from PIL import Image
from test_ranks import torchrun

import dataset
import tgmae
import toy
import train
import weights


def run(*argv, workers=0):
    train.main([*map(str, argv), "--workers", str(workers)])


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def fails(*argv):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


FEW = ("--epochs", 1, "--warmup-epochs", 0.5, "--batch-size", 4, "--preset", "toy", "--stride", 4,
       "--blr", 0.05,
       "--no-flip")  # fmt: skip


@pytest.fixture
def clip_flags(world):
    return "--clip", f"local-dir:{world / 'clip'}"


@pytest.mark.parametrize("mask", tgmae.MASK_RATIOS)
@pytest.mark.parametrize("losses", [(), ("--vt",), ("--vt", "--no-mae")])
def test_every_mask_and_loss(mask, losses, workdir, manifest, clip_flags, capsys):
    """The paper's Table 2, two steps each, with VT watched where it is not optimised."""
    run("--data", manifest(8), "--mask", mask, *losses, *clip_flags, *FEW, "--out", "run")
    lines = log(workdir / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["vt"]) for line in lines) and ("mae" in lines[0]) == (
        "--no-mae" not in losses
    )
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["config"]["text_dim"] == 64
    sheet = Image.open("run/samples.png")
    assert sheet.size[0] > 250 and len(sheet.getcolors(2**24)) > 100
    said = capsys.readouterr().out
    assert (
        f"{mask}, highest" in said
        and "3 negatives" in said
        and ("VT watched" in said) == (not losses)
    )
    assert "CLIP online" in said


@pytest.mark.slow
def test_the_toy_run_learns(fully_trained, monkeypatch, capsys):
    """The main command: both losses fall far; asked again, it says that it is finished."""
    lines = log(fully_trained.parent)
    assert len(lines) == 700

    def mean(name, part):
        return sum(line[name] for line in part) / len(part)

    assert mean("mae", lines[-35:]) <= 0.9  # 1.0: each cube's mean, nothing learnt
    assert mean("vt", lines[-35:]) < 1.6  # log 16 = 2.77: chance
    monkeypatch.chdir(fully_trained.parents[2])
    run("--mask", "tgm", "--vt")
    assert (
        "finished, --no-resume starts over" in capsys.readouterr().out
        and len(log(fully_trained.parent)) == 700
    )


def test_the_other_flags(workdir, manifest, clip_flags, capsys):
    test = dataset.read_manifest("data/toy/manifest.jsonl", "test")[:4]
    data = manifest(
        12, extra=[{**record, "video": record["path"], "split": "held"} for record in test]
    )
    lines = [{"split": "train", **json.loads(line)} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--data", data, "--mask", "tgm", "--vt", *clip_flags, *FEW)
    run(
        *flags,
        "--val-split",
        "held",
        "--accum",
        2,
        "--repeat",
        2,
        "--bottom-k",
        "--mask-ratio",
        0.3,
        "--vt-weight",
        0.5,
        "--temperature",
        0.1,
        "--num-captions",
        1,
        "--grad-checkpointing",
        "--clip-grad",
        0.1,
        "--flip",
        "--min-lr",
        1e-6,
        "--weight-decay",
        0.1,
        "--seed",
        3,
        "--device",
        "cpu",
        "--amp",
        "--split",
        "train",
        "--out",
        "first",
    )
    lines = log(workdir / "first")
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and {"val_mae", "val_vt"} <= lines[
        -1
    ].keys()
    said = capsys.readouterr().out
    assert (
        "lowest 19 of 64" in said
        and "2 negatives" in said
        and "bf16" in said
        and "temperature 0.1" in said
    )
    run(
        *flags,
        "--init",
        "first/last.pt",
        "--out",
        "second",
        "--no-resume",
        "--no-amp",
        "--no-mae",
        "--no-compile",
    )
    run(
        "--data", data, "--mask", "tube", *FEW, "--no-vt", "--out", "third"
    )  # captions, no --clip: no text
    assert "vt" not in log(workdir / "third")[0]


@pytest.mark.slow
def test_compile(workdir, manifest):
    run("--data", manifest(4), "--mask", "tube", *FEW, "--compile", "--out", "compiled")
    run("--data", manifest(4), "--mask", "tube", *FEW, "--out", "plain")
    assert log(workdir / "compiled")[0]["mae"] == pytest.approx(
        log(workdir / "plain")[0]["mae"], abs=1e-4
    )
    assert (
        torch.load("compiled/last.pt")["model"].keys()
        == torch.load("plain/last.pt")["model"].keys()
    )


def test_another_way_to_start_processes(workdir, manifest):
    """Python 3.14 starts loaders by forkserver: nothing that they get may need a fork."""
    start = "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    (workdir / "sitecustomize.py").write_text(start)
    words = [ROOT / "train.py", "--data", manifest(8), *FEW, "--out", "run", "--workers", 2]
    env = os.environ | {"PYTHONPATH": str(workdir)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(log(workdir / "run")) == 2


@needs_transformers
def test_init_from_transformers(workdir, manifest, clip_flags, capsys):
    """At a learning rate of 0 the weights are theirs; of another CLIP's run all but the predictor
    are taken; a run that goes on does not ask for them again."""
    from test_tgmae import hf_config
    from transformers import VideoMAEForPreTraining

    theirs = VideoMAEForPreTraining(hf_config(tgmae.PRESETS["toy"]))
    theirs.save_pretrained("hf")
    still = "--blr", 0, "--min-lr", 0
    flags = ("--data", manifest(4), "--mask", "tube", *FEW)
    run(*flags, *still, "--init", "hf", "--out", "run")
    saved = torch.load("run/last.pt", weights_only=True)["model"]
    assert all(
        torch.equal(saved[k], value)
        for k, value in weights.from_videomae(theirs.state_dict()).items()
    )
    said = fails("--data", manifest(4), *FEW, "--preset", "small", "--init", "hf")
    assert "does not fit --preset small" in said
    small = argparse.Namespace(**vars(tgmae.Config(**vars(tgmae.PRESETS["toy"]) | {"text_dim": 7})))
    other = tgmae.TGMAE(tgmae.Config(**vars(small)))
    torch.save({"config": vars(small), "model": other.state_dict()}, "other.pt")
    run(*flags, "--vt", *clip_flags, *still, "--init", "other.pt", "--out", "second")
    saved = torch.load("second/last.pt", weights_only=True)["model"]
    assert all(
        torch.equal(saved[k], v)
        for k, v in other.state_dict().items()
        if not k.startswith("predictor.")
    )
    assert saved["predictor.3.weight"].shape == (64, 128)
    os.remove("other.pt")
    run(*flags, "--vt", *clip_flags, *still, "--init", "other.pt", "--out", "second")
    assert "finished" in capsys.readouterr().out


def test_a_sample_is_what_the_flags_say(tmp_path, monkeypatch):
    """Frames of the segment, the middle caption, the mask of the motion in the crop; --bottom-k: of
    the lowest."""
    toy.write_video(tmp_path / "v.mp4", toy.make_clip(np.random.default_rng(0), 0)[0])
    record = {
        "video": "v.mp4",
        "captions": ["a", "b", "c"],
        "start": 0.5,
        "end": 1.5,
    }  # frames 6 to 17
    (tmp_path / "v.jsonl").write_text((json.dumps(record) + "\n") * 4)
    c, seen, read, crops = tgmae.PRESETS["toy"], {}, dataset.read_clip, dataset.multi_scale_crop

    def reads(video, numbers, **more):
        seen["numbers"] = numbers
        return read(video, numbers, **more)

    def draws(*size, **more):
        seen["crop"] = crops(*size, **more)
        return seen["crop"]

    monkeypatch.setattr(dataset, "read_clip", reads)
    monkeypatch.setattr(dataset, "multi_scale_crop", draws)
    for sign, more in ((1, ()), (-1, ("--bottom-k",))):
        args = train.parse_args(
            [
                "--data",
                str(tmp_path / "v.jsonl"),
                "--preset",
                "toy",
                "--mask",
                "mgm",
                "--mask-ratio",
                "0.3",
                "--num-captions",
                "1",
                "--stride",
                "2",
                *more,
            ]
        )
        clips = train.Clips(dataset.read_manifest(args.data), c, args, text_from="clip")
        for i in range(4):
            sample = clips[0, i]
            numbers, crop = seen["numbers"], seen["crop"]
            _, motion = read(tmp_path / "v.mp4", numbers, motion=True)
            scores = sign * tgmae.motion_scores(
                dataset.crop_motion(motion, crop, c.grid)[None], c.grid
            ).view(2, 64)
            for row, mask in zip(scores, sample["mask"].view(2, 64)):
                assert mask.sum() == 19 and row[mask].min() >= row[~mask].max()
            assert sample["captions"] == ["b"] and 6 <= numbers[0] and numbers[-1] < 18


@pytest.fixture
def gradients(manifest, clip_flags, tmp_path, monkeypatch):
    """gradients(*flags) -> those of the first step of a run on 8 clips."""

    def make(*flags):
        seen, clip = [], torch.nn.utils.clip_grad_norm_

        def clips(parameters, limit):
            parameters = [p for p in parameters if p.grad is not None]
            seen.append([p.grad.clone() for p in parameters])
            return clip(parameters, limit)

        flags = ("--data", manifest(8), "--mask", "tube", *FEW, *flags, "--no-resume")
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clips)
            run(*flags, "--out", tmp_path / "run", "--no-amp")
        return seen[0]

    return make


def test_accumulation_and_weights(gradients, clip_flags):
    one = gradients("--batch-size", 8)
    two = gradients("--batch-size", 4, "--accum", 2)
    assert len(one) == len(two) > 50
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    vt = ("--batch-size", 8, "--vt", "--no-mae", *clip_flags)
    for a, b in zip(gradients(*vt), gradients(*vt, "--vt-weight", 0.5)):
        torch.testing.assert_close(a / 2, b)


def test_repeats_are_no_negatives(workdir, manifest, clip_flags, monkeypatch):
    """Nor are they in held-out losses."""
    seen, info_nce = [], tgmae.info_nce
    monkeypatch.setattr(
        tgmae,
        "info_nce",
        lambda *a, groups: seen.append(groups.tolist()) or info_nce(*a, groups=groups),
    )
    flags = ("--vt", "--repeat", 2, "--batch-size", 8, *clip_flags)
    run("--data", manifest(8), *FEW, *flags, "--val-split", "train", "--out", "run")
    *steps, first, second = seen
    for groups in steps:
        assert groups[::2] == groups[1::2] and len(set(groups)) == 4
    assert (first, second) == ([0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7])


def test_a_watching_predictor_is_clipped_by_itself():
    args, model = argparse.Namespace(), tgmae.TGMAE(tgmae.PRESETS["toy"])
    for args.vt in (True, False):
        parts = train.clip_together(model, args)
        assert {id(p) for part in parts for p in part} == {id(p) for p in model.parameters()}
        assert sum(map(len, parts)) == len(list(model.parameters()))
        assert len(parts[1]) == (0 if args.vt else len(list(model.predictor.parameters())))


def test_optimizer_and_schedule(workdir, manifest):
    """VideoMAE's AdamW; warm-up in a line from 0, then a cosine; rates times clips / 256."""
    model = tgmae.TGMAE(tgmae.PRESETS["toy"])
    optimizer = train.make_optimizer(model, argparse.Namespace(weight_decay=0.05))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decay.keys() == set(names.values()) and optimizer.defaults["betas"] == (0.9, 0.95)
    bare = {name for name, p in model.named_parameters() if p.ndim == 1} | {"mask_token"}
    assert {name for name, value in decay.items() if value == 0} == bare and set(
        decay.values()
    ) == {0, 0.05}
    rates_of = "--epochs", 2, "--warmup-epochs", 1, "--min-lr", 0.01
    run("--data", manifest(16), "--mask", "tube", *FEW, *rates_of, "--out", "run")
    rates, peak, last = (
        [line["lr"] for line in log(workdir / "run")],
        0.05 * 4 / 256,
        0.01 * 4 / 256,
    )
    cosine = [last + (peak - last) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates == pytest.approx([0, peak / 3, 2 * peak / 3, peak, *cosine])


def test_resume_is_exact(workdir, manifest, clip_flags, monkeypatch):
    """Stopped after its second checkpoint and run again: the same weights and log as
    undisturbed."""
    flags = ("--data", manifest(8), "--mask", "tgm", "--vt", *clip_flags, *FEW, "--epochs", 3)
    run(*flags, "--out", "whole")
    save = train.save_checkpoint

    def stop_after(path, **state):
        save(path, **state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", "cut")
    with open("cut/log.jsonl", "a") as file:  # steps that no checkpoint holds, and half a line
        file.write('{"step": 5, "mae": 7}\n{"step": 6, "m')
    monkeypatch.setattr(train, "save_checkpoint", save)
    run(*flags, "--out", "cut", workers=2)
    whole, cut = (torch.load(f"{name}/last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
    keys = ("step", "epoch", "mae", "vt", "lr", "grad_norm")
    assert [[line[k] for k in keys] for line in log(workdir / "whole")] == [
        [line[k] for k in keys] for line in log(workdir / "cut")
    ]


@pytest.mark.slow
def test_processes_share_the_batch(workdir, manifest, clip_flags):
    """train.py itself on 1 process with 6 clips and on 3 with 2: the same losses."""
    flags = (
        "--data", manifest(12), "--mask", "tgm", "--vt", *clip_flags, *FEW, "--workers", 0,
        "--epochs", 2,
    )  # fmt: skip
    for processes, batch in ((1, 6), (3, 2)):
        done = torchrun(
            processes,
            ROOT / "train.py",
            *flags,
            "--batch-size",
            batch,
            "--no-amp",
            "--out",
            f"run{processes}",
            cwd=workdir,
        )
        assert done.returncode == 0, done.stderr
    one, three = log(workdir / "run1"), log(workdir / "run3")
    assert len(one) == len(three) == 4
    for a, b in zip(one, three):
        assert a["mae"] == pytest.approx(b["mae"], abs=2e-4) and a["vt"] == pytest.approx(
            b["vt"], abs=2e-3
        )


def test_repeats_share_their_frames(workdir, manifest, monkeypatch):
    """One decode; a crop, a mask and a caption each."""
    read, calls = dataset.read_clip, []
    monkeypatch.setattr(dataset, "read_clip", lambda *a, **k: calls.append(a) or read(*a, **k))
    for mask in ("tube", "mgm"):
        args = train.parse_args(
            ["--data", str(manifest(4)), "--mask", mask, *map(str, FEW), "--repeat", "4"]
        )
        clips = train.Clips(
            dataset.read_manifest(args.data), tgmae.PRESETS["toy"], args, text_from="clip"
        )
        calls.clear()
        sample = clips[0, 1]
        assert (
            len(calls) == 1
            and sample["video"].shape == (4, 3, 4, 64, 64)
            and len(sample["captions"]) == 4
        )
        assert len({video.numpy().tobytes() for video in sample["video"]}) > 1
        assert len({row.numpy().tobytes() for row in sample["mask"]}) > 1
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "multi_scale_crop", lambda size, **_: dataset.Crop(0, 0, *size))
            videos = clips[0, 1]["video"]
            assert all(torch.equal(video, videos[0]) for video in videos)


def test_loader_processes_last_for_the_run(tmp_path):
    """The same samples as a loader made anew each epoch, from any step on; the processes do not
    change."""

    class Who(train.TrainingClips):
        def load(self, place, seed):
            return {"place": place, "seed": seed, "pid": os.getpid()}

    args = argparse.Namespace(seed=3, epochs=3, workers=2, device="cpu")
    data = Who([{"video": str(i)} for i in range(11)], seed=3)
    share = train.share_step(2, 2)

    def as_dict(samples):
        return {"of": samples}

    def batches(start):
        for _, step in train.steps(data, share, args, start, as_dict, (2, 2)):
            yield from (batch["of"] for batch in step)

    whole = list(batches(0))
    assert (
        len(whole) == 3 * 2 * 2 and len({sample["pid"] for batch in whole for sample in batch}) == 2
    )
    seen = [[(sample["place"], sample["seed"]) for sample in batch] for batch in whole]
    for epoch in range(3):  # 8 of the 11, none twice
        assert len({place for batch in seen[4 * epoch : 4 * epoch + 4] for place, _ in batch}) == 8
    assert seen[0] != seen[4] and len({seed for batch in seen for _, seed in batch}) == 24
    for step in (1, 2, 3, 5):
        rest = list(batches(step))
        assert [[(s["place"], s["seed"]) for s in batch] for batch in rest] == seen[2 * step :]


def test_maps_replace_clip(workdir, world, manifest, clip_flags, monkeypatch, capsys):
    """With text maps no CLIP is loaded; the masks and texts are those of the maps; a wrong map
    stops the run."""
    import captions

    data = manifest(10, extra=[{"video": "gone.mp4", "captions": ["a"]}])
    small = "--image-size", "64", "--patch-size", "8", "--every", "4"
    captions.main(["maps", str(data), *clip_flags, *small])
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    assert "failed" in lines[-1]
    monkeypatch.setattr(tgmae, "load_clip", None)
    for flags in (
        ("--mask", "tgm", "--vt"), ("--mask", "tgm", "--repeat", 2, "--num-captions", 1),
        ("--mask", "tube", "--vt"),
    ):  # fmt: skip
        out = "run" + "".join(map(str, flags))
        run("--data", data, *flags, *FEW, "--out", out, workers=1)
        (step, *_), saved = log(workdir / out), torch.load(f"{out}/last.pt", weights_only=True)
        assert saved["config"]["text_dim"] == 64 and 0 < step["vt"] < 9
        said = capsys.readouterr().out
        assert "1 clips marked" in said and "gone.mp4" in said
        assert "text maps (local-dir:clip " in said

    # One sample: its text and its mask are those of the map, the caption and the frames that were
    # drawn.
    asked, map_scores = [], dataset.map_scores
    monkeypatch.setattr(
        dataset, "map_scores", lambda *args: asked.append(args) or map_scores(*args)
    )
    args = train.parse_args(["--data", str(data), "--mask", "tgm", *map(str, FEW)])
    records, _, text = train.load_data(args)
    assert text == "maps" and len(records) == 10
    sample = train.Clips(records, tgmae.PRESETS["toy"], args, text_from=text)[0, 3]
    made = dataset.read_map(records[3]["map_path"], records[3]["captions"])
    which = records[3]["captions"].index(sample["captions"][0])
    assert torch.equal(sample["text"][0], made.text[which])
    (_, caption, (first, second), crop, size, grid) = asked[0]
    assert caption == which and second - first == 8 and size == (64, 64)
    scores = map_scores(made, which, [first, second], crop, size, grid).flatten(1)
    for slice_, mask in zip(scores, sample["mask"].view(2, 64)):
        assert mask.sum() == 38 and slice_[mask].min() >= slice_[~mask].max()

    def stops(reason, change, *flags):
        bad = [change(dict(line)) if i == 1 else line for i, line in enumerate(lines)]
        (workdir / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
        said = fails(
            "--data", "bad.jsonl", "--mask", "tgm", *FEW, *flags, "--out", "bad", "--no-resume"
        )
        assert reason in said, said

    # Tube masking asks for no text: neither maps nor failures matter to it.
    run("--data", data, "--mask", "tube", *FEW, "--out", "plain")
    assert "vt" not in log(workdir / "plain")[0] and "11 videos" in capsys.readouterr().out

    stops("a text map of other captions", lambda line: line | {"captions": ["a blue star"]})
    stops("has no text map, others have", lambda line: line.pop("maps") and line)
    stops("has no text map at nowhere.npz", lambda line: line | {"maps": "nowhere.npz"})
    stops(
        "--clip: ViT-B-32/openai is not the CLIP of the text maps, local-dir:clip",
        dict,
        "--clip",
        "ViT-B-32",
    )
    half = workdir / "half.npz"
    half.write_bytes((workdir / lines[1]["maps"]).read_bytes()[:900])
    stops("half.npz: not a whole text map", lambda line: line | {"maps": "half.npz"})


def test_bad_videos_are_replaced_and_listed(workdir, manifest, clip_flags, capsys):
    (workdir / "broken.mp4").write_bytes(b"x" * 1000)
    data = manifest(
        5,
        extra=[
            {"video": "broken.mp4", "captions": ["a"]},
            {"video": "gone.mp4", "captions": ["a"]},
            {"video": "short.mp4", "captions": ["a"]},
        ],
    )
    frames = toy.make_clip(np.random.default_rng(0), 0)[0][:3]
    toy.write_video(
        workdir / "short.mp4", frames
    )  # 3 frames for a clip of 4x4: repeats its last, not bad
    flags = ("--data", data, "--mask", "tgm", *clip_flags, *FEW, "--epochs", 2)
    run(*flags, "--out", "run")
    listed = (workdir / "run/bad_videos.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["broken.mp4", "gone.mp4"]
    assert "gone.mp4: No such file" in "".join(listed)
    assert sum(line["bad"] for line in log(workdir / "run")) == 4  # two an epoch
    assert "4 times a video could not be read" in capsys.readouterr().out
    run(*flags, "--out", "again", workers=2)  # whichever process loads them
    assert [line["mae"] for line in log(workdir / "again")] == [
        line["mae"] for line in log(workdir / "run")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_only_bad_videos_stop_the_run(workdir, workers):
    for name in ("a", "b", "c", "d"):
        (workdir / f"{name}.mp4").touch()
    (workdir / "bad.jsonl").write_text("".join(f'{{"video": "{n}.mp4"}}\n' for n in "abcd"))
    with pytest.raises(
        SystemExit, match=r"4 video\(s\) in a row cannot be read, the last: .*[abcd].mp4"
    ):
        run("--data", "bad.jsonl", "--mask", "tube", *FEW, workers=workers)


def test_motion_fallback_is_counted(workdir, capsys):
    for i in range(4):
        toy.write_video(
            workdir / f"{i}.mkv", toy.make_clip(np.random.default_rng(i), i)[0], options={"g": "1"}
        )
    (workdir / "intra.jsonl").write_text("".join(f'{{"video": "{i}.mkv"}}\n' for i in range(4)))
    run("--data", "intra.jsonl", "--mask", "mgm", *FEW, "--out", "run")
    assert (
        log(workdir / "run")[0]["no_motion"] == 4
        and "4 times a video had no motion vectors" in capsys.readouterr().out
    )


def test_mistakes_are_one_line(workdir, manifest, clip_flags):
    data = manifest(8)
    bare = workdir / "bare.jsonl"
    bare.write_text('{"video": "clip.mp4"}\n')
    marked = {"video": "a.mp4", "captions": ["a"], "split": "held", "failed": "why"}
    held = manifest(8, extra=[marked], name="held.jsonl")
    for flags, reason in (
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--data", bare, "--mask", "tgm"), "bare.jsonl: clip.mp4 has no captions"),
        (("--data", data, "--split", "dev", "--mask-ratio", 0), "--mask-ratio 0.0"),
        (("--data", data, "--mask-ratio", 1), "--mask-ratio 1.0"),
        (("--data", data, "--mask-ratio", 0.001, *FEW), "mask_ratio=0.001 masks 0 of 64"),
        (("--data", data, "--no-mae"), "--no-mae without --vt"),
        (("--data", data, "--batch-size", 3, "--repeat", 2),
         "--batch-size 3 is not divisible by --repeat 2"),
        (("--data", data, *FEW, "--batch-size", 16),
         "8 clips of split 'train' are fewer than a step takes"),
        (("--data", data, *FEW, "--batch-size", 1, "--vt", *clip_flags),
         "--vt with a global batch of 1"),
        (("--data", held, *FEW, *clip_flags, "--val-split", "held"),
         'a.mp4 is marked "failed"'),
        (("--data", data, "--warmup-epochs", 999), "--warmup-epochs 999"),
        (("--data", data, "--epochs", 0), "--epochs 0: must be positive"),
        (("--data", data, "--num-captions", -1), "--num-captions -1: must not be negative"),
        (("--data", data, "--clip-grad", -1), "--clip-grad -1.0: must not be negative"),
        (("--data", data, "--seed", -1), "--seed -1: must not be negative"),
        (("--data", data, *FEW, "--batch-size", 1, *clip_flags),
         "VT, which is watched, with a global batch of 1"),
        (("--data", bare, *clip_flags),
         "bare.jsonl: clip.mp4 has no captions, which --mask tgm, --vt and --clip need"),
        (("--data", data, *FEW, "--init", "nothing.pt"), "nothing.pt"),
        (("--data", data, *FEW, "--mask", "tgm", "--clip", "local-dir:nowhere"),
         "--clip local-dir:nowhere"),
    ):  # fmt: skip
        assert reason in fails(*flags), flags
    for device, there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        assert there or f"train.py: --device {device}: " in fails(
            "--data", data, "--device", device
        )


def test_another_run_is_not_overwritten(workdir, manifest, clip_flags):
    flags = ("--data", manifest(4), *FEW, "--out", "run")
    run(*flags, "--mask", "tube")
    before = (workdir / "run/last.pt").read_bytes(), (workdir / "run/log.jsonl").read_bytes()
    assert "mask tube -> mgm" in fails(*flags, "--mask", "mgm")
    assert "clip ViT-B-32-quickgelu -> local-dir" in fails(*flags, "--mask", "tube", *clip_flags)
    assert "weight_decay 0.05 -> 0.1" in fails(*flags, "--mask", "tube", "--weight-decay", 0.1)
    assert "embed_dim 128 -> 384" in fails(*flags, "--mask", "tube", "--preset", "small")
    assert before == (
        (workdir / "run/last.pt").read_bytes(),
        (workdir / "run/log.jsonl").read_bytes(),
    )
    (workdir / "run/last.pt").write_bytes(b"half a checkpoint")
    assert "run/last.pt" in fails(*flags, "--mask", "tube")
    run(*flags, "--mask", "mgm", "--no-resume")


def test_no_hub_is_told_at_once(workdir, manifest, monkeypatch):
    """Without weights on disk or a hub: seconds, and the ways out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(workdir))
    said = fails("--data", manifest(4), *FEW, "--mask", "tgm")
    assert (
        "the hub cannot be reached" in said
        and "--clip-pretrained FILE" in said
        and "local-dir:" in said
        and "maps" in said
    )


def test_bad_numbers_skip_the_step(workdir, manifest, monkeypatch):
    take = train.prepare

    def poisoned(batch, *args):
        video, mask, text = take(batch, *args)
        return (video * math.nan if 3 in batch["groups"] else video), mask, text

    monkeypatch.setattr(train, "prepare", poisoned)
    run("--data", manifest(8), "--mask", "tube", *FEW, "--batch-size", 1, "--out", "run")
    lines = log(workdir / "run")
    assert sum("skipped" in line for line in lines) == 1
    assert all(torch.isfinite(v).all() for v in torch.load("run/last.pt")["model"].values())


@pytest.mark.slow
def test_real_footage(workdir, footage):
    """The road of a user's own videos: index, label captions, text maps, each masker; the CLIP has
    OpenAI's architecture and random weights in a file. Coarse maps, since this is a slow machine's
    test."""
    import open_clip

    import captions

    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), "clip.pt")
    captions.main(["index", str(footage / "asl"), "--out", "asl.jsonl"])
    captions.main(["caption", "asl.jsonl", "--source", "label"])
    small = "--epochs", 1, "--warmup-epochs", 0, "--preset", "toy", "--batch-size", 5
    for mask in ("tube", "mgm"):
        run("--data", "asl.jsonl", *small, "--mask", mask, "--out", mask)
        lines = log(workdir / mask)
        assert len(lines) == 4 and not any(line["bad"] or line["no_motion"] for line in lines)
    two = (workdir / "asl.jsonl").read_text().splitlines()[:2]
    (workdir / "two.jsonl").write_text("\n".join(two))
    weights = "--clip-pretrained", "clip.pt"
    run(
        "--data",
        "two.jsonl",
        *small,
        "--batch-size",
        2,
        "--mask",
        "tgm",
        "--vt",
        *weights,
        "--out",
        "online",
    )
    captions.main(["maps", "asl.jsonl", *weights, "--image-size", "32", "--every", "64"])
    run("--data", "asl.jsonl", *small, "--mask", "tgm", "--vt", "--out", "maps")
    for out, steps in (("online", 1), ("maps", 4)):
        assert (
            torch.load(f"{out}/last.pt")["config"]["text_dim"] == 512
            and len(log(workdir / out)) == steps
        )
