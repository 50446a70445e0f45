"""What things cost here, in pairs within one run; medians and their ratios. Run by hand, on an idle machine.

python tests/bench.py step     # training: tube, TGM from text maps, TGM online (a minute or two on a CPU)
python tests/bench.py maps     # captions.py maps, against what the device's matrix rate allows
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before torch loads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import captions
import tgmae
import toy
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function, *args):
    began = time.perf_counter()
    function(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(functions, repeats):
    """{name: function} -> {name: median seconds}, taken in turns after one round that warms up."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def untrained_clip(folder, name):
    """A CLIP with random weights: the toy one as a folder, or open_clip's architecture of that name in a file."""
    import open_clip
    from safetensors.torch import save_file

    if name != "toy":
        torch.save(open_clip.create_model(name).state_dict(), folder / "clip.pt")
        return "--clip", name, "--clip-pretrained", str(folder / "clip.pt")
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps(toy.CLIP_CONFIG))
    save_file(
        open_clip.CLIP(**toy.CLIP_CONFIG["model_cfg"]).state_dict(),
        folder / "clip/open_clip_model.safetensors",
    )
    return "--clip", f"local-dir:{folder / 'clip'}"


def videos(folder, count, frames=120, size=(240, 320)):
    """A manifest of H.264 videos of the size that Kinetics is usually kept in: noise that drifts."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        field = np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        clip = np.stack([np.roll(field, 3 * f, axis=1)[: size[0], : size[1]] for f in range(frames)])
        toy.write_video(folder / f"{i}.mp4", clip, fps=30, options={"crf": "23"})
        lines.append({"video": f"{i}.mp4", "captions": ["a person", "a dog", "a bicycle"]})
    (folder / "online.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "maps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stepper(data, mask, batch, flags=()):
    """-> function that loads a batch (in this process, so that nothing hides behind something else) and
    takes a training step with it, everything at mask ratio 0.6, MAE + VT."""
    words = f"--data {data} --mask {mask} --mask-ratio 0.6 --vt --batch-size {batch}".split() + [*flags]
    args = train.parse_args([*words, "--device", DEVICE])
    rank, world = tgmae.start_processes(args)
    records, _, text = train.load_data(args, rank, world)
    model, clip = train.build_model(args, text, records[0])
    clips = train.Clips(records, model.config, args, text=text)
    optimizer = train.make_optimizer(model, args)

    def step():
        batch_ = train.collate([clips[i] for i in range(batch)])
        train.losses_and_gradients(model, batch_, clip, args, model.config)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_step(folder, args):
    videos(folder, args.batch)
    flags = untrained_clip(folder, "toy")
    captions.main(["maps", str(folder / "maps.jsonl"), *flags])
    data, online = folder / "maps.jsonl", untrained_clip(folder, "ViT-B-32-quickgelu")
    preset = "--preset", args.preset
    took = medians({mask: stepper(data, mask, args.batch, preset) for mask in ("tube", "tgm")}, args.repeats)
    took["online"] = medians(
        {"online": stepper(folder / "online.jsonl", "tgm", args.batch, (*preset, *online))}, 1
    )["online"]
    print(
        f"step    {args.preset}, batch {args.batch}, decoding included: tube {took['tube']:.2f} s; TGM from maps "
        f"{took['tgm']:.2f} s, {took['tgm'] / took['tube']:.3f}x (goal: 1.05x); TGM online with ViT-B/32 "
        f"{took['online']:.1f} s, {took['online'] / took['tube']:.1f}x"
    )


@torch.no_grad()
def bench_maps(folder, args):
    """Patches per second of similarity_map with ViT-B/32 against the rate of a large matrix product."""
    flags = untrained_clip(folder, "ViT-B-32-quickgelu")
    clip = tgmae.load_clip(*flags[1::2], DEVICE)
    text = tgmae.encode_text(*clip, ["a"])
    frames = torch.randint(256, (1 if DEVICE == "cpu" else 16, 3, 224, 304), dtype=torch.uint8)
    patches = len(frames) * 14 * 19
    size = clip[0].visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    torch.backends.mha.set_fastpath_enabled(False)  # in which the counter does not see the matrix products
    with FlopCounterMode(display=False) as counter:
        clip[0].encode_image(
            torch.zeros(1, 3, *size, device=DEVICE, dtype=next(clip[0].visual.parameters()).dtype)
        )
    torch.backends.mha.set_fastpath_enabled(True)
    dtype = torch.bfloat16 if tgmae.bf16_is_fast(DEVICE) else torch.float32
    a = torch.randn(
        8192 if DEVICE == "cuda" else 2048, 8192 if DEVICE == "cuda" else 2048, device=DEVICE, dtype=dtype
    )
    took = medians(
        {
            "product": lambda: a @ a,
            "maps": lambda: captions.similarity_map(clip[0], frames, text, 16, DEVICE),
        },
        args.repeats,
    )
    rate = 2 * len(a) ** 3 / took["product"]
    bound = rate / counter.get_total_flops()
    print(
        f"maps    {patches / took['maps']:.4g} patches/s, {patches / took['maps'] / bound:.0%} of the {bound:.4g} that "
        f"{rate / 1e12:.3g} TFLOP/s in {str(dtype)[6:]} and {counter.get_total_flops() / 1e9:.2f} GFLOP a patch "
        "allow (goal: 60%)"
    )  # fmt: skip


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("what", choices=("step", "maps"))
    parser.add_argument(
        "--preset", default="base", choices=tgmae.PRESETS, help="of the model that is trained"
    )
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"step": bench_step, "maps": bench_maps}[args.what](Path(folder), args)
    print(f"        {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
