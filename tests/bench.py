"""Speed, against what one would use instead and against the floor: side by side, in turns, on the
same input, in one run; medians and their ratios. Run by hand, on an idle machine.

    python tests/bench.py step   # a training step, beside transformers' VideoMAE
    python tests/bench.py load   # from files to clips, beside decord, torchcodec, a bare decode
    python tests/bench.py maps   # text maps: what they cost, and what they save
    python tests/bench.py end    # train.py as it is: clips/s, and the share that waits for data
    python tests/bench.py all --json bench.json
"""

import argparse
import copy
import json
import os
import platform
import resource
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import captions
import dataset
import tgmae
import toy
import train

CUDA = torch.cuda.is_available()
results = []  # what --json keeps: a dict a line of output


def report(what, goal="", **numbers):
    """Prints a line of results, and keeps it."""
    results.append({"what": what, "goal": goal, **numbers})
    shown = "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in numbers.items()
    )
    print(f"{what:<44}{shown}{f'  (goal: {goal})' if goal else ''}", flush=True)


def seconds(function):
    began = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed(functions, repeats):
    """{name: function} -> {name: seconds of each round}: in turns, every other round in reverse,
    after one that warms up."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(functions[name]))
    return {name: taken[1:] for name, taken in times.items()}


def medians(times):
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(times, a, b):
    """The median over rounds of a's time over b's: a machine that slows down slows both."""
    return statistics.median(one / other for one, other in zip(times[a], times[b]))


def matrix_rate(args, dtype):
    """FLOP/s of a large matrix product, the fastest of several."""
    side = 8192 if args.device == "cuda" else 2048
    a = torch.randn(side, side, device=args.device, dtype=dtype)
    return 2 * side**3 / min(timed({"product": lambda: a @ a}, 4 * args.repeats)["product"])


# =================================================================================================
# step: forward, backward and optimizer.
# =================================================================================================

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product", "linear")


class Step:
    """A training step of a model on one batch. forward(model, video, mask) -> loss."""

    def __init__(self, model, forward, args):
        self.model, self.forward, self.args = model.to(args.device).train(), forward, args
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )

    def __call__(self, video, mask, amp):
        with torch.autocast(self.args.device, torch.bfloat16, enabled=amp):
            loss = self.forward(self.model, video, mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(args):
    """{name: Step}: ours, and transformers' with its two ways to compute attention."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    c = tgmae.PRESETS[args.preset]

    def theirs(attention):
        model = VideoMAEForPreTraining(
            VideoMAEConfig(
                image_size=c.image_size,
                num_frames=c.num_frames,
                patch_size=c.patch_size,
                tubelet_size=c.tubelet_size,
                hidden_size=c.embed_dim,
                num_hidden_layers=c.depth,
                num_attention_heads=c.num_heads,
                intermediate_size=int(c.embed_dim * c.mlp_ratio),
                decoder_hidden_size=c.decoder_embed_dim,
                decoder_num_hidden_layers=c.decoder_depth,
                decoder_num_attention_heads=c.decoder_num_heads,
                attn_implementation=attention,
                use_mean_pooling=False,
                decoder_intermediate_size=int(c.decoder_embed_dim * c.mlp_ratio),
            )
        )
        return Step(
            model, lambda m, video, mask: m(video.transpose(1, 2), bool_masked_pos=mask).loss, args
        )

    def ours(mode=None):
        torch.manual_seed(0)
        model = tgmae.TGMAE(c)
        model.predictor.requires_grad_(False)
        model.set_grad_checkpointing(mode == "checkpointing")
        if mode == "compiled":
            model.encoder.compile()
            model.decoder.compile()
        return Step(model, lambda m, video, mask: m(video, mask.cpu())["mae"], args)

    made = {
        "ours": ours(),
        "sdpa": theirs("sdpa"),
        "eager": theirs("eager"),
        "checkpointing": ours("checkpointing"),
    }
    if args.compile:
        made["ours compiled"], made["sdpa compiled"] = ours("compiled"), theirs("sdpa")
        made["sdpa compiled"].model.compile()
    return made


def batch_of(args, size, ratio):
    c = tgmae.PRESETS[args.preset]
    video = torch.randn(size, 3, c.num_frames, c.image_size, c.image_size, device=args.device)
    mask = tgmae.topk_mask(tgmae.tube_scores(size, c.grid), ratio)
    return video, mask


def count_flops(step, video, mask):
    """Of forward and backward. The plain attention, since the counter does not know all the fused
    ones."""
    model = copy.deepcopy(step.model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.forward(model, video, mask).backward()
    return counter.get_total_flops()


def peak_memory(step, function, args):
    """GiB of tensors at the most: parameters, optimizer, and what the step allocates."""
    params = list(step.model.parameters())
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in [*params, *states])
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (held + torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return (held + peak) / 2**30


def share_outside_products(function, args):
    """The fraction of a step's time that is not spent in matrix products (attention is one)."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=kinds) as record:
        function()
    name = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    times = {e.key: getattr(e, name) for e in record.key_averages() if e.key.startswith("aten::")}
    inside = sum(t for key, t in times.items() if any(part in key for part in PRODUCTS))
    return 1 - inside / sum(times.values())


def bench_step(folder, args):
    made, times = steps(args), {}
    rates = {
        amp: matrix_rate(args, torch.bfloat16 if amp else torch.float32) for amp in (False, True)
    }
    report("matrix rate, TFLOP/s", fp32=rates[False] / 1e12, bf16=rates[True] / 1e12)
    for mask_ratio in sorted(set(tgmae.MASK_RATIOS.values()), reverse=True):
        video, mask = batch_of(args, args.batch, mask_ratio)
        flops = count_flops(made["ours"], video, mask)
        for amp in (False, True):
            name = f"step {mask_ratio} {'bf16' if amp else 'fp32'}"
            names = ["ours", "sdpa", "eager"]
            if mask_ratio == 0.9:  # what is compiled is compiled for one shape
                names += ["checkpointing"] + ["ours compiled", "sdpa compiled"] * args.compile
            ways = {way: (lambda step=made[way]: step(video, mask, amp)) for way in names}
            t = times[mask_ratio, amp] = timed(ways, args.repeats)
            report(f"{name}: clips/s", **{way: args.batch / s for way, s in medians(t).items()})
            goal = (
                "sdpa 1.3, eager 2, compiled 1.05" if args.device == "cuda" else "sdpa 1, eager 1.4"
            )
            faster = {"sdpa": ratio(t, "sdpa", "ours"), "eager": ratio(t, "eager", "ours")}
            if "ours compiled" in t:
                faster["both compiled"] = ratio(t, "sdpa compiled", "ours compiled")
            report(f"{name}: times as fast as", goal, **faster)
            share = flops / medians(t)["ours"] / rates[amp]
            outside = share_outside_products(ways["ours"], args)
            report(
                f"{name}: of the matrix rate",
                ours=share,
                TFLOP=flops / 1e12,
                outside_products=outside,
            )
            if "checkpointing" in t:
                memory = {
                    way: args.batch / peak_memory(made[way], ways[way], args) for way in names[:4]
                }
                report(f"{name}: clips per GiB", "ours >= sdpa", **memory)
                report(
                    f"{name}: checkpointing takes", times_as_long=ratio(t, "checkpointing", "ours")
                )
    if tgmae.bf16_is_fast(args.device):
        gain = {
            f"at {r}": medians(t)["ours"] / medians(times[r, True])["ours"]
            for (r, amp), t in times.items()
            if not amp
        }
        report("step: bf16 over fp32", "1.45 on a CPU", **gain)
    ways = {}
    for size in (32, 64, 128) if args.device == "cuda" else (2, 4, 8):
        batch = batch_of(args, size, 0.9)
        ways[size] = lambda batch=batch: made["ours"](*batch, tgmae.bf16_is_fast(args.device))
    per_clip = {str(size): 1e3 * s / size for size, s in medians(timed(ways, args.repeats)).items()}
    report("step 0.9: ms a clip, by batch", "flat within 10%", **per_clip)


# =================================================================================================
# load: from files to clips.
# =================================================================================================


def footage(frames, height, width):
    """Frames (F,H,W,3) uint8 of about what a camera sees: it pans over texture of all scales, a
    thing moves in front, and there is a little noise."""
    g = torch.Generator().manual_seed(0)

    def texture(h, w, spread):
        scales = [2**i for i in range(1, 7) if 2**i < min(h, w) / 2]
        parts = [
            F.interpolate(torch.randn(1, 3, h // s, w // s, generator=g), (h, w), mode="bicubic")
            * s**0.7
            for s in scales
        ]
        total = sum(parts)[0]
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


def with_decord(path, start, crop):
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    resized(torch.from_numpy(reader.get_batch(range(start, start + SPAN, STRIDE)).asnumpy()), crop)


def with_torchcodec(path, start, crop):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    resized(decoder.get_frames_at(list(range(start, start + SPAN, STRIDE))).data, crop)


def bare_decode(path, start, crop):
    """libav from the nearest key frame on, frames thrown away."""
    (index,) = dataset._INDICES.values()  # whoever came before has counted the frames
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(index.pts[index.keys[index.keys <= start][-1]]), stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= index.pts[start + SPAN - STRIDE]:
                break


def others():
    """{name: loader} of those that are installed and work; a line for those that do not."""
    found = {}
    for name, loader in (("decord", with_decord), ("torchcodec", with_torchcodec)):
        try:
            __import__({"torchcodec": "torchcodec.decoders"}.get(name, name))
            found[name] = loader
        except Exception as error:  # torchcodec: RuntimeError where FFmpeg's libraries are missing
            print(f"{name}: skipped, {str(error).strip().splitlines()[0]}")
    return found


def bench_load(folder, args):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    rng = np.random.default_rng(0)
    ways = {
        "ours": ours,
        "motion": lambda *a: ours(*a, motion=True),
        "bare decode": bare_decode,
        **others(),
    }
    avi = ("avi", "mpeg4", {"g": "250", "bf": "2", "b": "800000"})  # as XviD
    mp4 = [("mp4", "libx264", {"crf": "23", "g": str(gop)}) for gop in (250, 12)]
    for height, width in ((256, 340), (360, 640), (720, 1280)):
        clip = footage(300, height, width)
        for kind, codec, options in [*mp4, avi]:
            gop = options["g"]
            path = folder / f"{height}-{gop}.{kind}"
            toy.write_video(path, clip, fps=30, codec=codec, options=options)
            crop = dataset.Crop(
                height // 16, width // 8, int(0.875 * height), int(0.875 * height), True
            )
            each = [
                medians(
                    timed(
                        {n: (lambda w=w: w(path, start, crop)) for n, w in ways.items()},
                        args.repeats,
                    )
                )
                for start in rng.integers(0, 300 - SPAN, 8).tolist()
            ]
            s = {n: statistics.mean(times[n] for times in each) for n in ways}
            name, rivals = (
                f"load {width}x{height} {kind} GOP {gop}",
                [n for n in s if n in ("decord", "torchcodec")],
            )
            kbit = path.stat().st_size // 1250
            report(f"{name}: ms a clip", kbit_s=kbit, **{n: 1e3 * t for n, t in s.items()})
            report(f"{name}: times as fast as", **{n: s[n] / s["ours"] for n in rivals})
            report(f"{name}: motion takes", "1.15", times_as_long=s["motion"] / s["ours"])
            report(f"{name}: over bare decode", "1.5", times_as_long=s["ours"] / s["bare decode"])
            repeats(path, name, args)
    growth(folder, args)
    torch.set_num_threads(threads)


def manifest_of(path, count, **record):
    """A manifest that has one video `count` times."""
    manifest = path.with_suffix(".jsonl")
    manifest.write_text((json.dumps({"video": path.name, **record}) + "\n") * count)
    return manifest


def clips_of(path, count, *flags):
    manifest = manifest_of(path, count)
    args = train.parse_args(["--data", str(manifest), *map(str, flags)])
    return train.Clips(dataset.read_manifest(manifest), tgmae.PRESETS["base"], args, text_from=None)


def repeats(path, name, args):
    """--repeat 4: clips of one decode, in the time of clips of one each."""
    ways = {}
    for n in (1, 4):
        data = clips_of(path, 8, "--repeat", n, "--batch-size", n)
        ways[n] = lambda data=data: [data[0, i] for i in range(8)]
    report(
        f"{name}: --repeat 4",
        "2, 2.5 at 720p",
        times_the_clips=4 * ratio(timed(ways, args.repeats), 1, 4),
    )


def growth(folder, args):
    """Loader processes, and memory over many clips."""
    data = clips_of(folder / "256-12.mp4", 100)

    def read(workers):
        samples = [(0, i) for i in range(len(data))]
        for _ in DataLoader(
            data, 4, sampler=samples, num_workers=workers, collate_fn=train.collate
        ):
            pass

    times = timed({n: (lambda n=n: read(n)) for n in (1, 2)}, args.repeats)
    report("load 340x256: 2 workers over 1", "1.4 on 2 cores", times_the_clips=ratio(times, 1, 2))
    sizes = {}
    for i in range(args.clips):
        data[i, i % 100]
        if (i + 1) % (args.clips // 5) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes[f"after {i + 1}"] = pages * resource.getpagesize() // 2**20
    report("load 340x256: resident MiB", "flat", **sizes)


# =================================================================================================
# maps, and train.py as a whole.
# =================================================================================================


def untrained_clip(folder, name):
    """A CLIP with random weights: the toy one as a folder, or open_clip's architecture of that name
    in a file."""
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


def loading_step(data, mask, args, *flags):
    """-> function that loads a batch (in this process, so that nothing hides behind something else)
    and takes a training step with it, everything at mask ratio 0.6, MAE + VT."""
    words = f"--data {data} --mask {mask} --mask-ratio 0.6 --vt --batch-size {args.batch}"
    words += f" --preset {args.preset}"
    made = train.parse_args([*words.split(), "--device", args.device, *flags])
    train.start_processes(made)
    records, _, text = train.load_data(made)
    model, clip = train.build_model(made, text, records[0])
    clips, optimizer = (
        train.Clips(records, model.config, made, text_from=text),
        train.make_optimizer(model, made),
    )

    def step():
        batch = train.collate([clips[0, i] for i in range(args.batch)])
        video, mask, text = train.prepare(batch, clip, made, model.config)
        with torch.autocast(made.device, torch.bfloat16, enabled=made.amp):
            out = model(video, mask, text)
        (out["mae"] + out["vt"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def bench_maps(folder, args):
    """Patches a second with ViT-B/32 against the matrix rate; then steps of tube, TGM from maps,
    TGM online."""
    toy.write_video(folder / "clip.mp4", footage(120, 240, 320), fps=30, options={"crf": "23"})
    online = untrained_clip(folder, "ViT-B-32-quickgelu")
    clip = tgmae.load_clip(*online[1::2], args.device)
    text = tgmae.encode_text(*clip, ["a"])
    frames = torch.randint(256, (1 if args.device == "cpu" else 16, 3, 224, 304), dtype=torch.uint8)
    weights = next(clip[0].visual.parameters())
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # in which the counter does not see the matrix products
    with FlopCounterMode(display=False) as counter:
        clip[0].encode_image(weights.new_zeros(1, 3, 224, 224))
    torch.backends.mha.set_fastpath_enabled(True)
    bound = matrix_rate(args, weights.dtype) / counter.get_total_flops()
    made = lambda: captions.similarity_map(clip[0], frames, text, 16, args.device)  # noqa: E731
    rate = len(frames) * 14 * 19 / medians(timed({"maps": made}, args.repeats))["maps"]
    report(
        "maps: patches/s",
        "60%",
        ours=rate,
        of_the_bound=rate / bound,
        precision=str(weights.dtype)[6:],
    )

    data = manifest_of(folder / "clip.mp4", args.batch, captions=["a person", "a dog", "a bicycle"])
    copied = folder / "maps.jsonl"
    copied.write_text(data.read_text())
    captions.main(["maps", str(copied), *untrained_clip(folder, "toy")])
    with torch.enable_grad():
        ways = {
            "tube": loading_step(copied, "tube", args),
            "maps": loading_step(copied, "tgm", args),
        }
        times = timed(ways, args.repeats)
        slow = medians(timed({"online": loading_step(data, "tgm", args, *online)}, 1))
    s = medians(times) | slow
    report("maps: s a step, with loading", **s)
    report(
        "maps: times tube's",
        "maps 1.05",
        maps=ratio(times, "maps", "tube"),
        online=s["online"] / s["tube"],
    )


def bench_end(folder, args):
    """train.py over 340x256 videos."""
    toy.write_video(folder / "clip.mp4", footage(300, 256, 340), fps=30, options={"crf": "23"})
    data = manifest_of(folder / "clip.mp4", args.batch * (args.repeats + 3))
    for mask in ("tube", "mgm"):
        words = f"--data {data} --mask {mask} --preset {args.preset} --batch-size {args.batch}"
        words += " --epochs 1 --warmup-epochs 0"
        train.main([*words.split(), "--device", args.device, "--out", str(folder / mask)])
        lines = [
            json.loads(line) for line in (folder / mask / "log.jsonl").read_text().splitlines()
        ][2:-1]
        numbers = {
            name: statistics.median(line[name] for line in lines)
            for name in ("clips_per_s", "wait")
        }
        report(f"end to end, {mask}", **numbers)


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument(
        "what", choices=("step", "load", "maps", "end", "all"), nargs="?", default="all"
    )
    parser.add_argument(
        "--device",
        default="cuda" if CUDA else "cpu",
        choices=("cpu", "cuda"),
        help="of steps and maps",
    )
    parser.add_argument(
        "--preset", default="base", choices=tgmae.PRESETS, help="of the model that is trained"
    )
    parser.add_argument("--batch", type=int, default=64 if CUDA else 2, help="clips a step")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--clips", type=int, default=500, help="to read while memory is watched")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time compiled steps, too",
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    report(
        "machine",
        device=machine,
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
