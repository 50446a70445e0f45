"""Pre-trains a (text-guided) video masked autoencoder.

    torchrun train.py --mask tgm --vt                      # toy world: no download, any machine
    torchrun --nproc_per_node 8 train.py --data k400.jsonl --preset base --mask tgm --vt

Loss = MAE + vt_weight * VT (3.5). The paper's eight runs (Table 2): --mask tube|mgm|tgm, with
nothing more (MAE), with --vt (MAE + VT), with --vt --no-mae (VT).

The first command builds the toy world (data/toy) and ends by itself in under five minutes on two
CPU cores; the MAE loss ends near 0.8 (1.0 is predicting each cube's mean) and samples.png shows
clip, mask and reconstruction. Run again, any command goes on from where its last checkpoint stands.

What happens in a step is read in `train`, from top to bottom; what a sample is in `Clips`.
"""

import argparse
import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing as mp
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

# Loader processes share the cores with us: threads without work must sleep, not spin. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import dataset
import tgmae
import weights
from tgmae import MASK_RATIOS, PRESETS

TOY = {"preset": "toy", "epochs": 14, "warmup_epochs": 1.0, "batch_size": 16, "blr": 0.016,
       "min_lr": 1e-4, "flip": False, "clip": "local-dir:data/toy/clip"}  # fmt: skip
REAL = {"preset": "base", "epochs": 200, "warmup_epochs": 40.0, "batch_size": 64, "blr": 1.5e-4,
        "min_lr": 1e-5, "flip": True, "clip": "ViT-B-32-quickgelu"}  # fmt: skip

# ==================================================================================================
# What fine-tuning (eval.py) and captions.py share with this script: processes, schedule, the stream
# of batches, the run folder, errors in a line.
# ==================================================================================================


def end_loaders():
    """At exit: multiprocessing asks loaders that are left to end, by SIGTERM, which they ignore,
    and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for child in mp.active_children():
        if child.daemon:
            child.kill()


def rank_and_world():
    """(rank, world size) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def usable_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_processes(args, backend=None, timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if it is torchrun that started us; settles args.device
    ("auto"), args.amp and args.workers (None). -> rank, world size. The first process may need
    `timeout` to build the toy world."""
    if args.device == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        args.device = next((name for name in there if there[name]), "cpu")
    try:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if args.device == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("there is none here")  # torch says it in 7,777 characters
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch is built without CUDA
        raise ValueError(f"--device {args.device}: {weights.first_line(error)}") from error
    if args.amp is None:
        args.amp = weights.bf16_is_fast(args.device)
    if getattr(args, "workers", 0) is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = max(1, min(8, usable_cores() // processes))
    atexit.register(end_loaders)
    # What is to replace it in DDP is not in torch 2.11.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = backend or ("nccl" if args.device == "cuda" else "gloo")
        dist.init_process_group(backend, timeout=timeout)
    return rank_and_world()


def gather_objects(mine):
    """What each process holds, in order of ranks. Waits for all."""
    parts = [mine] * rank_and_world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    return parts


def sum_over_ranks(numbers):
    """(n,) of this process -> the sums over all, a list."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def say(line):
    """Of process 0."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def manifest_of(data):
    """For --data of the scripts: the path of a manifest, or "toy": the world in data/toy, which the
    first process makes where it is not there yet."""
    if data != "toy":
        return Path(data)
    if rank_and_world()[0] == 0:
        import toy

        toy.build("data/toy")
    gather_objects("a barrier: it is there")
    return Path("data/toy/manifest.jsonl")


def progress(*args, **more):
    """A tqdm bar; where it goes to a file, a line every ten seconds."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 10, **more)


def seed_of(*numbers):
    """A seed that follows from the numbers alone: those of the run, the epoch, the sample, ..."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(step, warmup, total, peak, last, first=0.0):
    """-> the rate of `step`, counted from 0, of `total`: `warmup` steps linear from `first` to
    `peak`, then a cosine to `last`, as VideoMAE's cosine_scheduler."""
    if step < warmup:
        return first + (peak - first) * step / max(1, warmup - 1)
    half_turn = math.pi * (step - warmup) / max(1, total - warmup)
    return last + (peak - last) * 0.5 * (1 + math.cos(half_turn))


def last_line(error):
    """What an exception says, in one line: a loader process puts its traceback in front of the
    message."""
    if isinstance(error, torch.OutOfMemoryError):  # followed by a page of advice
        return ". ".join(str(error).split(". ")[:2])
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    text += "; `ulimit -n 65536` allows more" * (os.strerror(errno.EMFILE) in text)
    return text.removeprefix("dataset.VideoError: ").removeprefix("ValueError: ")


@contextlib.contextmanager
def one_line_errors(script, less):
    """For a script's main: a user's mistake is one line and exit code 1, and so is a lack of
    memory, with what needs `less`, or of a compiler; anything else keeps its traceback. Names that
    are no UTF-8 can be printed."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: {last_line(error)}; what needs less: {less}")
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # it has said why, or the kernel's log does
            sys.exit(f"{script}: {last_line(error)}")
        if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            way = "leave it out, or install what it needs: g++, and triton for a GPU"
            sys.exit(f"{script}: --compile: {weights.first_line(error)}; {way}")
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {last_line(error)}")
    if dist.is_initialized():  # after an error the other processes may stand in a collective
        dist.destroy_process_group()


WORKERS = "loader processes per process; its share of the CPU cores, at most 8"  # of --workers
YES_NO = argparse.BooleanOptionalAction  # --flag and --no-flag


def add_flag(parser, name, default, help, **more):
    """A flag of the type of its default, which is said behind its help; where it is None, help has
    it in words."""
    if default is None:
        help += "%(default).0s"  # no character of it, else argparse adds "(default: None)"
    if isinstance(default, bool):
        more["action"] = YES_NO
    elif isinstance(default, int | float):
        more["type"] = type(default)
    parser.add_argument(name, default=default, help=help, **more)


def check_flags(args, *, positive=(), not_negative=()):
    """ValueError that names the first of these flags, of those that there are, with a value that
    cannot be."""
    if getattr(args, "seed", 0) >= 2**32:
        raise ValueError(
            f"--seed {args.seed}: must be below 2**32: torch would draw as for a smaller one"
        )
    for name in (*positive, *not_negative):
        value = getattr(args, name, None)
        if value is not None and (value < 0 or value == 0 and name in positive):
            must = "be positive" if name in positive else "not be negative"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must {must}")


# ------------------------------------------------------------------ samples, loaders, steps

MAX_REPLACEMENTS = 100  # bad videos in a row before all are thought to be bad


class TrainingClips(torch.utils.data.Dataset):
    """A dataset of (epoch, index) -> sample. A subclass has load(place, seed), which makes a dict
    of record number `place`; the seed follows from (the run's seed, epoch, index) alone, never from
    a worker's history, so a run that is resumed sees the same samples. A video that cannot be read
    gives its place to another, drawn from the same numbers; the sample's "bad" lists [(video, why),
    ...]. replace_bad=False: the sample is {"unreadable": that list} instead."""

    def __init__(self, records, seed, *, replace_bad=True):
        self.records, self.run_seed, self.replace_bad = records, seed, replace_bad
        self.attempts = min(len(records), MAX_REPLACEMENTS) if replace_bad else 1

    def __len__(self):
        return len(self.records)

    def _places(self, epoch, index):
        """`index`, then the others in random order."""
        yield index
        generator = torch.Generator().manual_seed(seed_of(self.run_seed, epoch, index, 0))
        others = torch.randperm(len(self), generator=generator).tolist()
        yield from (place for place in others if place != index)

    def __getitem__(self, epoch_and_index):
        (epoch, index), bad = epoch_and_index, []
        for place in itertools.islice(self._places(epoch, index), self.attempts):
            try:
                return {**self.load(place, seed_of(self.run_seed, epoch, index, 1)), "bad": bad}
            except dataset.VideoError as error:
                record = self.records[place]
                part = [f"{key} {record[key]} s" for key in ("start", "end") if key in record]
                bad.append((", ".join([record["video"], *part]), str(error)))
        if not self.replace_bad:
            return {"unreadable": bad}
        raise dataset.VideoError(
            f"{len(bad)} video(s) in a row cannot be read, the last: {bad[-1][1]}"
        )


def init_loader(_=None):
    """worker_init_fn of loader processes. They do not listen to SIGTERM: a scheduler sends it to
    all processes of a run, which needs its loaders until it has saved. A loader that cannot hand
    over a batch, or has lost its run, exits; torch then ends the run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
        os._exit(1)  # the run was killed before; torch watches whomever it finds as parent

    def end(error):
        print(f"loader: a batch cannot be handed over: {last_line(error)}", file=sys.stderr)
        os._exit(1)

    # multiprocessing itself would print why (no shared memory, no open file), and go on without the
    # batch: these are called by the thread that sends batches, and the one that sends their files.
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: end(error))
    sys.excepthook = lambda kind, error, trace: end(error)


SHM = Path("/dev/shm")  # where loaders put batches


def fit_loaders(workers, batch):
    """-> (loader processes, batches that each has ready): `workers` and 2, or as many as fit into
    free shared memory, with `batch` bytes a batch. ValueError if not even one does. Before any
    process of the machine starts its loaders."""
    free = shutil.disk_usage(SHM).free if SHM.exists() else sys.maxsize
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = free // batch - 2  # one more is handed over, one in use
    if not workers or room >= 2 * workers:
        return workers, 2
    has = f"{SHM} has {free / 1e6:,.1f} MB free for each process"
    ways = "docker run --shm-size=... or --ipc=host, a smaller --batch-size, --workers 0"
    if room < 1:
        need = f"one loader needs {3 * batch / 1e6:,.1f} MB for its batches"
        raise ValueError(f"--workers {workers}: {has}, {need}: {ways}")
    fewer = min(workers, room)
    now = f"{fewer} loaders instead of {workers}, each one batch ahead"
    say(f"note    {has}, a batch takes {batch / 1e6:,.1f} MB: {now}. For more: {ways}")
    return fewer, 1


PATIENCE, GRACE = 30 * 60, 20  # seconds to wait for a batch; once SIGTERM has come
_stop = {"asked": False}


def ask_to_stop(*_):
    """At SIGTERM: the run will save and stop after this step."""
    _stop["asked"] = True
    if signal.alarm(0):  # a batch is awaited
        signal.alarm(GRACE)


def asked_to_stop():
    return _stop["asked"]


def no_batch(*_):
    """At SIGALRM, while a batch is awaited."""
    came, seconds = ("SIGTERM came, and ", GRACE) if asked_to_stop() else ("", PATIENCE)
    raise TimeoutError(f"{came}no batch for {seconds} s: ended without saving")


def batches_of(data, loaders, **more):
    """Yields the batches of a DataLoader; loaders: see fit_loaders. TimeoutError if one does not
    come."""
    workers, ahead = loaders
    more |= {"worker_init_fn": init_loader, "prefetch_factor": ahead} if workers else {}
    stream = iter(DataLoader(data, num_workers=workers, **more))
    signal.signal(signal.SIGALRM, no_batch)
    while True:
        signal.alarm(PATIENCE)
        if asked_to_stop():  # asked after the alarm is set: SIGTERM may come at any moment
            signal.alarm(GRACE)
        try:
            batch = next(stream)
        except StopIteration:
            return
        except TimeoutError:
            end_loaders()  # they might not listen
            raise
        finally:
            signal.alarm(0)
        yield batch


def clip_bytes(config):
    return 3 * config.num_frames * config.image_size**2


def share_step(forward, accum, videos=None):
    """-> videos of a step, videos of a process in a forward, forwards. The processes that there are
    share a step of `accum` forwards of `forward` videos each, or, where a run goes on, of the
    `videos` that its steps had, at most `forward` at a time. What cannot be split evenly is left
    out of every step. More processes than videos: ValueError."""
    _, world = rank_and_world()
    videos = videos or forward * accum * world
    mine = videos // world
    if not mine:
        raise ValueError(f"{world} processes cannot share a step of {videos} video(s)")
    accum = -(-mine // forward)
    return videos, mine // accum, accum


def steps(data, share, args, start, collate, loaders):
    """Yields (step, batches): a run's steps from number `start` to the end of its last epoch, each
    with this process's batches, which say how many seconds they were "waited" for. An epoch's order
    follows from the seed alone, whatever the number of processes. The loader processes are the same
    all along. share, loaders: of share_step, of fit_loaders."""
    (rank, world), (videos, forward, accum) = rank_and_world(), share
    steps_per_epoch = len(data) // videos

    def order():
        for epoch in range(start // steps_per_epoch, args.epochs):
            generator = torch.Generator().manual_seed(args.seed + epoch)
            indices = torch.randperm(len(data), generator=generator).tolist()
            for place in range(max(0, start - epoch * steps_per_epoch), steps_per_epoch):
                mine = indices[place * videos : (place + 1) * videos][rank::world]
                yield from ((epoch, index) for index in mine[: forward * accum])

    how = {"batch_size": forward, "sampler": order(), "collate_fn": collate}
    stream = batches_of(data, loaders, **how, pin_memory=args.device == "cuda")

    def awaited():
        for _ in range(accum):
            asked = time.perf_counter()
            yield next(stream) | {"waited": time.perf_counter() - asked}

    for step in range(start, args.epochs * steps_per_epoch):
        yield step, awaited()


def synchronised(net, last):
    """Gradients are averaged over processes in the last of a step's backwards, for all of them."""
    alone = not isinstance(net, DistributedDataParallel)
    return contextlib.nullcontext() if alone or last else net.no_sync()


# ------------------------------------------------------------------ the run folder


@contextlib.contextmanager
def naming(path):
    """Within it what is raised of a full disk, or another one that cannot be written to, is an
    OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save puts a RuntimeError, which says nothing of the disk, over the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"{path}: cannot be written: {reason}") from error


@contextlib.contextmanager
def replacing(path, mode="wb", **more):
    """Yields a file beside `path` to write to, then flushes and renames it: whatever happens,
    `path` is whole."""
    partial = Path(f"{path}.partial")
    with naming(path):
        try:
            with open(partial, mode, **more) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_checkpoint(path, **state):
    with replacing(path) as file:
        torch.save(state, file)


def append(path, text):
    # Names that are no UTF-8 stay what they are.
    with naming(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def append_log(path, line):
    """Adds a dict to a file of JSON lines, in which a number that is not finite is null."""
    odd = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    append(path, json.dumps(line | odd) + "\n")


def list_bad(path, bad):
    """Lists videos that could not be read, once each, with the reason."""
    if bad:
        how = {"encoding": "utf-8", "errors": "surrogateescape"}
        known = path.read_text(**how) if path.exists() else ""
        new = {video: why for video, why in bad if f"\n{video}\t" not in f"\n{known}"}
        append(path, "".join(f"{video}\t{why}\n" for video, why in new.items()))


def lock_folder(out):
    """Makes the run folder. -> a file, for process 0, that holds a lock as long as it is open: the
    kernel frees it with its owner, and loaders do not inherit it. ValueError if another run has
    it."""
    out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0]:
        return contextlib.nullcontext()
    lock = open(out / "lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{out}: another run is writing there; another --out") from error
    except OSError as error:  # file systems without locks
        note = f"note    {lock.name}: {error.strerror}; nothing keeps a second run out"
        print(note, file=sys.stderr)
    return lock


def load_last(args):
    """The checkpoint from which the run in --out goes on, None if it begins. The same one for all
    processes: a ValueError where a machine sees another."""
    path = Path(args.out) / "last.pt"
    saved = weights.load_file(path) if args.resume and path.exists() else None
    if saved and not {"args", "step", "videos"} <= saved.keys():
        ways = "another --out, or --no-resume"
        raise ValueError(f"{path}: not a checkpoint that a run goes on from; {ways}")
    found = gather_objects(saved["step"] if saved else 0)
    if len(set(found)) > 1:
        here = f"{path}: holds step {found[rank_and_world()[0]]} here, {found[0]} for process 0"
        raise ValueError(f"{here}: machines share --out")
    return saved


# What the machine decides, anew each time; and all that a run may change when it goes on.
OF_MACHINE = ("workers", "device", "out", "resume", "json", "world", "torch")
MAY_CHANGE = (*OF_MACHINE, "amp", "compile", "grad_checkpointing", "save_minutes", "val_split",
              "test_split", "views", "view_grid", "batch_size", "accum", "clip_given")  # fmt: skip
# Flags that say where something is: compared by a digest of it, if the checkpoint has one.
BY_CONTENT = {"data": "records", "init": "init_weights", "checkpoint": "init_weights",
              "clip": "clip_weights", "clip_pretrained": "clip_weights"}  # fmt: skip


def parse_like_run(parser, parse, args):
    """Parses again, where the run in --out goes on: its flags are the defaults, so that only flags
    that are typed can differ from it. parser: the one that has the flags. -> args, with `typed`,
    the names of what was typed."""
    then = weights.flags_of(Path(args.out) / "last.pt") if args.resume else {}
    if then:
        own = vars(args).keys() - OF_MACHINE
        parser.set_defaults(**{name: value for name, value in then.items() if name in own})
        args = parse()
    untyped = object()
    parser.set_defaults(**dict.fromkeys(vars(args), untyped))
    args.typed = {name for name, value in vars(parse()).items() if value is not untyped}
    return args


def digest_of_records(records, keys):
    """A digest of what a run learns from: these keys of its records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.get(key) for key in keys]).encode())
    return digest.hexdigest()[:16]


def digest_of_weights(source, goes_on):
    """{"init_weights": digest of those in `source`}. A run that goes on does without it if they are
    gone."""
    try:
        _, state, _ = weights.load_checkpoint(source)
    except ValueError as error:
        if not goes_on:
            raise
        say(f"note    the run goes on, not compared with the weights that it began with: {error}")
        return {}
    return {"init_weights": weights.digest(state)}


def refuse_another_run(args, saved, now, defaults):
    """ValueError that lists what is other than in the run in --out, a checkpoint of which is saved.
    now: flags, sizes of the model, digests. What the checkpoint lacks was at its default."""
    then, changed = defaults | saved["args"] | saved["config"], []
    for name in sorted(then.keys() & now.keys() - set(MAY_CHANGE)):
        was, value = then[name], now[name]
        if BY_CONTENT.get(name) in then:
            continue
        if name in ("data", "init", "checkpoint"):
            was, value = os.path.realpath(str(was)), os.path.realpath(str(value))
        if was != value:
            changed.append(f"{name} {str(was)[:200]} -> {str(value)[:200]}")
    step, was = (of["batch_size"] * of["accum"] for of in (now, then))
    if step != was and now["world"] == then.get("world"):
        changed.append(f"batch_size x accum {was} -> {step}")
    if changed:
        raise ValueError(
            f"{args.out}/last.pt is of another run ({', '.join(changed)}): --no-resume starts "
            f"over; another --out begins a new run, with --init {args.out}/last.pt from its weights"
        )


def set_aside(out):
    """A new run does not go on from what an old one has left."""
    for name in ("last.pt", "best.pt"):
        if (out / name).exists():
            os.replace(out / name, out / f"{name}.old")


def cut_log(path, step):
    """Drops what comes after `step`: it will be taken again. -> the last line left, a dict."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(path, "w") as file:
        file.writelines(kept)
    return json.loads(kept[-1]) if kept else {}


def listen():
    """From here on SIGTERM asks to stop."""
    _stop["asked"] = False
    signal.signal(signal.SIGTERM, ask_to_stop)


def leave(out, saved, unfinished):
    """After the last step: nothing listens to SIGTERM any more. A run that it has stopped exits as
    if it had ended it. saved: the step of last.pt."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gather_objects("a barrier: process 0 has written")
    if unfinished:
        if rank_and_world()[0] == 0:
            print(f"stopped by SIGTERM; {out}/last.pt holds step {saved}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


MAX_NON_FINITE = 10  # steps in a row without finite numbers before a run stops


def left_out(step, in_a_row, names):
    """Says of which videos this process has numbers that are not finite. ValueError after too many
    steps in a row."""
    if names:
        print(f"note    step {step}: not finite, left out: {', '.join(names)}", file=sys.stderr)
    if in_a_row == MAX_NON_FINITE:
        raise ValueError(f"step {step}: {in_a_row} in a row without a finite loss and gradient")


# ==================================================================================================
# Command line.
# ==================================================================================================


def check_args(args):
    check_flags(
        args,
        positive=("epochs", "batch_size", "accum", "repeat", "stride", "temperature", "num_frames",
                  "image_size"),
        not_negative=("num_captions", "blr", "min_lr", "weight_decay", "clip_grad", "workers",
                      "seed", "save_minutes"),
    )  # fmt: skip
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask-ratio {args.mask_ratio}: must lie between 0 and 1")
    side, time = PRESETS[args.preset].patch_size, PRESETS[args.preset].tubelet_size
    if (args.image_size or 0) % side:
        raise ValueError(f"--image-size {args.image_size}: must be a multiple of {side}")
    if (args.num_frames or 0) % time:
        raise ValueError(f"--num-frames {args.num_frames}: must be a multiple of {time}")
    if not (args.mae or args.vt):
        raise ValueError("--no-mae without --vt leaves nothing to optimise")
    if args.batch_size % args.repeat:
        indivisible = f"is not divisible by --repeat {args.repeat}"
        raise ValueError(f"--batch-size {args.batch_size} {indivisible}")
    if not 0 <= args.warmup_epochs <= args.epochs:
        most = args.epochs
        raise ValueError(f"--warmup-epochs {args.warmup_epochs}: must lie in 0 to --epochs {most}")


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    flag = functools.partial(add_flag, parser)

    def either(name, help, **more):  # defaults depend on the data
        key = name[2:].replace("-", "_")
        flag(name, TOY[key], f"{help}; for other data than toy {REAL[key]}", **more)

    flag("--data", "toy", "toy, or a manifest (JSON lines, see captions.py)")
    flag("--split", "train", "split of the manifest to train on")
    flag("--val-split", None, "split for held-out losses after each epoch")
    either("--preset", "size of the model", choices=PRESETS)
    flag("--num-frames", None, "frames of a clip; the preset's", type=int)
    flag("--image-size", None, "pixels of a clip's side; the preset's", type=int)
    flag("--mask", "tube", "noise, most motion, or most like the caption", choices=MASK_RATIOS)
    flag("--mask-ratio", None, f"share of cubes masked; {MASK_RATIOS}", type=float)
    flag("--bottom-k", False, "mask the lowest scores instead of the highest")
    flag("--vt", False, "optimise the video-text contrastive loss")
    flag("--mae", True, "optimise the reconstruction loss")
    flag("--vt-weight", 1.0, "weight of the contrastive loss")
    flag("--temperature", 0.07, "of the contrastive loss")
    clips = "open_clip model, hf-hub:NAME or local-dir:FOLDER; if given, vt is at least watched"
    flag("--clip", None, f"{clips}; {TOY['clip']}, or {REAL['clip']}")
    flag("--clip-pretrained", "openai", "tag of open_clip, or a file of weights")
    flag("--num-captions", 0, "captions to draw from, evenly spread; 0: all")
    flag("--init", None, "checkpoint to start from: ours, VideoMAE's, transformers'")
    flag("--grad-checkpointing", False, "less memory for about a third more time")
    either("--epochs", "passes over the data")
    either("--warmup-epochs", "epochs of linear warm-up")
    either("--batch-size", "clips per process and forward")
    flag("--accum", 1, "forwards per step")
    flag("--repeat", 1, "clips of the same frames: crop, mask and caption of their own")
    either("--blr", "learning rate per 256 clips of global batch")
    either("--min-lr", "last learning rate per 256 clips")
    flag("--weight-decay", 0.05, "of AdamW, on matrices only")
    flag("--clip-grad", 0.0, "largest gradient norm; 0: no limit")
    flag("--stride", 4, "frames from one frame of a clip to the next")
    either("--flip", "mirror half the clips")
    flag("--workers", None, WORKERS, type=int)
    flag("--device", "auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    flag("--amp", None, "bf16 autocast; where the hardware has it", action=YES_NO)
    flag("--compile", False, "torch.compile encoder and decoder")
    flag("--seed", 0, "of weights, order, crops and masks")
    flag("--out", None, "run folder; runs/DATA-MASK...")
    flag("--save-minutes", 10.0, "minutes between checkpoints; 0: none between epochs")
    flag("--resume", True, "go on from the run folder's last.pt")

    first = parser.parse_args(argv)
    defaults = TOY if first.data == "toy" else REAL
    words = [Path(first.data).stem, first.mask] + ["no-mae"] * (not first.mae) + ["vt"] * first.vt
    late = {"mask_ratio": MASK_RATIOS[first.mask], "out": f"runs/{'-'.join(words)}"}
    parser.set_defaults(**defaults | late, clip_given=False)
    args = parser.parse_args(argv)
    args = parse_like_run(parser, lambda: parser.parse_args(argv), args)
    args.clip_given = args.clip_given or "clip" in args.typed
    check_args(args)
    return args


# ==================================================================================================
# Data.
# ==================================================================================================


class Clips(TrainingClips):
    """Samples for training: `repeat` clips of the same frames of a video, each with its own crop,
    mask (unless CLIP has to see the clip first) and caption. text_from: None, "clip" (which will
    embed the captions) or "maps" (for which it has done so)."""

    def __init__(self, records, config, args, *, text_from, replace_bad=True):
        super().__init__(records, args.seed, replace_bad=replace_bad)
        self.config, self.args, self.text_from = config, args, text_from

    def read(self, record, generator):
        """-> frames (T,H,W,3), motion (T,H/8,W/8) or None, numbers of the frames and their order,
        whether motion is the difference of frames."""
        args, with_motion = self.args, self.args.mask == "mgm"
        with (
            dataset.open_video(record["path"], motion=with_motion) as video,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", dataset.NoMotionVectors)
            span = dataset.frame_range(video, record.get("start"), record.get("end"))
            count = self.config.num_frames
            numbers = dataset.clip_indices(*span, count, args.stride, generator=generator)
            read = dataset.read_clip(video, numbers, motion=with_motion)
        frames, motion = read if with_motion else (read, None)
        no_motion = any(w.category is dataset.NoMotionVectors for w in caught)
        return frames, motion, numbers, video.index.order, no_motion

    def captions_used(self, record):
        """Numbers of the --num-captions captions, evenly spread, of which one is drawn."""
        total = len(record["captions"])
        among = min(self.args.num_captions or total, total)
        return [(2 * i + 1) * total // (2 * among) for i in range(among)]

    def draw_captions(self, record, count, generator):
        """Numbers of `count` captions."""
        if not self.text_from:
            return [None] * count
        used = self.captions_used(record)
        return [used[i] for i in torch.randint(len(used), (count,), generator=generator).tolist()]

    def load(self, place, seed):
        record, args, c = self.records[place], self.args, self.config
        generator = torch.Generator().manual_seed(seed)
        frames, motion, numbers, order, no_motion = self.read(record, generator)
        size, firsts = frames.shape[1:3], numbers[:: c.tubelet_size]
        chosen = self.draw_captions(record, args.repeat, generator)
        text_map = None
        if self.text_from == "maps":
            text_map = dataset.read_map(record["map_path"], record["captions"], args.clip, order)
        videos, masks = [], []
        for number in chosen:  # a clip of the same frames for each caption
            crop = dataset.multi_scale_crop(size, flip=args.flip, generator=generator)
            videos.append(dataset.crop_frames(frames, crop, c.image_size))
            if args.mask == "tube":
                scores = tgmae.tube_scores(1, c.grid, generator=generator)
            elif args.mask == "mgm":
                cropped = dataset.crop_motion(motion, crop, c.grid)
                scores = tgmae.motion_scores(cropped[None], c.grid, generator=generator)
            elif args.mask != "tgm":
                raise RuntimeError(f"--mask {args.mask}: Clips.load computes no scores for it")
            elif text_map:
                scores = dataset.map_scores(text_map, number, firsts, crop, size, c.grid)[None]
            else:
                continue  # in `prepare`, on the device, where CLIP is
            masks.append(tgmae.topk_mask(scores, args.mask_ratio, bottom_k=args.bottom_k))
        return {
            "video": torch.stack(videos),  # (repeat,3,T,S,S) uint8
            "mask": torch.cat(masks) if masks else None,  # (repeat,N)
            "captions": [record["captions"][i] for i in chosen if i is not None],
            "text": text_map.text[chosen] if text_map else None,  # (repeat,E)
            "name": record["video"],
            "group": place,
            "no_motion": no_motion,
        }


def collate(samples):
    """Samples -> a batch of their clips: video (B,3,T,S,S) uint8, mask (B,N) or None, captions,
    text (B,E) or None, ... If one of them is unreadable: {"unreadable": [(video, why), ...]}."""
    unreadable = sum((sample.get("unreadable", []) for sample in samples), [])
    if unreadable:
        return {"unreadable": unreadable}
    repeat = len(samples[0]["video"])

    def joined(key):
        return None if samples[0][key] is None else torch.cat([sample[key] for sample in samples])

    return {
        "video": joined("video"),
        "mask": joined("mask"),
        "captions": sum((sample["captions"] for sample in samples), []),
        "text": joined("text"),
        "names": [sample["name"] for sample in samples],
        "groups": torch.tensor([sample["group"] for sample in samples]).repeat_interleave(repeat),
        "bad": sum((sample["bad"] for sample in samples), []),
        "no_motion": sum(sample["no_motion"] for sample in samples),
    }


def prepare(batch, clip, args, config):
    """A batch on the device -> video (B,3,T,S,S) float, mask (B,N) on the CPU, text (B,E) or
    None."""
    to_gpu = args.device == "cuda"  # elsewhere the source may be gone before it is copied
    video = tgmae.normalize(batch["video"].to(args.device, non_blocking=to_gpu))
    text, mask = batch["text"], batch["mask"]
    if text is not None:
        text = text.to(args.device, torch.float32, non_blocking=to_gpu)
    elif clip:
        text = tgmae.encode_text(*clip, batch["captions"])
    if mask is None:
        scores = tgmae.text_scores(clip[0], video, text, config.patch_size, config.tubelet_size)
        mask = tgmae.topk_mask(scores.cpu(), args.mask_ratio, bottom_k=args.bottom_k)
    return video, mask, text


def check_text(manifest, record, with_maps):
    """ValueError if a record lacks what its text needs."""
    captioning = f"python captions.py caption {manifest} --source ... makes them"
    making = f"python captions.py maps {manifest} makes them"
    if not record.get("captions"):
        wrong = f"has no captions, which --mask tgm, --vt and --clip need; {captioning}"
    elif with_maps != ("map_path" in record):
        wrong = "has no text map, others have" if with_maps else "has a text map, others have none"
        wrong += f"; {making}"
    elif with_maps and not os.path.exists(record["map_path"]):
        wrong = f"has no text map at {record['map_path']}; {making}"
    else:
        return
    raise ValueError(f"{manifest}: {record['video']} {wrong}")


def clip_of_maps(args, manifest, record):
    """The CLIP that made the text maps, of which one is read. ValueError if --clip is another."""
    made_by = dataset.read_map(record["map_path"], record["captions"]).clip
    wanted = dataset.clip_name(args.clip, args.clip_pretrained)
    if "clip" in args.typed and not made_by.startswith(wanted + " "):
        again = f"python captions.py maps {manifest} makes them again, with --force"
        raise ValueError(f"--clip: {wanted} is not the CLIP of the text maps, {made_by}; {again}")
    return made_by


def without_failed(manifest, records):
    """Leaves out what captions.py could not read."""
    failed = np.fromiter(("failed" in record for record in records), bool, len(records))
    if failed.any():
        example = records[failed][0]["video"]
        say(f'{manifest}: {failed.sum()} clips marked "failed" are left out, such as {example}')
    return records[~failed]


def load_data(args):
    """-> training records, validation records or None, and where text comes from: see Clips."""
    manifest, world = manifest_of(args.data), rank_and_world()[1]
    records = dataset.read_manifest(manifest, args.split)
    val = dataset.read_manifest(manifest, args.val_split) if args.val_split else None
    if val:
        sides = {f"--split {args.split}": records, f"--val-split {args.val_split}": val}
        dataset.refuse_shared_clips(manifest, sides)
    # VT is watched where that costs no download that nobody asked for: on the toy world, or with
    # --clip.
    with_text = args.mask == "tgm" or args.vt or args.data == "toy" or args.clip_given
    if with_text:
        records = without_failed(manifest, records)
        val = val and without_failed(manifest, val)
        with_maps = any("map_path" in record for record in records[:1])
        for record in itertools.chain(records, val or ()):
            check_text(manifest, record, with_maps)
    videos = world * args.batch_size // args.repeat
    for part, name, accum in ((records, args.split, args.accum), (val, args.val_split, 1)):
        if part is not None and len(part) < videos * accum:
            step = f"{world} processes x --batch-size {args.batch_size} x --accum {accum}"
            fewer = f"{len(part)} clips of split {name!r} are fewer than a step takes"
            raise ValueError(f"{manifest}: {fewer} ({step} / --repeat {args.repeat})")
    if not with_text:
        return records, val, None
    if videos < 2:
        what = "--vt" if args.vt else "VT, which is watched,"
        raise ValueError(f"{what} with a global batch of {videos} video: no negatives")
    if with_maps:
        args.clip = clip_of_maps(args, manifest, records[0])
    return records, val, "maps" if with_maps else "clip"


# ==================================================================================================
# Model and optimiser.
# ==================================================================================================


def check_mask_ratio(mask_ratio, grid):
    """ValueError for a ratio that masks no cube of a time slice, or every cube."""
    _, h, w = grid
    k = int(mask_ratio * h * w)
    if not 0 < k < h * w:
        raise ValueError(f"--mask-ratio {mask_ratio}: masks {k} of {h * w} cubes of a time slice")


def checkpoint_blocks(model):
    """Recomputes each block in the backward pass: less memory, a third more time."""
    for block in model.modules():
        if isinstance(block, tgmae.Block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def freeze_unused(model, args, text_from):
    """What gets no gradient is frozen: DDP would wait for it, and stop at the second step."""
    if not text_from:
        model.predictor.requires_grad_(False)
    if not args.mae:
        for part in (model.decoder, model.encoder_to_decoder):
            part.requires_grad_(False)
        model.mask_token.requires_grad_(False)


# What --init may have another value of than the model; and where it has no decoder.
OTHER = {"num_frames", "image_size", "text_dim", "temperature", "layer_norm_eps"}
OF_DECODER = {"decoder_embed_dim", "decoder_depth", "decoder_num_heads"}


def load_weights(config, args):
    """-> config with the layer_norm_eps of --init, and its weights: the encoder, the decoder if it
    has one, the predictor if it has one for a CLIP of the same width. Says what begins anew.
    ValueError if the sizes are others."""
    theirs, state, rest = weights.load_checkpoint(args.init)
    then, now = asdict(theirs), asdict(config)
    free = OTHER if "mask_token" in state else OTHER | OF_DECODER
    names = [name for name in now if name not in free and then[name] != now[name]]
    if names:
        unfit = ", ".join(f"{name} {then[name]}, not {now[name]}" for name in names)
        raise ValueError(f"--init {args.init}: does not fit --preset {args.preset}: {unfit}")
    if not rest["norm_pix_loss"]:
        if args.mae and "mask_token" in state:
            raise ValueError(f"--init {args.init}: its decoder's targets are not normalised")
        state = {name: v for name, v in state.items() if weights.part_of(name) != "decoder"}
    if theirs.text_dim != config.text_dim:
        state = {name: v for name, v in state.items() if not name.startswith("predictor.")}
    ours = {"encoder", "encoder.norm", "decoder", "predictor"}
    there = {weights.part_of(name) for name in state}
    line = f"init    {args.init}: {', '.join(sorted(ours & there))}"
    if ours - there:
        line += f"; begin anew: {', '.join(sorted(ours - there))}"
    if there - ours:
        line += f"; left out: {', '.join(sorted(there - ours))}"
    say(line)
    if rest["assumed"]:
        say(f"note    {args.init} does not say the size of its clips: {rest['assumed']} assumed")
    if theirs.layer_norm_eps != config.layer_norm_eps:
        say(f"init    layer_norm_eps {theirs.layer_norm_eps:g}, as there")
    sizes = [(c.num_frames, c.image_size) for c in (theirs, config)]
    if sizes[0] != sizes[1]:
        then, now = ("{} frames, {} pixels".format(*size) for size in sizes)
        say(f"init    {args.init}: trained on clips of {then}; positions are computed for {now}")
    return replace(config, layer_norm_eps=theirs.layer_norm_eps), state


def build_model(args, text_from, record, saved=None):
    """-> model on the device, with the weights of --init unless the run goes on from `saved`, and
    (clip, tokenizer), or None where there are text maps, or no text."""
    clip = None
    if text_from == "clip":
        clip = weights.load_clip(args.clip, args.clip_pretrained, args.device)
    sizes = {name: vars(args)[name] for name in ("num_frames", "image_size") if vars(args)[name]}
    config = replace(PRESETS[args.preset], temperature=args.temperature, **sizes)
    if text_from:
        maps = None if clip else dataset.read_map(record["map_path"], record["captions"])
        text_dim = (tgmae.encode_text(*clip, ["a"]) if clip else maps.text).shape[1]
        config = replace(config, text_dim=text_dim)
        c = config
        if maps and (min(maps.resized), maps.patch_size) != (c.image_size, c.patch_size):
            say(
                f"note    text maps of {min(maps.resized)} pixels in patches of {maps.patch_size}; "
                f"the model sees {c.image_size} in patches of {c.patch_size}: captions.py maps "
                f"--image-size {c.image_size} --patch-size {c.patch_size} --force makes such maps"
            )
    check_mask_ratio(args.mask_ratio, config.grid)
    state = {}
    if saved:  # it may be that of --init
        config = replace(config, layer_norm_eps=saved["config"]["layer_norm_eps"])
    elif args.init:
        config, state = load_weights(config, args)
    torch.manual_seed(args.seed)
    model = tgmae.TGMAE(config)
    model.load_state_dict(state, strict=False)
    if args.grad_checkpointing:
        checkpoint_blocks(model)
    freeze_unused(model, args, text_from)
    return model.to(args.device), clip


def make_optimizer(model, args):
    """AdamW as in VideoMAE: betas .9/.95, no decay on 1-D parameters and the mask token."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if p.ndim > 1 and name != "mask_token"]
    rest = [p for name, p in params if p.ndim <= 1 or name == "mask_token"]
    groups = [{"params": decay, "weight_decay": args.weight_decay}]
    groups += [{"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def clip_together(model, args):
    """Parameters whose gradient norm --clip-grad limits together: those of a predictor that only
    watches by themselves, since it must not change what the others learn."""
    watching = [] if args.vt else list(model.predictor.parameters())
    named = model.named_parameters()
    others = [p for name, p in named if args.vt or not name.startswith("predictor.")]
    return [others, watching]


def settings(args, data):
    """What args.json and checkpoints keep of a run: flags as they were given, and what is compared
    when it goes on."""
    flags = vars(args) | args.given
    own = {"clips": len(data), "text_from": data.text_from, "world": rank_and_world()[1]}
    own["torch"] = str(torch.__version__)
    internal = ("typed", "given", "facts")
    flags = {name: value for name, value in flags.items() if name not in internal}
    return flags | own | args.facts


def facts_of(args, records, text_from, clip, goes_on):
    """What a run learns from, beside its flags: digests, and how its text maps were made."""
    text = ("captions",) if text_from else ()
    facts = {"records": digest_of_records(records, ("video", "start", "end", *text))}
    if clip:
        facts["clip_weights"] = weights.digest(clip[0].state_dict(), torch.bfloat16)
    if text_from == "maps":
        found = dataset.read_map(records[0]["map_path"], records[0]["captions"])
        every = int(found.frames.diff()[0]) if len(found.frames) > 1 else 0
        facts["maps"] = f"{min(found.resized)} pixels, patches of {found.patch_size}, every {every}"
    if args.init:
        facts |= digest_of_weights(args.init, goes_on)
    return facts


def go_on(saved, model, optimizer, args, data, total):
    """Loads a checkpoint of the same run; another one's is refused. -> its step, of `total`."""
    defaults = vars(parse_args(["--data", args.data, "--no-resume"]))
    older = {"in_chans": 3, "norm_pix_loss": True}  # what older checkpoints could have otherwise
    now = settings(args, data) | asdict(model.config) | older
    refuse_another_run(args, saved, now, defaults)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
    saved.clear()  # gigabytes
    finished = ": finished, --no-resume starts over" if step == total else ""
    say(f"resume  at step {step} of {total}{finished}")
    return step


# ==================================================================================================
# Pictures.
# ==================================================================================================


@torch.no_grad()
def reconstruct(video, mask, pred, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), pred (B,Nm,P) of TGMAE.forward, or None ->
    dict of videos (B,3,T,H,W) in [0,1]: `clip`, `masked` (in grey), and with pred `reconstructed`,
    in which masked cubes have their true mean and std put back, and `predicted`, in which they have
    not: 0.5 + pred/6 (4.7)."""
    c, sizes = config, (config.patch_size, config.tubelet_size)
    cubes = tgmae.patchify(tgmae.denormalize(video), *sizes)  # (B,N,P), pixels in [0,1]
    _, ids_mask = tgmae.split_mask(mask, video.device)
    ids_mask = ids_mask[..., None].expand(-1, -1, c.patch_dim)  # (B,Nm,P)
    volumes = {"clip": cubes, "masked": cubes.scatter(1, ids_mask, 0.5)}
    if pred is not None:
        _, mean, std = tgmae.reconstruction_target(video, mask, c)
        pixels = (pred.unflatten(-1, (-1, 3)) * std + mean).flatten(2)  # (B,Nm,P)
        volumes["reconstructed"] = cubes.scatter(1, ids_mask, pixels)
        volumes["predicted"] = cubes.scatter(1, ids_mask, 0.5 + pred / 6)
    back = {name: tgmae.unpatchify(cubes, c.grid, *sizes) for name, cubes in volumes.items()}
    return {name: video.clamp(0, 1) for name, video in back.items()}


MASK_COLOURS = {"tube": "#1f77b4", "mgm": "#ff7f0e", "tgm": "#2ca02c"}  # matplotlib's C0, C1, C2


def draw_page(rows, title="", side=112):
    """rows of (text, picture (S,S,3) uint8) -> a PIL image: each picture below its text, which runs
    on over the next ones where theirs is empty. A text that begins with a masker has its colour."""
    font, line, gap = ImageFont.load_default(14), 18, 4
    columns = max(map(len, rows))
    width = columns * (side + gap) + gap
    title = textwrap.wrap(title, width // 7)
    top = len(title) * line + gap
    page = Image.new("RGB", (width, top + len(rows) * (side + line + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 0), "\n".join(title), "black", font)
    for row, cells in enumerate(rows):
        for column, (text, picture) in enumerate(cells):
            x, y = gap + column * (side + gap), top + row * (side + line + gap)
            colour = MASK_COLOURS.get(text.split(" ")[0], "black")
            draw.text((x, y), text, colour, font)
            picture = Image.fromarray(picture.numpy()).resize((side, side), Image.NEAREST)
            page.paste(picture, (x, y + line))
    return page


@torch.no_grad()
def draw_samples(path, model, data, clip, args):
    """samples.png: of four clips the frames, the mask, and, if a decoder was trained, the
    reconstruction, in which masked cubes have their own mean and std put back."""
    c, count = model.config, min(4, len(data))
    samples = [data[0, i * len(data) // 4] for i in range(count)]
    readable = [sample for sample in samples if "unreadable" not in sample]
    if not readable:
        say(f"note    {path} is not drawn: {samples[0]['unreadable'][0][1]}")
        return
    batch = collate(readable)
    video, mask, _ = prepare(batch, clip, args, c)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # so few clips are not worth compiling for
        pred = model(video, mask)["pred"].float() if args.mae else None
    made = reconstruct(video, mask, pred, c)
    rows = []
    for b in range(0, len(video), args.repeat):
        said = f'"{batch["captions"][b]}"' if batch["captions"] else "clip"
        mask = f"{args.mask} mask {args.mask_ratio:.0%}"
        texts = {"clip": said, "masked": mask, "reconstructed": "reconstruction"}
        for name in [name for name in texts if name in made]:
            frames = made[name][b].permute(1, 2, 3, 0).mul(255).byte().cpu()
            frames = frames[:: max(1, c.num_frames // 8)]  # at most 8 side by side
            rows.append(list(zip([texts[name]] + [""] * len(frames), frames)))
    with replacing(path) as file:
        draw_page(rows).save(file, "PNG")


# ==================================================================================================
# The run.
# ==================================================================================================


def describe(args, c, data, val, videos, steps_per_epoch):
    """Prints what the run is. c: the model's Config."""
    world, which = rank_and_world()[1], "lowest" if args.bottom_k else "highest"
    batch, clips = args.batch_size * world, videos * args.repeat
    patches = c.grid[1] * c.grid[2]
    text = {"clip": "; CLIP online", "maps": "; text maps"}.get(data.text_from, "")
    text += f" ({args.clip})" * bool(text)
    loss = " + ".join(["MAE"] * args.mae + [f"{args.vt_weight:g} VT"] * args.vt)
    if data.text_from:
        loss += "" if args.vt else ", VT watched"
        loss += f"; {batch - args.repeat} negatives a clip, temperature {c.temperature:g}"
        distinct = {r["captions"][i] for r in data.records for i in data.captions_used(r)}
        text += f"; {len(distinct):,} distinct captions"
    say(f"model   {args.preset}; clips of {c.num_frames} frames, {c.image_size}x{c.image_size}")
    say(f"data    {args.data}, split {args.split}: {len(data)} videos{text}")
    if val:
        whole = len(val) // (batch // args.repeat) * (batch // args.repeat)
        say(f"val     {whole} of the {len(val)} videos of split {args.val_split}, in whole batches")
    masked = f"{int(args.mask_ratio * patches)} of {patches} patches in each of {c.grid[0]} slices"
    say(f"mask    {args.mask}, {which} {masked}")
    say(f"loss    {loss}")
    left = clips - batch * args.accum
    left = f", {left} left out of each step" if left else ""
    say(f"batch   {clips} clips = {world} x {args.batch_size} x {args.accum}{left}")
    say(f"steps   {args.epochs} epochs x {steps_per_epoch}; rate {args.blr * clips / 256:.3g}")
    say(f"device  {args.device}, {'bf16' if args.amp else 'fp32'}; run folder {args.out}")


@torch.no_grad()
def validate(step, epoch, net, data, clip, args, loaders):
    """Held-out losses after an epoch go into the log: of the same clips and masks each time. All
    processes leave out a batch in which one has a clip that cannot be read."""
    rank, world = rank_and_world()
    net.eval()
    mine = DistributedSampler(data, world, rank, shuffle=False, drop_last=True)
    how = {"batch_size": args.batch_size // args.repeat, "drop_last": True, "collate_fn": collate}
    how["sampler"] = [(0, i) for i in mine]
    losses, bad = [], []
    for batch in batches_of(data, loaders, **how):
        unreadable = sum(gather_objects(batch.get("unreadable", [])), [])
        if unreadable:
            bad.append(unreadable)
            continue
        video, mask, text = prepare(batch, clip, args, data.config)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = net(video, mask, text, mae=args.mae, groups=batch["groups"].to(args.device))
        losses.append([out[name].item() for name in ("mae", "vt") if name in out])
    net.train()
    line = {"step": step, "epoch": epoch}
    if losses:
        mean = sum_over_ranks(torch.tensor(losses).mean(0).to(args.device))
        names = ["val_mae"] * args.mae + ["val_vt"] * bool(data.text_from)
        line |= {name: value / world for name, value in zip(names, mean)}
    if bad:
        line["val_bad"] = len(bad)
        count = f"{len(bad)} of {len(bad) + len(losses)} held-out batches"
        say(f"note    {count} left out, since a clip cannot be read: {bad[0][0][1]}")
    if rank == 0:
        list_bad(Path(args.out) / "bad_videos.txt", sum(bad, []))
        append_log(Path(args.out) / "log.jsonl", line)


def finish(out):
    """Says how the run ended."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lr" in line]  # of steps, not of validation
    last = [line for line in lines[-max(1, len(lines) // 20) :] if "skipped" not in line]
    for name in ("mae", "vt"):
        if found := [line[name] for line in last if name in line]:
            print(f"{name:<8}{sum(found) / len(found):.3f}, mean of the last {len(found)} steps")
    for name, what in (
        ("skipped", "steps were left out: numbers that were not finite"),
        ("bad", f"times a video could not be read, another took its place: {out}/bad_videos.txt"),
        ("no_motion", "times a video had no motion vectors: the difference of frames stood in"),
    ):
        # What was skipped was once a list of names.
        counts = (name in line if name == "skipped" else line.get(name, 0) for line in lines)
        if count := sum(counts):
            print(f"{name:<7} {count} {what}")
    print(f"done    {out}/samples.png, {out}/last.pt")


def train(args, share, saved, model, clip, data, val):
    (rank, world), (videos, _, accum) = rank_and_world(), share
    out, c, steps_per_epoch = Path(args.out), model.config, len(data) // videos
    total, warmup = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)
    # Both rates, like VideoMAE's, are given per 256 clips.
    peak, least = (rate * videos * args.repeat / 256 for rate in (args.blr, args.min_lr))
    optimizer, clipped = make_optimizer(model, args), clip_together(model, args)
    describe(args, c, data, val, videos, steps_per_epoch)
    goes_on = bool(saved)
    start = go_on(saved, model, optimizer, args, data, total) if goes_on else 0
    if args.compile:  # each by itself: between them the mask's counts break a graph
        model.encoder.compile()
        model.decoder.compile()
    batch_bytes = args.batch_size * clip_bytes(c) * (2 if val else 1)  # of both loaders
    loaders = fit_loaders(args.workers, batch_bytes)
    # No device_ids: the mask stays on the CPU.
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    logged = {}
    if rank == 0:
        if not goes_on:
            set_aside(out)
        logged = cut_log(out / "log.jsonl", start)
        if start < total:
            with replacing(out / "args.json", "w") as file:
                file.write(json.dumps(settings(args, data), indent=1))
    validated = "lr" not in gather_objects(logged)[0]  # what was saved is validated after that
    if val and start and start % steps_per_epoch == 0 and not validated:
        validate(start, start // steps_per_epoch - 1, net, val, clip, args, loaders)
    zero = torch.zeros((), device=args.device)
    done, in_a_row, kept, saved_at = start, 0, start, time.monotonic()
    listen()
    with progress(total=total, initial=start, unit="step", disable=rank > 0) as bar:
        for step, batches in steps(data, share, args, start, collate, loaders):
            epoch, began = step // steps_per_epoch, time.perf_counter()
            lr = learning_rate(step, warmup, total, peak, least)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            # Of the predictor's BatchNorm, to be put back if the step is left out.
            statistics = [buffer.clone() for buffer in model.predictor.buffers()]
            sums, waited, names = torch.zeros(4, device=args.device), 0.0, []
            for micro, batch in enumerate(batches, 1):
                video, mask, text = prepare(batch, clip, args, c)
                groups = batch["groups"].to(args.device)
                with synchronised(net, last=micro == accum):
                    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                        losses = net(
                            video, mask, text, mae=args.mae, watch=not args.vt, groups=groups
                        )
                    mae, vt = losses.get("mae", zero), losses.get("vt", zero)
                    # Equation (3.5). VT that is only watched trains the predictor, which AdamW does
                    # alike whatever the weight, and nothing else.
                    loss = mae + args.vt_weight * vt
                    (loss / accum).backward()
                means = torch.stack([mae.detach().float(), vt.detach().float()]) / accum
                counts = zero.new_tensor([len(batch["bad"]), batch["no_motion"]])
                sums = sums + torch.cat([means, counts])  # mae, vt, bad, no_motion
                waited += batch["waited"]
                names += batch["names"]
                list_bad(out / "bad_videos.txt", batch["bad"])

            limit = args.clip_grad or math.inf
            norms = [torch.nn.utils.clip_grad_norm_(part, limit).item() for part in clipped]
            mine_finite = bool(sums.isfinite().all())
            flags = [not (mine_finite and all(map(math.isfinite, norms))), asked_to_stop()]
            sums = torch.cat([sums, sums.new_tensor(flags)])
            mae, vt, bad, no_motion, broken, stop = sum_over_ranks(sums)
            if broken:  # in any process: the step is left out, in all of them
                for buffer, value in zip(model.predictor.buffers(), statistics):
                    buffer.copy_(value)
            else:
                optimizer.step()
            done = step + 1
            in_a_row = in_a_row + 1 if broken else 0

            took = time.perf_counter() - began
            line = {"step": done, "epoch": epoch}
            line |= {"mae": round(mae / world, 6)} if args.mae else {}
            line |= {"vt": round(vt / world, 6)} if data.text_from else {}
            line |= {"lr": lr, "grad_norm": round(norms[0], 4)}
            line["clips_per_s"] = round(args.batch_size * accum * world / took, 2)
            line |= {"wait": round(waited / took, 3), "bad": int(bad), "no_motion": int(no_motion)}
            line |= {"skipped": True} if broken else {}
            shown = {key: line[key] for key in ("mae", "vt", "wait") if key in line}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if rank == 0:
                append_log(out / "log.jsonl", line)
            if broken:
                left_out(done, in_a_row, [] if mine_finite else names)

            late = 0 < 60 * args.save_minutes <= time.monotonic() - saved_at
            due = stop or late or done % steps_per_epoch == 0
            # Not after a step that was left out: weights that make no finite numbers do not replace
            # those that did.
            if rank == 0 and due and (done == total or not broken):
                state = {"config": asdict(c), "model": model.state_dict(), "step": done}
                state |= {"optimizer": optimizer.state_dict(), "epoch": done // steps_per_epoch}
                state |= {"videos": videos, "args": settings(args, data)}
                save_checkpoint(out / "last.pt", **state)
                kept, saved_at = done, time.monotonic()
            if stop and done < total:
                break  # the run that goes on validates first
            if val and done % steps_per_epoch == 0:
                validate(done, epoch, net, val, clip, args, loaders)

    leave(out, kept, unfinished=done < total)


def run(args):
    """All of it, in a folder that is locked."""
    rank, _ = rank_and_world()
    saved = load_last(args)
    own = Path(args.out, "last.pt").resolve()
    if args.init and not saved and Path(args.init).resolve() == own:
        raise ValueError(f"--init {args.init}: a new run in its folder replaces it; another --out")
    share = share_step(args.batch_size // args.repeat, args.accum, saved and saved["videos"])
    args.given = {"batch_size": args.batch_size, "accum": args.accum}
    _, forward, args.accum = share
    args.batch_size = forward * args.repeat
    records, val, text_from = load_data(args)
    model, clip = build_model(args, text_from, records[0], saved)
    args.facts = facts_of(args, records, text_from, clip, goes_on=bool(saved))
    data = Clips(records, model.config, args, text_from=text_from)
    val = val and Clips(val, model.config, args, text_from=text_from, replace_bad=False)
    train(args, share, saved, model, clip, data, val)
    if rank == 0:
        draw_samples(Path(args.out) / "samples.png", model, val or data, clip, args)
        finish(Path(args.out))


def main(argv=None):
    less = "a smaller --batch-size (with a larger --accum), --grad-checkpointing, --amp, "
    less += "a smaller --preset"
    with one_line_errors("train.py", less):
        args = parse_args(argv)
        start_processes(args)
        with lock_folder(Path(args.out)):
            run(args)


if __name__ == "__main__":
    main()
