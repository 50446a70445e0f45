"""train.py end to end, in this process where that is enough: masks, losses, flags, faults,
resuming."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, argv, assert_equal, assert_same_run, log, needs_transformers, write_lines
from PIL import Image
from test_ranks import torchrun

import captions
import dataset
import eval as ev
import pictures
import runs
import tgmae
import toy
import train
import weights

LOAD_CLIP = tgmae.load_clip  # of which tests take the place


def run(*flags, workers=0):
    train.main(argv(*flags, "--workers", workers))


def fails(*flags):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


def args_of(*flags):
    return train.parse_args(argv(*flags))


def load(folder):
    return torch.load(f"{folder}/last.pt", map_location="cpu", weights_only=True)


FEW = "--epochs 1 --warmup-epochs 0.5 --batch-size 4 --preset toy --stride 4 --blr 0.05 --no-flip"


@pytest.fixture
def clip_flags(world):
    return f"--clip local-dir:{world / 'clip'}"


@pytest.mark.parametrize("mask", tgmae.MASK_RATIOS)
@pytest.mark.parametrize("losses", ["", "--vt", "--vt --no-mae", "--no-mae"])
def test_every_mask_and_loss(mask, losses, workdir, manifest, clip_flags, capsys):
    """The paper's Table 2, two steps each, with VT watched where it is not optimised; and the
    predictor alone."""
    run("--data", manifest(8), "--mask", mask, losses, clip_flags, FEW, "--out run")
    lines = log("run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["vt"]) for line in lines)
    assert ("mae" in lines[0]) == ("--no-mae" not in losses)
    assert load("run")["step"] == 2 and load("run")["config"]["text_dim"] == 64
    sheet = Image.open("run/samples.png")
    assert sheet.size[0] > 250 and len(sheet.getcolors(2**24)) > 100
    said = capsys.readouterr().out
    assert f"{mask}, highest" in said and "3 negatives" in said and "CLIP online" in said
    assert "; 24 distinct captions\n" in said and "by chance VT is 1.39" in said
    assert ("VT watched" in said) == (not losses)
    assert ("of the predictor alone" in said) == (losses == "--no-mae")
    then = load("run")
    torch.manual_seed(0)
    begun = tgmae.TGMAE(tgmae.Config(**then["config"])).state_dict()
    names = [name for name in begun if not torch.equal(begun[name], then["model"][name])]
    decoder = {"decoder"} if "--no-mae" not in losses else set()
    encoder = {"encoder", "encoder.norm"} if losses != "--no-mae" else set()
    assert {weights.part_of(name) for name in names} == decoder | encoder | {"predictor"}


@pytest.mark.slow
def test_the_toy_run_learns(fully_trained, monkeypatch, capsys):
    """The main command: both losses fall far; asked again, it says that it is finished."""
    lines = log(fully_trained.parent)
    assert len(lines) == 700
    mae, vt = np.mean([(line["mae"], line["vt"]) for line in lines[-35:]], axis=0)
    assert mae <= 0.9  # 1.0: each cube's mean, nothing learnt
    assert vt < 1.6  # log 16 = 2.77: chance
    monkeypatch.chdir(fully_trained.parents[2])
    run("--mask tgm --vt")
    assert "finished, --no-resume starts over" in capsys.readouterr().out
    assert log(fully_trained.parent) == lines


def test_the_other_flags(workdir, manifest, clip_flags, capsys):
    flags = f"--data {manifest(12, held=4)} --mask tgm --vt {clip_flags} {FEW}"
    run(
        f"{flags} --val-split held --accum 2 --repeat 2 --bottom-k --mask-ratio 0.3",
        "--vt-weight 0.5 --temperature 0.1 --num-captions 1 --grad-checkpointing --clip-grad 0.1",
        "--flip --min-lr 1e-6 --weight-decay 0.1 --seed 3 --device cpu --amp --split train",
        "--out first",
    )
    lines, said = log("first"), capsys.readouterr().out
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert {"val_mae", "val_vt"} <= lines[-1].keys()
    # The middle one of each clip's captions, of which some say the same.
    used = [dataset.read_manifest("some.jsonl", "train")[i]["captions"][1] for i in range(12)]
    distinct = f"{len(set(used))} distinct captions"
    for part in ("lowest 19 of 64", "2 negatives", "bf16", "temperature 0.1", distinct):
        assert part in said
    run(flags, "--init first/last.pt --out second --no-resume --no-amp --no-mae --no-compile")
    # Captions, and no --clip: no text.
    run("--data", manifest(12), "--mask tube --no-vt --out third", FEW)
    assert "vt" not in log("third")[0]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "toy toy 14 1.0 16 local-dir:data/toy/clip runs/toy-tube"),
        ("--data toy --epochs 4", "toy toy 4 0.8 16 local-dir:data/toy/clip runs/toy-tube"),
        ("--data small", "toy toy 14 1.0 16 local-dir:small/clip runs/small-tube"),
        ("--data small/manifest.jsonl",
         "paper base 200 40.0 64 ViT-B-32-quickgelu runs/small-tube"),
        ("--data some.jsonl --vt", "paper base 200 40.0 64 ViT-B-32-quickgelu runs/some-tube-vt"),
        ("--data some.jsonl --recipe toy",
         "toy toy 14 1.0 16 local-dir:data/toy/clip runs/some-tube"),
        ("--data some.jsonl --recipe few --preset small --batch-size 3 --repeat 1 --epochs 10",
         "few small 10 None 3 ViT-B-32-quickgelu runs/some-tube"),
        ("--data small --recipe few --no-mae --vt",
         "few toy None None 16 local-dir:small/clip runs/small-tube-no-mae-vt"),
        ("--data some.jsonl --epochs 30 --warmup-epochs 3",
         "paper base 30 3.0 64 ViT-B-32-quickgelu runs/some-tube"),
        ("--data some.jsonl --epochs 800",
         "paper base 800 40.0 64 ViT-B-32-quickgelu runs/some-tube"),  # Tables 7 and 8
    ],
)  # fmt: skip
def test_recipes(flags, expected, workdir, world):
    Path("small").symlink_to(world)
    args = args_of(flags)
    names = "recipe preset epochs warmup_epochs batch_size clip out"
    assert " ".join(str(getattr(args, name)) for name in names.split()) == expected


def test_a_run_under_its_old_name_is_found(workdir, world, manifest):
    """Of a world's manifest, which was called "manifest"; that of another world is not."""
    Path("small").symlink_to(world)
    flags = "--data small/manifest.jsonl --split test"
    run(flags, FEW, "--out runs/manifest-tube")
    assert args_of(flags).out == "runs/manifest-tube"
    assert args_of("--data data/toy/manifest.jsonl").out == "runs/manifest-tube"  # the same file
    other = Path("other")
    other.mkdir()
    for name in ("world.json", "manifest.jsonl"):
        (other / name).write_bytes((world / name).read_bytes())
    assert args_of("--data other/manifest.jsonl").out == "runs/other-tube"


def test_few_videos(workdir, manifest, clip_flags, capsys, monkeypatch):
    """A step of no more videos than there are, steps enough; both stay when the run goes on."""
    monkeypatch.setattr(train, "FEW_STEPS", 5)
    data, flags = manifest(3), "--recipe few --mask tube --workers 0 --out run --data"
    run(flags, data)
    saved, said = load("run"), capsys.readouterr().out
    assert "mirrored" not in said  # nothing reads the captions
    assert "--batch-size 12, not 16: there are 3 videos" in said
    assert "batch   12 clips = 1 x 12 x 1, 4 of each video\n" in said
    assert "5 steps are too few to learn from; 150 at least" in said
    assert (saved["step"], saved["videos"], len(log("run"))) == (5, 3, 5)
    names = "recipe epochs warmup_epochs batch_size repeat flip"
    assert [saved["args"][name] for name in names.split()] == ["few", 5, 0.25, 12, 4, True]
    run(flags, data)
    assert "finished" in capsys.readouterr().out and load("run")["step"] == 5
    assert "recipe few -> paper" in fails(flags, data, "--recipe paper")
    assert "epochs 5 -> 3" in fails(flags, data, "--epochs 3")
    run(
        "--data", manifest(11, name="more.jsonl"), "--recipe few --workers 0 --out more", clip_flags
    )
    assert "half the clips are mirrored, and texts say 'a " in capsys.readouterr().out
    assert (load("more")["args"]["epochs"], load("more")["step"]) == (3, 6)  # of 2 steps of 4


def test_the_papers_recipe_for_few_videos(workdir, manifest, capsys):
    data = manifest(8)
    assert "--recipe few has settings for few videos" in fails("--data", data)
    run("--data", data, FEW, "--out run")
    assert "8 videos are few for the paper's settings; --recipe few has" in capsys.readouterr().out


def test_losses_are_drawn(workdir, manifest):
    """What the log holds, with gaps where it has null."""
    run("--data", manifest(8, held=4), FEW, "--mask tube --val-split held --epochs 2 --out run")
    assert Image.open("run/losses.png").size[0] > 400
    lines = log("run")
    lines[0]["mae"] = None
    left, right = pictures.draw_losses(lines).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in [*left.lines, *right.lines]}
    assert drawn.keys() == {"mae", "val_mae", "lr"}
    for key, points in drawn.items():
        assert points == [[x["step"], x[key]] for x in lines if x.get(key) is not None]
    assert len(drawn["mae"]) == 3 and len(drawn["val_mae"]) == 2
    lines = [{"step": i + 1, "mae": float(i % 2)} for i in range(100)]  # a mean of two steps
    pale, mean = pictures.draw_losses(lines).axes[0].lines
    assert len(pale.get_ydata()) == 100 and mean.get_ydata().tolist() == [0.5] * 99
    assert mean.get_xdata().tolist() == [*range(2, 101)]


def test_another_way_to_start_processes(workdir, manifest):
    """Python 3.14 starts loaders by forkserver: nothing that they get may need a fork."""
    start = "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    (workdir / "sitecustomize.py").write_text(start)
    flags = argv(ROOT / "train.py", "--data", manifest(8), FEW, "--out run --workers 2")
    path = os.pathsep.join([str(workdir), os.environ.get("PYTHONPATH", "")])
    env, command = os.environ | {"PYTHONPATH": path}, [sys.executable, *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(log("run")) == 2


@needs_transformers
def test_init_from_transformers(workdir, manifest, clip_flags, capsys):
    """At a learning rate of 0 the weights are theirs; of another CLIP's run all but the predictor
    are taken; a run that goes on does not ask for them again."""
    from test_tgmae import hf_config
    from transformers import VideoMAEForPreTraining

    theirs = VideoMAEForPreTraining(hf_config(tgmae.PRESETS["toy"], layer_norm_eps=1e-12))
    theirs.save_pretrained("hf")
    flags = f"--data {manifest(4)} {FEW} --blr 0 --min-lr 0 --mask tube"
    for _ in range(2):  # the second goes on
        run(flags, "--init hf --out run")
    said = capsys.readouterr().out
    assert "init    hf: decoder, encoder, encoder.norm; begin anew: predictor\n" in said
    assert "layer_norm_eps 1e-12, as there" in said and "finished" in said
    assert load("run")["config"]["layer_norm_eps"] == 1e-12
    expected = weights.from_videomae(theirs.state_dict())
    assert_equal({name: load("run")["model"][name] for name in expected}, expected)
    assert "does not fit --preset small" in fails(flags, "--preset small --init hf --out x")
    config = tgmae.Config(**vars(tgmae.PRESETS["toy"]) | {"text_dim": 7})
    other = tgmae.TGMAE(config).state_dict()
    amid = {"optimizer": {}, "epoch": 2, "args": {"epochs": 9}}
    torch.save({"config": vars(config), "model": other} | amid, "other.pt")
    run(flags, "--vt", clip_flags, "--init other.pt --out second")
    saved = load("second")["model"]
    assert saved["predictor.3.weight"].shape == (64, 128)
    assert "other.pt: 2 of 9 epochs, of a run that has not ended" in capsys.readouterr().out
    without = [{k: v for k, v in s.items() if k[:9] != "predictor"} for s in (saved, other)]
    assert_equal(*without)
    os.remove("other.pt")
    run(flags, "--vt", clip_flags, "--init other.pt --out second")
    assert "finished" in capsys.readouterr().out


def built(*flags):
    """-> the model that a run with these flags and no text begins with."""
    return train.build_model(args_of("--data x --preset toy --device cpu", *flags), None, None)[0]


@pytest.mark.parametrize("change, why", [
    ({"depth": 5}, "depth 5, not 4"),
    ({"depth": 3, "num_heads": 2}, "depth 3, not 4, num_heads 2, not 4"),
    ({"embed_dim": 64}, "embed_dim 64, not 128"),
    ({"mlp_ratio": 2.0}, "mlp_ratio 2.0, not 4.0"),
    ({"patch_size": 16}, "patch_size 16, not 8"),
    ({"tubelet_size": 1}, "tubelet_size 1, not 2"),
    ({"decoder_depth": 3}, "decoder_depth 3, not 2"),
    ({"decoder_num_heads": 6}, "decoder_num_heads 6, not 3"),
    ({"num_frames": 8, "image_size": 32, "temperature": 1.0}, None),
])  # fmt: skip
def test_init_of_other_sizes(change, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(tgmae.PRESETS["toy"], **change)
    state = tgmae.TGMAE(config).state_dict()
    torch.save({"config": asdict(config), "model": state}, "other.pt")
    if why:
        with pytest.raises(ValueError, match=f"--init other.pt: does not fit --preset toy: {why}$"):
            built("--init other.pt")
    else:
        assert_equal(dict(built("--init other.pt").state_dict()), dict(state))
    for name in [name for name in state if weights.part_of(name) == "decoder"]:
        del state[name]  # no decoder, so its sizes do not matter
    torch.save({"config": asdict(config), "model": state}, "other.pt")
    if why and not why.startswith("decoder"):
        with pytest.raises(ValueError, match=why):
            built("--init other.pt")
    else:
        own = built("--init other.pt").state_dict()
        assert_equal({name: own[name] for name in state}, dict(state))


def test_init_with_a_decoder_of_other_targets(tmp_path, monkeypatch, capsys):
    """It is refused where a decoder is trained; the encoder is taken where none is."""
    monkeypatch.chdir(tmp_path)
    config = tgmae.PRESETS["toy"]
    state = tgmae.TGMAE(config).state_dict()
    for value in state.values():
        value.add_(1)
    torch.save({"config": asdict(config) | {"norm_pix_loss": False}, "model": state}, "other.pt")
    with pytest.raises(ValueError, match="--init other.pt: its decoder's targets are not normal"):
        built("--init other.pt")
    own, bare = built("--init other.pt --vt --no-mae").state_dict(), built("--vt").state_dict()
    for name, value in own.items():
        assert_equal(value, (bare if weights.part_of(name) == "decoder" else state)[name])
    assert "begin anew: decoder" in capsys.readouterr().out


@needs_transformers
def test_init_with_an_encoder(tmp_path, monkeypatch, capsys):
    """What finetune leaves, in every form that export and others make of it, and transformers'
    encoder alone: the encoder is taken, the rest is as without --init, and a line says so."""
    import transformers
    from test_tgmae import official

    monkeypatch.chdir(tmp_path)
    toy = tgmae.PRESETS["toy"]
    model = ev.Classifier(toy, 5)
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    torch.save({"config": asdict(toy), "model": model.state_dict()}, "best.pt")
    ev.main("export best.pt --out folder".split())
    transformers.VideoMAEModel.from_pretrained("folder").save_pretrained("encoder")
    state = {name.removeprefix("encoder."): value for name, value in official(model).items()}
    torch.save({"module": state, "args": {"num_frames": 4, "input_size": 64}}, "official.pth")
    bare = built().state_dict()
    capsys.readouterr()
    for source in ("best.pt", "folder", "folder/model.pt", "encoder", "official.pth"):
        own, said = built("--init", source).state_dict(), capsys.readouterr().out
        for name, value in own.items():
            there = name.startswith("encoder.") and "encoder.norm" not in name
            assert_equal(value, (model.state_dict() if there else bare)[name])
        line = f"init    {source}: encoder; begin anew: decoder, encoder.norm, predictor"
        line += "" if source == "encoder" else "; left out: fc_norm, head"
        assert said.splitlines()[0] == line and "assumed" not in said
    (tmp_path / "folder/config.json").write_text(
        (tmp_path / "folder/config.json").read_text().replace('"num_frames": 4,', "")
    )
    torch.save({"module": state}, "official.pth")
    for source, sizes in (
        ("folder", "num_frames=16"), ("official.pth", "num_frames=16, image_size=224"),
    ):  # fmt: skip
        note = f"note    {source} does not say the size of its clips: {sizes} assumed"
        built("--init", source)
        assert note in capsys.readouterr().out
        ev.load_model(source)
        assert note in capsys.readouterr().out


def test_other_sizes(workdir, manifest, clip_flags, capsys):
    """Frames and size by flag, from weights of another clip size: positions are computed."""
    c = tgmae.PRESETS["toy"]
    state = tgmae.TGMAE(c).state_dict()
    torch.save({"config": vars(c), "model": state}, "toy.pt")
    flags = f"--data {manifest(8)} {FEW} --mask tgm {clip_flags} --num-frames 4 --image-size 32"
    run(flags, "--blr 0 --min-lr 0 --init toy.pt --out run")
    said, saved = capsys.readouterr().out, load("run")
    assert f"toy.pt: trained on clips of {c.num_frames} frames, {c.image_size} pixels" in said
    assert "clips of 4 frames, 32x32" in said and len(log("run")) == 2
    trained = {name: v for name, v in state.items() if not name.startswith("predictor.")}
    assert_equal({name: saved["model"][name] for name in trained}, trained)
    assert saved["config"]["num_frames"] == 4 and saved["config"]["image_size"] == 32
    assert "num_frames 4 -> 8)" in fails(flags, "--num-frames 8 --out run")
    for more, why in (
        ("--num-frames 5", "--num-frames 5: must be a multiple of 2"),
        ("--image-size 30", "--image-size 30: must be a multiple of 8"),
        ("--image-size 0", "--image-size 0: must be positive"),
    ):
        assert why in fails(flags, more, "--out new")


@pytest.mark.parametrize("bottom_k", ["", "--bottom-k"])
def test_a_sample_is_what_the_flags_say(tmp_path, monkeypatch, bottom_k):
    """Frames of the segment, the middle caption, the mask of the motion in the crop; --bottom-k: of
    the lowest."""
    toy.write_video(tmp_path / "v.mp4", toy.make_clip(np.random.default_rng(0), 0)[0])
    record = {"video": "v.mp4", "captions": ["a", "b", "c"]}
    record |= {"start": 0.5, "end": 1.5}  # frames 6 to 17
    data = write_lines(tmp_path / "v.jsonl", [record] * 4)
    c, read, crops, seen = tgmae.PRESETS["toy"], dataset.read_clip, dataset.multi_scale_crop, {}

    def reads(video, numbers, **more):
        seen["numbers"] = numbers
        return read(video, numbers, **more)

    def draws(*size, **more):
        seen["crop"] = crops(*size, **more)
        return seen["crop"]

    monkeypatch.setattr(dataset, "read_clip", reads)
    monkeypatch.setattr(dataset, "multi_scale_crop", draws)
    flags = "--preset toy --mask mgm --mask-ratio 0.3 --num-captions 1 --stride 2"
    args = args_of("--data", data, flags, bottom_k)
    clips = train.Clips(dataset.read_manifest(data), c, args, text_from="clip")
    for i in range(4):
        sample, numbers = clips[0, i], seen["numbers"]
        _, motion = read(tmp_path / "v.mp4", numbers, motion=True)
        motion = dataset.crop_motion(motion, seen["crop"], c.grid)
        scores = motion.view(2, 2, 64).mean(1)  # of a slice's frames
        for row, mask in zip(-scores if bottom_k else scores, sample["mask"].view(2, 64)):
            assert mask.sum() == 19 and row[mask].min() >= row[~mask].max() - 1e-4  # the noise
        assert sample["captions"] == ["b"] and 6 <= numbers[0] and numbers[-1] < 18


@pytest.fixture
def gradients(manifest, workdir, monkeypatch):
    """gradients(*flags) -> those of the first step of a run on 8 clips."""

    def make(*flags):
        seen, clip = [], torch.nn.utils.clip_grad_norm_

        def clips(parameters, limit):
            seen.append([p.grad.clone() for p in parameters if p.grad is not None])
            return clip(parameters, limit)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clips)
            run("--data", manifest(8), "--mask tube --no-resume --no-amp --out run", FEW, *flags)
        return seen[0]

    return make


def test_accumulation_and_weights(gradients, clip_flags):
    one, two = gradients("--batch-size 8"), gradients("--batch-size 4 --accum 2")
    assert len(one) > 50
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    vt = f"--batch-size 8 --vt --no-mae {clip_flags}"
    whole, half = gradients(vt), gradients(vt, "--vt-weight 0.5")
    torch.testing.assert_close([grad / 2 for grad in whole], half)


def test_repeats_are_no_negatives(workdir, manifest, clip_flags, monkeypatch):
    """Nor are they in held-out losses."""
    seen, info_nce = [], tgmae.info_nce

    def watched(*args, groups):
        seen.append(groups.tolist())
        return info_nce(*args, groups=groups)

    monkeypatch.setattr(tgmae, "info_nce", watched)
    flags = "--vt --repeat 2 --batch-size 8 --val-split held --out run"
    run("--data", manifest(8, held=8), FEW, flags, clip_flags)
    *steps, first, second = seen
    for groups in steps:
        assert groups[::2] == groups[1::2] and len(set(groups)) == 4
    assert (first, second) == ([0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7])


@pytest.mark.parametrize("vt", [True, False])
def test_a_watching_predictor_is_clipped_by_itself(vt):
    model = tgmae.TGMAE(tgmae.PRESETS["toy"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    own = list(model.predictor.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in own)]

    def norm(params):
        return math.sqrt(sum(p.grad.square().sum().item() for p in params))

    before = norm([*others, *own]) if vt else norm(others)
    assert train.clip_gradients(model, argparse.Namespace(vt=vt, clip_grad=0.1)) == (
        pytest.approx(before)
    )
    together = [[*others, *own]] if vt else [others, own]
    assert [norm(params) for params in together] == pytest.approx([0.1] * len(together), rel=1e-4)


def test_optimizer_and_schedule(workdir, manifest):
    """VideoMAE's AdamW; warm-up in a line from 0, then a cosine; rates times clips / 256."""
    model = tgmae.TGMAE(tgmae.PRESETS["toy"])
    optimizer = train.make_optimizer(model, argparse.Namespace(weight_decay=0.05))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    groups = optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0 if p.ndim == 1 or name == "mask_token" else 0.05
        for name, p in model.named_parameters()
    }
    flags = "--mask tube --epochs 2 --warmup-epochs 1 --min-lr 0.01 --out run"
    run("--data", manifest(16), FEW, flags)
    peak, last = 0.05 * 4 / 256, 0.01 * 4 / 256
    cosine = [last + (peak - last) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    rates = [line["lr"] for line in log("run")]
    assert rates == pytest.approx([0, peak / 3, 2 * peak / 3, peak, *cosine])
    low = [runs.learning_rate(step, 2, 8, 1e-6, 1e-5, first=1e-5) for step in range(8)]
    assert low == pytest.approx([1e-6] * 8)  # never above the peak


def test_resume_is_exact(workdir, manifest, clip_flags, monkeypatch):
    """Stopped after its second checkpoint and run again: as undisturbed."""
    flags = f"--data {manifest(8)} --mask tgm --vt {clip_flags} {FEW} --epochs 3"
    run(flags, "--out whole")
    save = runs.save_checkpoint

    def stop_after(path, **state):
        save(path, **state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", stop_after)
        run(flags, "--out cut")
    with open("cut/log.jsonl", "a") as file:  # steps that no checkpoint holds, and half a line
        file.write('{"step": 5, "mae": 7}\n{"step": 6, "m')
    run(flags, "--out cut", workers=2)
    assert_same_run("whole", "cut")


def test_another_run_is_refused(workdir, manifest, clip_flags, capsys, world):
    """A run that goes on compares all that changes what is learnt; what is not typed is its own."""
    shutil.copytree(world / "clip", "clip")
    data, start = manifest(8), tgmae.TGMAE(tgmae.PRESETS["toy"])
    torch.save({"config": vars(start.config), "model": start.state_dict()}, "start.pt")
    flags = f"--mask tgm --vt --clip local-dir:clip {FEW} --init start.pt --out run"
    run("--data", data, flags)
    before, weight = Path("run/args.json").read_bytes(), load("run")["model"]["mask_token"]
    saved = json.loads(before)
    for typed, amp in (("", saved["amp"]), ("--amp", True), ("--no-amp", False)):
        assert train.parse_args(argv("--data", data, "--out run", typed)).amp == amp
    capsys.readouterr()
    run("--data", data, "--out run")  # all else is not typed
    run("--data", data, flags, "--save-minutes 3 --grad-checkpointing --no-amp --seed 0")
    run("--data", data, flags, "--batch-size 2 --accum 2")
    shutil.copytree("clip", "there/clip")
    run("--data", data, flags, "--clip local-dir:there/clip")
    shutil.copy(data, data.with_name("copy.jsonl"))
    run("--data", data.with_name("copy.jsonl"), flags)
    assert capsys.readouterr().out.count("finished, --no-resume starts over") == 5
    for more, change in (
        ("--num-captions 1", "num_captions 0 -> 1"), ("--stride 2", "stride 4 -> 2"),
        ("--flip", "flip False -> True"), ("--blr 0.1", "blr 0.05 -> 0.1"),
        ("--min-lr 0.1", "min_lr 1e-05 -> 0.1"), ("--warmup-epochs 0", "warmup_epochs 0.5 -> 0.0"),
        ("--clip-grad 1 --no-vt", "clip_grad 0.0 -> 1.0, vt True -> False"),
        ("--temperature 1", "temperature 0.07 -> 1.0"), ("--epochs 2", "epochs 1 -> 2"),
        ("--batch-size 2", "batch_size x accum 4 -> 2"), ("--seed 1", "seed 0 -> 1"),
    ):  # fmt: skip
        said = fails("--data", data, flags, more)
        assert f"run/last.pt is of another run ({change}): --no-resume starts over" in said
    assert Path("run/args.json").read_bytes() == before
    assert_equal(load("run")["model"]["mask_token"], weight)

    def other(change):
        return change in fails("--data", data, "--out run")

    records = [json.loads(line) for line in data.read_text().splitlines()]
    write_lines(data, [records[0] | {"captions": ["another"]}, *records[1:]])
    assert other("(records ")
    write_lines(data, [records[0] | {"label": "another"}, *records[1:]])  # is not learnt here
    run("--data", data, "--out run")
    os.rename("start.pt", "gone.pt")
    run("--data", data, "--out run")
    assert "not compared with the weights that it began with: start.pt" in capsys.readouterr().out
    torch.save({"config": vars(start.config), "model": tgmae.TGMAE(start.config).state_dict()},
               "start.pt")  # fmt: skip
    assert other("(init_weights ")
    os.rename("gone.pt", "start.pt")
    state = safetensors.torch.load_file("clip/open_clip_model.safetensors")
    state = {name: value + 0.1 for name, value in state.items()}
    safetensors.torch.save_file(state, "clip/open_clip_model.safetensors")
    assert other("(clip_weights ")


def test_checkpoints_of_before_go_on(workdir, manifest, clip_flags, capsys):
    """They have no digests, which are not compared, but paths are; a flag that they lack was at its
    default."""
    data = manifest(8, name="data.jsonl")
    flags = f"--mask tgm {clip_flags} {FEW} --out run"
    run("--data data.jsonl", flags)
    saved = load("run")
    for name in ("records", "clip_weights", "num_captions"):
        del saved["args"][name]
    torch.save(saved, "run/last.pt")
    records = data.read_text()
    data.write_text(records.replace('"captions": ["', '"captions": ["Now '))
    run("--data", "./data.jsonl", flags)
    assert "finished" in capsys.readouterr().out
    Path("other.jsonl").write_text(records)
    assert "/data.jsonl -> " in fails("--data other.jsonl", flags)
    assert "(num_captions 0 -> 2)" in fails("--data data.jsonl", flags, "--num-captions 2")


def test_maps_made_otherwise_are_another_run(mapped, monkeypatch):
    flags = f"--data {mapped.name} --mask tgm {FEW} --out run"
    run(flags)
    run(flags)
    monkeypatch.setattr(tgmae, "load_clip", LOAD_CLIP)
    run(flags, "--clip local-dir:data/toy/clip")  # the one that made the maps
    first = dataset.read_manifest(mapped)[0]["map_path"]
    with np.load(first) as file:
        values = dict(file)
    np.savez(first, **values | {"frames": values["frames"] * 2})
    assert "(maps 64 pixels, patches of 8, every " in fails(flags)


def interrupt(*args, **more):
    raise KeyboardInterrupt


def test_no_resume_begins_at_once(workdir, manifest, monkeypatch, capsys):
    """Killed before its first checkpoint, it does not leave the old run's to the next command. But
    one that is refused leaves all as it was."""
    flags = f"--data {manifest(8)} --mask tube {FEW} --out run"
    run(flags)
    old = Path("run/last.pt").read_bytes()
    assert "nothing.pt" in fails(flags, "--no-resume --init nothing.pt")
    assert "a new run in its folder replaces it" in fails(flags, "--no-resume --init run/last.pt")
    assert Path("run/last.pt").read_bytes() == old
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", interrupt)
        run(flags, "--no-resume")
    assert not Path("run/last.pt").exists() and Path("run/last.pt.old").read_bytes() == old
    capsys.readouterr()
    run(flags)
    assert "resume  at" not in capsys.readouterr().out and load("run")["step"] == 2


def test_saved_before_it_is_validated(workdir, manifest, monkeypatch):
    """A run that was stopped in between validates first when it goes on."""
    flags = f"--data {manifest(8, held=4)} --split train --val-split held --mask tube {FEW}"
    run(flags, "--epochs 2 --out whole")
    assert [line["step"] for line in log("whole") if "val_mae" in line] == [2, 4]
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupt)
        for step in (2, 4):
            with pytest.raises(KeyboardInterrupt):
                run(flags, "--epochs 2 --out cut")
            assert load("cut")["step"] == step
            patch.undo()
            validate = train.validate

            def stop_at_the_end(step, *rest):
                return interrupt() if step == 4 else validate(step, *rest)

            patch.setattr(train, "validate", stop_at_the_end)
    run(flags, "--epochs 2 --out cut")
    assert_same_run("whole", "cut")
    run(flags, "--epochs 2 --out cut")  # finished: nothing is added
    assert_same_run("whole", "cut")


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_clips_that_cannot_be_read(workdir, manifest, workers, capsys):
    """Their batches are left out, counted and named; so are clips that captions.py could not
    read."""
    (workdir / "broken.mp4").write_bytes(b"x" * 1000)
    bad = {"video": "broken.mp4", "captions": ["a"], "split": "held"}
    marked = bad | {"video": "marked.mp4", "failed": "why"}
    data = manifest(8, held=12, extra=[bad, marked])
    flags = f"--data {data} --val-split held --mask tube {FEW} --epochs 2 --vt --clip"
    run(flags, f"local-dir:{workdir / 'data/toy/clip'} --out run", workers=workers)
    said = capsys.readouterr().out
    assert "val     12 of the 13 videos of split held, in whole batches" in said
    assert 'clips marked "failed" are left out, such as marked.mp4' in said
    assert [line for line in log("run") if "val_bad" in line] == []  # the thirteenth is not read
    records = [json.loads(line) for line in data.read_text().splitlines()]
    write_lines(data, [*records[:9], bad, *records[9:-2]])
    run(flags, f"local-dir:{workdir / 'data/toy/clip'} --out run --no-resume", workers=workers)
    said = capsys.readouterr().out
    assert said.count("1 of 3 held-out batches left out, since a clip cannot be read: ") == 2
    lines = [line for line in log("run") if "val_mae" in line]
    assert [line["val_bad"] for line in lines] == [1, 1] and lines[0].keys() >= {"val_vt", "step"}
    assert Path("run/bad_videos.txt").read_text().startswith("broken.mp4\t")
    write_lines(data, [*records[:8], *[bad] * 4])  # none can be read: the run ends well
    run(flags, f"local-dir:{workdir / 'data/toy/clip'} --out run --no-resume", workers=workers)
    assert "samples.png is not drawn: " in capsys.readouterr().out
    assert [line["val_bad"] for line in log("run") if "val_bad" in line] == [1, 1]


@pytest.mark.slow
def test_processes_share_the_batch(workdir, manifest, clip_flags):
    """train.py itself on 1 process with 6 clips and on 3 with 2: the same losses."""
    flags = argv("--data", manifest(12), "--mask tgm --vt --no-amp", clip_flags, FEW, "--workers 0")
    for processes, own in ((1, "--batch-size 6 --out one"), (3, "--batch-size 2 --out three")):
        more = argv("--epochs 2", own)
        done = torchrun(processes, ROOT / "train.py", *flags, *more, cwd=workdir)
        assert done.returncode == 0, done.stderr
    one, three = log("one"), log("three")
    assert len(one) == len(three) == 4
    for a, b in zip(one, three):
        assert a["mae"] == pytest.approx(b["mae"], abs=2e-4)
        assert a["vt"] == pytest.approx(b["vt"], abs=2e-3)


@pytest.mark.slow
def test_accumulation_of_two_processes(workdir, manifest):
    """2 processes x 2 forwards take the step of 1 x 4."""
    flags = argv("--data", manifest(16), "--mask tube --no-amp", FEW, "--batch-size 2 --workers 0")
    for processes, own in ((1, "--accum 4 --out one"), (2, "--accum 2 --out two")):
        done = torchrun(processes, ROOT / "train.py", *flags, *argv(own), cwd=workdir)
        assert done.returncode == 0, done.stderr
    for a, b in zip(log("one"), log("two"), strict=True):
        assert a["mae"] == pytest.approx(b["mae"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=2e-4)


def test_each_clip_has_its_own_caption_and_mask(workdir, manifest, clip_flags):
    flags = argv("--data", manifest(4), f"--mask tgm --vt {clip_flags} --no-amp", FEW)
    args = train.parse_args([*flags, "--device", "cpu"])
    clip = tgmae.load_clip(args.clip)
    config = tgmae.PRESETS["toy"]
    records = dataset.read_manifest("some.jsonl")
    data = train.Clips(records, config, args, text_from="clip")
    samples = [data[0, i] for i in range(4)]
    assert len({sample["captions"][0] for sample in samples}) == 4
    video, mask, text = train.prepare(train.collate(samples), clip, args, config)
    for i, sample in enumerate(samples):
        alone = tgmae.encode_text(*clip, sample["captions"])
        torch.testing.assert_close(text[i], alone[0])
        own = tgmae.normalize(sample["video"])
        torch.testing.assert_close(video[i], own[0])
        scores = tgmae.text_scores(clip[0], own, alone, config.patch_size, config.tubelet_size)
        assert torch.equal(mask[i], tgmae.topk_mask(scores, args.mask_ratio)[0])


@pytest.mark.parametrize("amp, dtype", [("--amp", torch.bfloat16), ("--no-amp", torch.float32)])
def test_amp_casts(workdir, manifest, monkeypatch, amp, dtype):
    seen, forward = set(), tgmae.Block.forward

    def watched(block, x):
        seen.add(block.mlp(x).dtype)
        return forward(block, x)

    monkeypatch.setattr(tgmae.Block, "forward", watched)
    monkeypatch.setattr(train, "draw_samples", lambda *_: None)
    run("--data", manifest(4), "--mask tube --out run", FEW, amp)
    assert seen == {dtype}


@pytest.mark.parametrize("mask", ["tube", "mgm"])
def test_repeats_share_their_frames(workdir, manifest, monkeypatch, mask):
    """One decode; a crop, a mask and a caption each."""
    read, calls = dataset.read_clip, []
    monkeypatch.setattr(dataset, "read_clip", lambda *a, **k: calls.append(a) or read(*a, **k))
    args = args_of("--data", manifest(4), "--mask", mask, FEW, "--repeat 4")
    records = dataset.read_manifest(args.data)
    clips = train.Clips(records, tgmae.PRESETS["toy"], args, text_from="clip")
    sample = clips[0, 1]
    assert len(calls) == 1 and len(sample["captions"]) == 4
    assert sample["video"].shape == (4, 3, 4, 64, 64)
    for key in ("video", "mask"):
        assert len({part.numpy().tobytes() for part in sample[key]}) > 1
    monkeypatch.setattr(dataset, "multi_scale_crop", lambda size, **_: dataset.Crop(0, 0, *size))
    first, *others = clips[0, 1]["video"]
    assert all(torch.equal(first, other) for other in others)


def test_loader_processes_last_for_the_run():
    """The same samples as a loader made anew each epoch, from any step on; the processes do not
    change."""

    class Who(runs.TrainingClips):
        def load(self, place, seed):
            return {"place": place, "seed": seed, "pid": os.getpid()}

    args = argparse.Namespace(seed=3, epochs=3, workers=2, device="cpu")
    data, share = Who([{"video": str(i)} for i in range(11)], seed=3), runs.share_step(2, 2)

    def batches(start):
        steps = runs.steps(data, share, args, start, lambda samples: {"of": samples})
        return [batch["of"] for _, step in steps for batch in step]

    def keys(batches):
        return [[(sample["place"], sample["seed"]) for sample in batch] for batch in batches]

    whole = batches(0)
    assert len({sample["pid"] for batch in whole for sample in batch}) == 2
    seen = keys(whole)
    assert len(seen) == 3 * 2 * 2 and seen[0] != seen[4]
    assert len({seed for batch in seen for _, seed in batch}) == 24
    for epoch in range(3):  # 8 of the 11, none twice
        assert len({place for batch in seen[4 * epoch : 4 * epoch + 4] for place, _ in batch}) == 8
    for step in (1, 2, 3, 5):
        assert keys(batches(step)) == seen[2 * step :]


@pytest.fixture
def mapped(workdir, manifest, clip_flags, monkeypatch):
    """A manifest of 10 clips with text maps and one that is gone; no CLIP can be loaded."""
    data = manifest(10, extra=[{"video": "gone.mp4", "captions": ["a"]}])
    captions.main(argv("maps", data, clip_flags, "--image-size 64 --patch-size 8 --every 4"))
    monkeypatch.setattr(tgmae, "load_clip", None)
    return data


@pytest.mark.parametrize("flags", [
    "--mask tgm --vt", "--mask tgm --repeat 2 --num-captions 1", "--mask tube --vt",
])  # fmt: skip
def test_maps_replace_clip(mapped, capsys, flags):
    run("--data", mapped, flags, FEW, "--out run", workers=1)
    assert load("run")["config"]["text_dim"] == 64 and 0 < log("run")[0]["vt"] < 9
    said = capsys.readouterr().out
    assert "1 clips marked" in said and "gone.mp4" in said and "text maps (local-dir:clip " in said
    assert "note    text maps" not in said


@pytest.mark.parametrize("flags", ["--image-size 32", "--preset small --image-size 64"])
def test_maps_of_another_geometry(mapped, capsys, flags):
    args = args_of("--data", mapped, "--mask tgm --vt", FEW, "--device cpu", flags)
    records, _, text = train.load_data(args)
    c = train.build_model(args, text, records[0])[0].config
    note = "text maps of 64 pixels in patches of 8; the model sees "
    note += f"{c.image_size} in patches of {c.patch_size}: captions.py maps"
    assert note in capsys.readouterr().out


def test_without_text_neither_maps_nor_failures_matter(mapped, capsys):
    run("--data", mapped, "--mask tube", FEW, "--out run")
    assert "vt" not in log("run")[0] and "11 videos" in capsys.readouterr().out


def test_a_sample_is_what_its_map_says(mapped, monkeypatch):
    """Text and mask are those of the map, the caption and the frames that were drawn."""
    asked, map_scores = [], dataset.map_scores
    monkeypatch.setattr(dataset, "map_scores", lambda *a: asked.append(a) or map_scores(*a))
    args = args_of("--data", mapped, "--mask tgm", FEW)
    records, _, text = train.load_data(args)
    assert text == "maps" and len(records) == 10
    record = records[3]
    sample = train.Clips(records, tgmae.PRESETS["toy"], args, text_from=text)[0, 3]
    made = dataset.read_map(record["map_path"], record["captions"])
    which = record["captions"].index(sample["captions"][0])
    assert torch.equal(sample["text"][0], made.text[which])
    (_, caption, (first, second), crop, size, grid) = asked[0]
    assert caption == which and second - first == 8 and size == (64, 64)
    scores = map_scores(made, which, [first, second], crop, size, grid).flatten(1)
    for slice_, mask in zip(scores, sample["mask"].view(2, 64)):
        assert mask.sum() == 38 and slice_[mask].min() >= slice_[~mask].max()


def test_wrong_maps_stop_the_run(mapped, world, monkeypatch):
    lines = [json.loads(line) for line in mapped.read_text().splitlines()]
    whole = (mapped.parent / lines[1]["maps"]).read_bytes()
    (mapped.parent / "half.npz").write_bytes(whole[:900])
    found = dict(np.load(mapped.parent / lines[1]["maps"]))
    piece = {"similarity": found["similarity"][:, :2], "frames": found["frames"][:2]}
    np.savez(mapped.parent / "piece.npz", **(found | piece))
    for change, flags, reason in (
        ({"captions": ["a blue star"]}, "", "a text map of other captions"),
        ({"maps": None}, "", "has no text map, others have"),
        ({"maps": "nowhere.npz"}, "", "has no text map at nowhere.npz"),
        ({"maps": "half.npz"}, "", "half.npz: not a whole text map"),
        ({"maps": "piece.npz"}, "", "piece.npz: a text map of frames 0 to 4, for a clip of"),
        ({}, "--clip-pretrained laion400m_e32",
         "is not the CLIP of the text maps, local-dir:clip"),
        ({}, "--clip ViT-B-32",
         "--clip: ViT-B-32/openai is not the CLIP of the text maps, local-dir:clip"),
    ):  # fmt: skip
        write_lines(mapped.parent / "bad.jsonl", [lines[0], lines[1] | change, *lines[2:]])
        assert reason in fails("--data bad.jsonl --mask tgm --out bad --no-resume", FEW, flags)
    monkeypatch.setattr(tgmae, "load_clip", LOAD_CLIP)
    own = "--data some.jsonl --mask tgm --out bad --no-resume --clip local-dir:clip"
    shutil.copytree(world / "clip", "clip")
    run(own, FEW)
    file = "clip/open_clip_model.safetensors"
    others = {name: value + 0.01 for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(others, file)
    said = fails(own, FEW)
    assert said.startswith("train.py: --clip: local-dir:clip ") and "is not the CLIP of" in said


def test_bad_videos_are_replaced_and_listed(workdir, manifest, clip_flags, capsys):
    """Whichever process loads them. One of 3 frames is not bad: it repeats its last."""
    (workdir / "broken.mp4").write_bytes(b"x" * 1000)
    toy.write_video(workdir / "short.mp4", toy.make_clip(np.random.default_rng(0), 0)[0][:3])
    extra = [{"video": f"{name}.mp4", "captions": ["a"]} for name in ("broken", "gone", "short")]
    flags = f"--data {manifest(5, extra=extra)} --mask tgm {clip_flags} {FEW} --epochs 2"
    run(flags, "--out run")
    broken, gone = sorted((workdir / "run/bad_videos.txt").read_text().splitlines())
    assert broken.startswith("broken.mp4\t") and gone.startswith("gone.mp4\t")
    assert "gone.mp4: No such file" in gone
    assert sum(line["bad"] for line in log("run")) == 4  # two an epoch
    assert sum(line["short"] for line in log("run")) >= 2  # short.mp4, once an epoch or more
    said = capsys.readouterr().out
    assert "4 times a video could not be read" in said
    assert "times a video had fewer frames than a clip spans" in said
    run(flags, "--out again", workers=2)
    assert_same_run("run", "again")


@pytest.mark.parametrize("workers", [0, 2])
def test_only_bad_videos_stop_the_run(workdir, workers):
    write_lines(workdir / "bad.jsonl", [{"video": f"{name}.mp4"} for name in "abcd"])
    reason = r"4 video\(s\) in a row cannot be read, the last: .*[abcd].mp4"
    with pytest.raises(SystemExit, match=reason):
        run("--data bad.jsonl --mask tube", FEW, workers=workers)


def test_motion_fallback_is_counted(workdir, capsys):
    for i in range(4):
        frames, *_ = toy.make_clip(np.random.default_rng(i), i)
        toy.write_video(workdir / f"{i}.mkv", frames, options={"g": "1"})
    write_lines(workdir / "intra.jsonl", [{"video": f"{i}.mkv"} for i in range(4)])
    run("--data intra.jsonl --mask mgm --out run", FEW)
    assert log("run")[0]["no_motion"] == 4
    assert "4 times a video had no motion vectors" in capsys.readouterr().out


def test_mistakes_are_one_line(workdir, manifest, clip_flags):
    manifest(8, name="data.jsonl")
    write_lines(workdir / "bare.jsonl", [{"video": "clip.mp4"}])
    data, few, bare = "--data data.jsonl ", f"--data data.jsonl {FEW} ", "--data bare.jsonl "
    shared = "8 of 8 clips of --val-split dev are on another side, too, such as "
    for flags, reason in (
        ("--data nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        (bare + "--mask tgm", "bare.jsonl: clip.mp4 has no captions"),
        (bare + clip_flags, "has no captions, which --mask tgm, --vt and --clip need"),
        (data + "--split dev --mask-ratio 0", "--mask-ratio 0: must lie between"),
        (data + "--mask-ratio 1", "--mask-ratio 1: must lie between"),
        (few + "--val-split dev", shared),
        (few + "--val-split train", shared.replace("dev", "train")),
        (few + "--mask-ratio 0.001", "--mask-ratio 0.001: masks 0 of 64"),
        (few + "--no-mae", "--no-mae without --vt leaves nothing to learn, unless VT is watched"),
        (few + "--clip-pretrained a", "--clip-pretrained a: needs --mask tgm, --vt or --clip"),
        (few + f"{clip_flags} --clip-pretrained a", "--clip-pretrained a: --clip local-dir:"),
        (data + "--batch-size 3 --repeat 2", "--batch-size 3 is not divisible by --repeat 2"),
        (few + "--batch-size 16", "8 clips of split 'train' are fewer than a step takes"),
        (few + f"--batch-size 1 --vt {clip_flags}", "--vt with a global batch of 1"),
        (few + f"--batch-size 1 {clip_flags}", "VT, which is watched, with a global batch of 1"),
        (data + "--warmup-epochs 999", "--warmup-epochs 999"),
        (data + "--epochs 0", "--epochs 0: must be positive"),
        (data + "--num-captions -1", "--num-captions -1: must not be negative"),
        (data + "--clip-grad -1", "--clip-grad -1: must not be negative"),
        (data + "--seed -1", "--seed -1: must not be negative"),
        (few + "--init nothing.pt", "nothing.pt"),
        (few + "--mask tgm --clip local-dir:nowhere", "--clip local-dir:nowhere"),
    ):  # fmt: skip
        assert reason in fails(flags), flags
    assert not os.listdir("runs")  # what was refused leaves nothing
    for device, there in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if not there.is_available():
            said = fails(data, "--device", device)
            assert said.startswith(f"train.py: --device {device}: ") and len(said) < 200


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "cuda:1"])
def test_copies_wait_but_to_a_gpu(monkeypatch, device):
    """Elsewhere the source may be gone before it is copied."""
    copies = []

    def copy(tensor, device=None, *_, non_blocking=False, **__):
        copies.append((device, non_blocking))
        return tensor

    batch = {"video": torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), "text": torch.zeros(1, 16)}
    batch["mask"] = torch.arange(32)[None] < 16
    monkeypatch.setattr(torch.Tensor, "to", copy)
    if device != "cuda:1":  # --device has none
        train.prepare(batch, None, argparse.Namespace(device=device), None)
    tgmae.split_mask(batch["mask"], torch.device(device))
    copies = [waits for where, waits in copies if str(where) == device]
    assert len(copies) >= 2 and set(copies) == {device.startswith("cuda")}


def test_another_run_is_not_overwritten(workdir, manifest, clip_flags):
    flags, files = f"--data {manifest(4)} {FEW} --out run --mask tube", ("last.pt", "log.jsonl")
    run(flags)
    before = [(workdir / "run" / name).read_bytes() for name in files]
    for more, reason in (
        ("--mask mgm", "mask tube -> mgm"), ("--weight-decay 0.1", "weight_decay 0.05 -> 0.1"),
        (clip_flags, "clip ViT-B-32-quickgelu -> local-dir"),
        ("--preset small", "embed_dim 128 -> 384"),
    ):  # fmt: skip
        assert reason in fails(flags, more)
    assert before == [(workdir / "run" / name).read_bytes() for name in files]
    (workdir / "run/last.pt").write_bytes(b"half a checkpoint")
    assert "run/last.pt" in fails(flags)
    run(flags, "--mask mgm --no-resume")


@pytest.mark.slow
def test_real_footage(workdir, footage):
    """The road of a user's own videos: index, label captions, text maps, each masker; the CLIP has
    OpenAI's architecture and random weights in a file. Coarse maps, since this is a slow machine's
    test."""
    import open_clip

    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), "clip.pt")
    captions.main(["index", str(footage / "asl"), "--out", "asl.jsonl"])
    captions.main(["caption", "asl.jsonl", "--source", "label"])
    few = "--epochs 1 --warmup-epochs 0 --preset toy --batch-size 5"
    for mask in ("tube", "mgm"):
        run("--data asl.jsonl", few, "--mask", mask, "--out", mask)
        lines = log(mask)
        assert len(lines) == 4 and not any(line["bad"] or line["no_motion"] for line in lines)
    two = (workdir / "asl.jsonl").read_text().splitlines()[:2]
    (workdir / "two.jsonl").write_text("\n".join(two))
    tgm = f"{few} --mask tgm --vt"
    run("--data two.jsonl", tgm, "--batch-size 2 --clip-pretrained clip.pt --out online")
    captions.main(argv("maps asl.jsonl --clip-pretrained clip.pt --image-size 32 --every 64"))
    run("--data asl.jsonl", tgm, "--out maps")
    for out, steps in (("online", 1), ("maps", 4)):
        assert load(out)["config"]["text_dim"] == 512 and len(log(out)) == steps


# ---- clips on two sides -------------------------------------------------------------------------

SIDES = [  # a clip to train on, one to test on, and whether they share anything
    ({"video": "a.mp4"}, {"video": "a.mp4"}, True),
    ({"video": "a.mp4"}, {"video": "b.mp4"}, False),
    ({"video": "sub/../a.mp4"}, {"video": "./a.mp4"}, True),
    ({"video": "a.mp4"}, {"video": "link.mp4"}, True),
    ({"video": "real/a.mp4"}, {"video": "folder/a.mp4"}, True),
    ({"video": "gone.mp4"}, {"video": "gone.mp4"}, True),  # whether it is there or not
    ({"video": "a.mp4", "start": 0, "end": 2}, {"video": "a.mp4", "start": 2, "end": 4}, False),
    ({"video": "a.mp4", "start": 2}, {"video": "a.mp4", "end": 2}, False),
    ({"video": "a.mp4", "start": 0, "end": 2.5}, {"video": "link.mp4", "start": 2, "end": 4}, True),
    ({"video": "a.mp4", "start": 1, "end": 2}, {"video": "a.mp4"}, True),
    ({"video": "a.mp4", "start": 9}, {"video": "a.mp4", "start": 3}, True),
    ({"video": "a.mp4", "end": 1}, {"video": "a.mp4", "end": 0.5}, True),
]


@pytest.mark.parametrize("one, other, shared", SIDES)
def test_a_clip_is_on_one_side(one, other, shared, tmp_path):
    """Files are compared, not names, and of one video its pieces."""
    (tmp_path / "real").mkdir(), (tmp_path / "sub").mkdir()
    (tmp_path / "a.mp4").touch(), (tmp_path / "real/a.mp4").touch()
    (tmp_path / "link.mp4").symlink_to("a.mp4"), (tmp_path / "folder").symlink_to("real")
    twice = [one | {"split": "train"}] * 2  # on one side it may stand as often as it likes
    data = write_lines(tmp_path / "d.jsonl", [*twice, other | {"split": "test"}])
    train_clips, test_clips = (dataset.read_manifest(data, split) for split in ("train", "test"))
    for sides in ({"A": train_clips, "B": test_clips}, {"B": test_clips, "A": train_clips}):
        if shared:
            with pytest.raises(ValueError, match="d.jsonl: . of . clips of . are on another side"):
                dataset.refuse_shared_clips(data, sides)
        else:
            dataset.refuse_shared_clips(data, sides)
