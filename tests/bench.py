"""Speed beside what one would use instead: in turns, on the same input, in one run; medians and
their ratios. Run by hand, on an idle machine.

    python tests/bench.py step   # a training step, beside transformers' VideoMAE
    python tests/bench.py load   # from files to clips, beside decord, torchcodec, a bare decode
    python tests/bench.py maps   # text maps: how fast they are made, and what they save
    python tests/bench.py end    # train.py as it is: clips/s, and the share that waits for data
    python tests/bench.py all --json bench.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before torch loads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import captions
import dataset
import runs
import tgmae
import toy
import train
import weights

CUDA = torch.cuda.is_available()
results = []  # what --json keeps: a dict a line of output


def report(what, **numbers):
    """Prints a line of results, and keeps it."""
    results.append({"what": what, **numbers})
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    print(f"{what:<40}", *shown, sep="  ", flush=True)


def timed(functions, repeats):
    """{name: function} -> {name: seconds of each round}: in turns, every other round in reverse,
    after one that warms up."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            functions[name]()
            if CUDA:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: taken[1:] for name, taken in times.items()}


def ratio(times, a, b):
    """The median over rounds of a's time over b's: a machine that slows down slows both."""
    return statistics.median(one / other for one, other in zip(times[a], times[b]))


def compare(what, functions, clips, args):
    """Reports what a clip takes each function, of which one is "ours", and how many times ours."""
    times = timed(functions, args.repeats)
    each = {name: 1e3 * statistics.median(taken) / clips for name, taken in times.items()}
    report(f"{what}: ms a clip", **each)
    if others := [name for name in functions if name != "ours"]:
        report(f"{what}: times ours", **{name: ratio(times, name, "ours") for name in others})


# =================================================================================================
# step: forward, backward and optimizer.
# =================================================================================================


def training_step(model, loss_of, args):
    """-> step(video, mask, amp). loss_of(video, mask): the forward pass."""
    model.to(args.device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    how = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "fused": True}
    optimizer = torch.optim.AdamW(params, **how)

    def step(video, mask, amp):
        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
            loss = loss_of(video, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(args, *, checkpointing=False, compiled=False):
    model = tgmae.TGMAE(tgmae.PRESETS[args.preset])
    model.predictor.requires_grad_(False)
    if checkpointing:
        runs.checkpoint_blocks(model)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    return training_step(model, lambda video, mask: model(video, mask)["mae"], args)


def their_step(args, attention, *, compiled=False):
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    c = tgmae.PRESETS[args.preset]
    config = VideoMAEConfig(
        **{theirs: getattr(c, ours) for ours, theirs in weights.SIZES.items()},
        intermediate_size=int(c.embed_dim * c.mlp_ratio),
        decoder_intermediate_size=int(c.decoder_embed_dim * c.mlp_ratio),
        use_mean_pooling=False,
        attn_implementation=attention,
    )
    model = VideoMAEForPreTraining(config)
    if compiled:
        model.compile()
    return training_step(model, lambda video, mask: model(video.transpose(1, 2), mask).loss, args)


def memory_of(step):
    """GiB that a step takes beyond weights and moments, at its peak: activations and gradients."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def compare_steps(what, steps, size, mask_ratio, amp, args):
    c = tgmae.PRESETS[args.preset]
    video = torch.randn(size, 3, c.num_frames, c.image_size, c.image_size, device=args.device)
    mask = tgmae.topk_mask(tgmae.tube_scores(size, c.grid), mask_ratio)
    ways = {name: (lambda step=step: step(video, mask, amp)) for name, step in steps.items()}
    what = f"step {mask_ratio} {'bf16' if amp else 'fp32'}{what}"
    compare(what, ways, size, args)
    if args.device == "cuda":
        report(f"{what}: GiB", **{name: memory_of(way) for name, way in ways.items()})


def bench_step(folder, args):
    ours, sdpa = our_step(args), their_step(args, "sdpa")
    steps = {"ours": ours, "sdpa": sdpa, "eager": their_step(args, "eager")}
    for mask_ratio in sorted(set(tgmae.MASK_RATIOS.values()), reverse=True):
        for amp in (False, True):
            compare_steps("", steps, args.batch, mask_ratio, amp, args)
    fast = 0.9, weights.bf16_is_fast(args.device), args
    steps = {"ours": ours, "checkpointing": our_step(args, checkpointing=True)}
    compare_steps("", steps, args.batch, *fast)
    if args.compile:
        steps = {"ours": our_step(args, compiled=True)}
        steps["sdpa"] = their_step(args, "sdpa", compiled=True)
        compare_steps(", both compiled", steps, args.batch, *fast)
    for size in (32, 64, 128) if args.device == "cuda" else (2, 4, 8):
        compare_steps(f", batch {size}", {"ours": ours}, size, *fast)


# =================================================================================================
# load: from files to clips.
# =================================================================================================


def footage(frames, height, width):
    """Frames (F,H,W,3) uint8 of about what a camera sees: it pans over texture of all scales, a
    thing moves in front, and there is a little noise."""
    g = torch.Generator().manual_seed(0)

    def texture(h, w, spread):
        total = torch.zeros(3, h, w)
        for s in [2**i for i in range(1, 7) if 2**i < min(h, w) / 2]:
            noise = torch.randn(1, 3, h // s, w // s, generator=g)
            total += F.interpolate(noise, (h, w), mode="bicubic")[0] * s**0.7
        return ((total - total.mean()) / total.std() * spread + 128).clamp(0, 255)

    ground, thing = texture(2 * height, 2 * width, 50), texture(height // 3, width // 4, 60)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for f in range(frames):
        y, x = int(height / 2 * (1 + np.sin(f / 90))), int(width / 2 * (1 + np.sin(f / 70)))
        image = ground[:, y : y + height, x : x + width].clone()
        y, x = int(height / 3 * (1 + np.sin(f / 25))), int(width * 3 / 8 * (1 + np.cos(f / 31)))
        image[:, y : y + height // 3, x : x + width // 4] = thing
        image += 2 * torch.randn(image.shape, generator=g)
        clip[f] = image.clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return clip


SPAN, STRIDE = 64, 4  # frames that a clip covers, one in STRIDE of them is taken


def resized(frames, crop):
    return dataset.crop_frames(frames, crop, 224)


def ours(path, start, crop, motion=False):
    """As train.py reads a clip; the file's packets are counted anew each time."""
    dataset._INDICES.clear()
    with dataset.open_video(path, motion=motion) as video:
        dataset.frame_range(video)
        read = dataset.read_clip(video, range(start, start + SPAN, STRIDE), motion=motion)
    resized(read[0] if motion else read, crop)
    if motion:
        tgmae.motion_scores(dataset.crop_motion(read[1], crop, (8, 14, 14))[None], (8, 14, 14))


def with_motion(path, start, crop):
    ours(path, start, crop, motion=True)


def with_decord(path, start, crop):
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    resized(torch.from_numpy(reader.get_batch(range(start, start + SPAN, STRIDE)).asnumpy()), crop)


def with_torchcodec(path, start, crop):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    resized(decoder.get_frames_at(list(range(start, start + SPAN, STRIDE))).data, crop)


def bare_decode(path, start, crop):
    """libav from the nearest key frame on, or from the file's start; frames are thrown away."""
    (index,) = dataset._INDICES.values()  # whoever came before has counted the frames
    last, keys = start + SPAN - STRIDE, index.keys[index.keys <= start]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if len(keys):
            container.seek(int(index.pts[keys[-1]]), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            if count == last or (len(keys) and frame.pts >= index.pts[last]):
                break


def loaders(folder):
    """{name: loader}, with the peers that are installed and work; a line for those that do not."""
    path, crop = folder / "first.mp4", dataset.Crop(0, 0, 64, 64, False)
    toy.write_video(path, footage(SPAN, 64, 64), fps=30)
    found = {"ours": ours, "motion": with_motion, "bare decode": bare_decode}
    for name, loader in (("decord", with_decord), ("torchcodec", with_torchcodec)):
        try:
            loader(path, 0, crop)
            found[name] = loader
        except Exception as error:  # torchcodec: RuntimeError where FFmpeg's libraries are missing
            print(f"{name}: skipped, {str(error).strip().splitlines()[0]}")
    return found


def manifest_of(folder, record, count):
    """A manifest that has one record `count` times."""
    manifest = folder / "bench.jsonl"
    manifest.write_text((json.dumps(record) + "\n") * count)
    return manifest


def clips_of(path, count, *flags):
    manifest = manifest_of(path.parent, {"video": path.name}, count)
    args = train.parse_args(["--data", str(manifest), *map(str, flags)])
    return train.Clips(dataset.read_manifest(manifest), tgmae.PRESETS["base"], args, text_from=None)


def bench_load(folder, args):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    starts = np.random.default_rng(0).integers(0, 300 - SPAN, 8).tolist()
    found = loaders(folder)
    avi = ("avi", "mpeg4", {"g": "250", "bf": "2", "b": "800000"})  # as XviD
    mp4 = [("mp4", "libx264", {"crf": "23", "g": str(gop)}) for gop in (250, 12)]
    for height, width in ((256, 340), (360, 640), (720, 1280)):
        clip = footage(300, height, width)
        side = int(0.875 * height)
        crop = dataset.Crop(height // 16, width // 8, side, side, True)
        for kind, codec, options in (*mp4, avi):
            path = folder / f"{height}-{options['g']}.{kind}"
            toy.write_video(path, clip, fps=30, codec=codec, options=options)
            ways = {
                name: (lambda load=load: [load(path, start, crop) for start in starts])
                for name, load in found.items()
            }
            name = f"load {width}x{height} {kind} GOP {options['g']}"
            compare(name, ways, len(starts), args)
            data = {n: clips_of(path, 8, "--repeat", n, "--batch-size", n) for n in (1, 4)}
            ways = {n: (lambda n=n: [data[n][0, i] for i in range(8)]) for n in data}
            more = 4 * ratio(timed(ways, args.repeats), 1, 4)
            report(f"{name}: --repeat 4", times_the_clips=more)
    data = clips_of(folder / "256-12.mp4", 100)
    samples, collate = [(0, i) for i in range(100)], train.collate

    def read(workers):
        list(DataLoader(data, 4, sampler=samples, num_workers=workers, collate_fn=collate))

    times = timed({n: (lambda n=n: read(n)) for n in (1, 2)}, args.repeats)
    report("load 340x256: 2 workers over 1", times_the_clips=ratio(times, 1, 2))
    torch.set_num_threads(threads)


# =================================================================================================
# maps, and train.py as a whole.
# =================================================================================================


def train_speed(folder, record, steps, args, *flags):
    """train.py on one record over and over -> medians of its log's clips/s and share of waiting,
    of the second half of its steps."""
    data = manifest_of(folder, record, args.batch * steps)
    words = f"--data {data} --preset {args.preset} --batch-size {args.batch} --epochs 1"
    words += f" --warmup-epochs 0 --device {args.device} --out {folder / 'run'} --no-resume"
    train.draw_samples = lambda *_: None  # not timed, and slow with CLIP online
    train.main([*words.split(), *flags])
    lines = (folder / "run/log.jsonl").read_text().splitlines()[steps // 2 :]
    lines = [json.loads(line) for line in lines]
    return {k: statistics.median(line[k] for line in lines) for k in ("clips_per_s", "wait")}


@torch.no_grad()
def patches_per_second(clip, args):
    text = tgmae.encode_text(*clip, ["a"])
    frames = torch.randint(256, (1 if args.device == "cpu" else 16, 3, 224, 304), dtype=torch.uint8)
    made = {"maps": lambda: captions.similarity_map(clip[0], frames, text, 16, args.device)}
    return len(frames) * 14 * 19 / statistics.median(timed(made, args.repeats)["maps"])


def bench_maps(folder, args):
    """ViT-B/32 with random weights: patches a second; then steps at mask ratio 0.6, MAE + VT, of
    tube, TGM from maps, TGM online. They load in the process that trains, so that nothing hides
    behind something else."""
    import open_clip

    name, file = "ViT-B-32-quickgelu", folder / "clip.pt"
    torch.save(open_clip.create_model(name).state_dict(), file)
    clip = weights.load_clip(name, str(file), args.device)
    report("maps: patches/s", ours=patches_per_second(clip, args))

    flags = "--clip", name, "--clip-pretrained", str(file)
    toy.write_video(folder / "clip.mp4", footage(64, 240, 320), fps=30, options={"crf": "23"})
    record = {"video": "clip.mp4", "captions": ["a person", "a dog", "a bicycle"]}
    manifest = manifest_of(folder, record, 1)
    c = tgmae.PRESETS[args.preset]
    sizes = f"--every 32 --image-size {c.image_size} --patch-size {c.patch_size}"
    captions.main(["maps", str(manifest), *flags, *sizes.split()])
    mapped = json.loads(manifest.read_text())
    rates = {}
    for way, mask, one, steps in (
        ("tube", "tube", mapped, 2 * args.repeats),
        ("maps", "tgm", mapped, 2 * args.repeats),
        ("online", "tgm", record, 2),  # minutes a step on a CPU
    ):
        more = ["--mask", mask, "--mask-ratio", "0.6", "--vt", "--workers", "0", *flags]
        rates[way] = train_speed(folder, one, steps, args, *more)["clips_per_s"]
    report("maps: s a step, with loading", **{way: args.batch / r for way, r in rates.items()})
    report("maps: times tube's", **{way: rates["tube"] / r for way, r in rates.items()})


def bench_end(folder, args):
    """train.py over 340x256 videos."""
    toy.write_video(folder / "clip.mp4", footage(300, 256, 340), fps=30, options={"crf": "23"})
    for mask in ("tube", "mgm"):
        speed = train_speed(folder, {"video": "clip.mp4"}, 2 * args.repeats, args, "--mask", mask)
        report(f"end to end, {mask}", **speed)


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    flag = parser.add_argument
    flag("what", choices=("step", "load", "maps", "end", "all"), nargs="?", default="all")
    flag("--device", default="cuda" if CUDA else "cpu", help="of steps and maps")
    flag("--preset", default="base", choices=tgmae.PRESETS, help="of the model that is trained")
    flag("--batch", type=int, default=64 if CUDA else 2, help="clips a step")
    flag("--repeats", type=int, default=5, help="of which the median is taken")
    flag("--compile", action=runs.YES_NO, default=True, help="time compiled steps, too")
    flag("--json", type=Path, help="file for all results")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    processor = platform.processor() or platform.machine()
    report(
        "machine",
        device=torch.cuda.get_device_name() if args.device == "cuda" else processor,
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=torch.__version__,
        av=av.__version__,
    )
    parts = {"step": bench_step, "load": bench_load, "maps": bench_maps, "end": bench_end}
    for name in parts if args.what == "all" else [args.what]:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
