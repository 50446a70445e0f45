"""What a run needs, whatever it trains: processes, flags, the stream of batches, the run folder
with its checkpoint, signals, errors in one line. For whoever operates runs; train.py and eval.py
are to be read without it.

A run that was stopped, by whatever, goes on to the same weights, since nothing depends on what came
before but the checkpoint: `steps` orders the clips of an epoch by its number, `TrainingClips` draws
a sample by (seed, epoch, index), and the log is cut back to the checkpoint's step."""

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
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import tgmae
import weights
from dataset import UserError, VideoError


# ==== Processes ===================================================================================
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
        raise UserError(f"--device {args.device}: {weights.first_line(error)}") from error
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


def wait_for_all():
    gather_objects(None)


def sum_over_ranks(numbers):
    """(n,) of this process -> the sums over all, a list."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def say(line):
    """Prints a line, in process 0 alone."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def progress(*args, **more):
    """A tqdm bar; where it goes to a file, a line every ten seconds."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 10, **more)


def distributed(model):
    """The model as the processes share it. No device_ids: a mask stays on the CPU."""
    alone = rank_and_world()[1] == 1
    return model if alone else DistributedDataParallel(model, broadcast_buffers=False)


def averaging_if(net, last):
    """Within it backward() averages gradients over the processes only if it is a step's last."""
    alone = not isinstance(net, DistributedDataParallel)
    return contextlib.nullcontext() if alone or last else net.no_sync()


# ==== Flags, and errors in one line ===============================================================
WORKERS = "loader processes per process; its share of the CPU cores, at most 8"  # of --workers
YES_NO = argparse.BooleanOptionalAction  # --flag and --no-flag


class Parser(argparse.ArgumentParser):
    """Help names defaults; errors are one line, like all others."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more)

    def error(self, message):
        if message.startswith("argument --"):  # --epochs 0: must be positive
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        script, *_ = self.prog.split()
        sys.exit(f"{script}: {message}")


def add_flag(parser, name, default, help, **more):
    """A flag of the type of its default, which is said behind its help; where it is None, help has
    it in words."""
    if default is None:
        help += "%(default).0s"  # no character of it, else argparse adds "(default: None)"
    if isinstance(default, bool):
        more["action"] = YES_NO
    elif isinstance(default, int | float):
        more.setdefault("type", type(default))
    parser.add_argument(name, default=default, help=help, **more)


def _number(kind, holds, rule):
    """A type of flags: int or float, of which `holds` must hold."""

    def number(text):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text}: must {rule}")
        return value

    number.__name__ = kind.__name__
    return number


positive_int = _number(int, lambda n: n > 0, "be positive")
natural = _number(int, lambda n: n >= 0, "not be negative")
seed = _number(int, lambda n: 0 <= n < 2**32, "not be negative, and be below 2**32")
positive = _number(float, lambda x: 0 < x < math.inf, "be positive")
not_negative = _number(float, lambda x: 0 <= x < math.inf, "not be negative")
fraction = _number(float, lambda x: 0 <= x <= 1, "lie in 0 to 1")
randaug_bin = _number(int, lambda n: 0 <= n <= 30, "lie in 0 to 30")
proper_fraction = _number(float, lambda x: 0 < x < 1, "lie between 0 and 1")


def check_mask_ratio(mask_ratio, grid):
    """UserError for a ratio that masks no cube of a time slice, or every cube."""
    _, h, w = grid
    k = int(mask_ratio * h * w)
    if not 0 < k < h * w:
        raise UserError(f"--mask-ratio {mask_ratio}: masks {k} of {h * w} cubes of a time slice")


def last_line(error):
    """What an exception says, in one line: a loader process puts its traceback in front of the
    message."""
    if isinstance(error, torch.OutOfMemoryError):  # followed by a page of advice
        return ". ".join(str(error).split(". ")[:2])
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if os.strerror(errno.EMFILE) in text:
        text += "; `ulimit -n 65536` allows more"
    return text.removeprefix("dataset.VideoError: ").removeprefix("dataset.UserError: ")


@contextlib.contextmanager
def one_line_errors(script, less):
    """For a script's main: a user's mistake is one line and exit code 1, and so is a lack of
    memory, with what needs `less`, or of a compiler; anything else keeps its traceback. Names that
    are no UTF-8 can be printed."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        sys.exit(f"{script}: {last_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: {last_line(error)}; what needs less: {less}")
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # it has said why, or the kernel's log does
            sys.exit(f"{script}: {last_line(error)}")
        if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            sys.exit(
                f"{script}: --compile: {weights.first_line(error)}; leave it out, or install what "
                "it needs: g++, and triton for a GPU"
            )
        raise
    if dist.is_initialized():  # after an error the other processes may stand in a collective
        dist.destroy_process_group()


# ==== Samples, loaders, steps =====================================================================
MAX_REPLACEMENTS = 100  # bad videos in a row before all are thought to be bad
PATIENCE, GRACE = 30 * 60, 20  # seconds to wait for a batch; once SIGTERM has come


def seed_of(*numbers):
    """A seed that follows from the numbers alone: those of the run, the epoch, the sample, ..."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class TrainingClips(Dataset):
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
            except VideoError as error:
                record = self.records[place]
                part = [f"{key} {record[key]} s" for key in ("start", "end") if key in record]
                bad.append((", ".join([record["video"], *part]), str(error)))
        if not self.replace_bad:
            return {"unreadable": bad}
        raise VideoError(f"{len(bad)} video(s) in a row cannot be read, the last: {bad[-1][1]}")


def end_loaders():
    """Kills the loaders that are left; multiprocessing, at exit, would ask them by SIGTERM, which
    they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for child in mp.active_children():
        if child.daemon:
            child.kill()


def init_loader(_=None):
    """worker_init_fn of loader processes. They do not listen to SIGTERM: a scheduler sends it to
    all processes of a run, which needs its loaders until it has saved. A loader that cannot hand
    over a batch, or has lost its run, exits; torch then ends the run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
        os._exit(1)  # the run was killed before; torch watches whomever it finds as parent

    def end(error):
        print(
            f"loader: a batch cannot be handed over: {last_line(error)}; where shared memory is "
            "full: docker run --shm-size=... or --ipc=host, fewer --workers, or --workers 0",
            file=sys.stderr,
        )
        os._exit(1)

    # multiprocessing itself would print why (no shared memory, no open file), and go on without the
    # batch: these are called by the thread that sends batches, and the one that sends their files.
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: end(error))
    sys.excepthook = lambda kind, error, trace: end(error)


_stop = {"asked": False}


def listen():
    """From here on SIGTERM asks to stop: the run saves and stops after its step."""
    _stop["asked"] = False
    signal.signal(signal.SIGTERM, ask_to_stop)


def ask_to_stop(*_):
    _stop["asked"] = True
    if signal.alarm(0):  # a batch is awaited
        signal.alarm(GRACE)


def asked_to_stop():
    return _stop["asked"]


def no_batch(*_):
    """At SIGALRM, while a batch is awaited."""
    end_loaders()  # they might not listen
    if asked_to_stop():
        raise UserError(f"SIGTERM came, and no batch for {GRACE} s: ended without saving")
    raise UserError(f"no batch for {PATIENCE} s: ended without saving")


def batches_of(data, workers, **more):
    """Yields the batches of a DataLoader with so many loader processes. UserError if one does not
    come."""
    init = init_loader if workers else None
    stream = iter(DataLoader(data, num_workers=workers, worker_init_fn=init, **more))
    signal.signal(signal.SIGALRM, no_batch)
    while True:
        signal.alarm(PATIENCE)
        if asked_to_stop():  # asked after the alarm is set: SIGTERM may come at any moment
            signal.alarm(GRACE)
        try:
            batch = next(stream)
        except StopIteration:
            return
        finally:
            signal.alarm(0)
        yield batch


class Share(NamedTuple):
    """How the processes share a step."""

    videos: int  # of a step, of all processes
    forward: int  # of them, in a forward of a process
    accum: int  # forwards of a process


def fit_to_few(args, videos, steps, clips_of_video=1):
    """A step takes no more videos than there are. --epochs, where not typed: about so many `steps`;
    --warmup-epochs: a twentieth of it. --batch-size counts clips, so many of a video."""
    step = rank_and_world()[1] * args.accum  # of a batch of one video
    most = max(1, videos // step) * clips_of_video
    if args.batch_size > most:
        say(f"note    --batch-size {most}, not {args.batch_size}: there are {videos} videos")
        args.batch_size = most
    if args.epochs is None:
        steps_per_epoch = videos // (step * args.batch_size // clips_of_video)
        args.epochs = math.ceil(steps / max(1, steps_per_epoch))
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20


def check_warmup(args):
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs}: must lie in 0 to --epochs {args.epochs}"
        )


def share_step(forward, accum, videos=None):
    """-> Share. The processes that there are share a step of `accum` forwards of `forward` videos
    each, or, where a run goes on, of the `videos` that its steps had, at most `forward` at a time.
    What cannot be split evenly is left out of every step. More processes than videos: UserError."""
    _, world = rank_and_world()
    videos = videos or forward * accum * world
    mine = videos // world
    if not mine:
        raise UserError(f"{world} processes cannot share a step of {videos} video(s)")
    accum = -(-mine // forward)
    return Share(videos, mine // accum, accum)


def steps(data, share, args, start, collate):
    """Yields (step, batches): a run's steps from number `start` to the end of its last epoch, each
    with this process's batches, which say how many seconds they were "waited" for. An epoch's order
    follows from the seed alone, whatever the number of processes. The loader processes are the same
    all along."""
    rank, world = rank_and_world()
    steps_per_epoch = len(data) // share.videos

    def order():
        for epoch in range(start // steps_per_epoch, args.epochs):
            generator = torch.Generator().manual_seed(args.seed + epoch)
            indices = torch.randperm(len(data), generator=generator).tolist()
            for place in range(max(0, start - epoch * steps_per_epoch), steps_per_epoch):
                mine = indices[place * share.videos : (place + 1) * share.videos][rank::world]
                yield from ((epoch, index) for index in mine[: share.forward * share.accum])

    stream = batches_of(
        data,
        args.workers,
        batch_size=share.forward,
        sampler=order(),
        collate_fn=collate,
        pin_memory=args.device == "cuda",
    )

    def batches():
        for _ in range(share.accum):
            asked = time.perf_counter()
            batch = next(stream)
            yield batch | {"waited": time.perf_counter() - asked}

    for step in range(start, args.epochs * steps_per_epoch):
        yield step, batches()


def learning_rate(step, warmup, total, peak, last, first=0.0):
    """-> the rate of `step`, counted from 0, of `total`: `warmup` steps linear from `first` to
    `peak`, then a cosine to `last`, as VideoMAE's cosine_scheduler; never above `peak`."""
    first, last = min(first, peak), min(last, peak)
    if step < warmup:
        return first + (peak - first) * step / max(1, warmup - 1)
    half_turn = math.pi * (step - warmup) / max(1, total - warmup)
    return last + (peak - last) * 0.5 * (1 + math.cos(half_turn))


def checkpoint_blocks(model):
    """Recomputes each block in the backward pass: less memory, a third more time."""
    for block in model.modules():
        if isinstance(block, tgmae.Block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def stop_not_finite(args, step, videos):
    """Ends the run, on all processes, before numbers that are not finite reach the weights."""
    last = Path(args.out) / "last.pt"
    names = f", of {', '.join(videos)}" if videos else ""
    good = f"; {last}, the last good one, can begin another run" if last.exists() else ""
    raise UserError(
        f"step {step}: loss or gradient is not finite{names}. Ways out: --no-amp, a smaller "
        f"learning rate{good}"
    )


# ==== --data ======================================================================================
def toy_world(data):
    """The folder of the toy world that --data names, or None."""
    if data == "toy":
        return Path("data/toy")
    return Path(data) if data and Path(data, "world.json").exists() else None


def manifest_path(data):
    """For --data: the path of its manifest, which a toy world has in its folder."""
    world = toy_world(data)
    return world / "manifest.jsonl" if world else Path(data)


def same_data(one, other):
    return os.path.realpath(manifest_path(one)) == os.path.realpath(manifest_path(other))


def name_run(before, data, after):
    """A run folder: between `before` and `after` the name of the manifest, or of the toy world that
    has it. A run that is there under the manifest's name, as they all were, goes on there."""
    path = Path(os.path.abspath(manifest_path(data)))
    old, new = f"{before}{path.stem}{after}", f"{before}{path.parent.name}{after}"
    if not (toy_world(data) or toy_world(path.parent)):
        return old
    theirs = weights.flags_of(Path(old) / "last.pt").get("data")
    return old if theirs and same_data(theirs, data) else new


def note_sides(args, texts):
    """Says so where half the clips are mirrored, and texts say left or right."""
    word = re.compile("(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)
    if args.flip and (sided := sorted(filter(word.search, texts))):
        say(f"note    half the clips are mirrored, and texts say {sided[0]!r}: --no-flip, perhaps")


def note_clip(args, tokenizer, texts):
    """Says what is assumed of a file of weights, and if CLIP cuts captions."""
    if os.path.isfile(args.clip_pretrained):
        say(f"note    {args.clip_pretrained}: assumed to have {args.clip}'s activation and colours")
    # The longest alone, since this takes long. If a text is cut, another word changes nothing.
    longest = sorted(texts, key=len)[-1000:]
    if cut := [t for t in longest if torch.equal(tokenizer([t]), tokenizer([f"{t} a"]))]:
        say(f"note    some captions are longer than CLIP reads, such as {cut[-1][:60]!r}")


def note_unended(source, saved):
    """Says so if the run that made a checkpoint has not ended. saved: all of it but the weights."""
    epochs = saved.get("args", {}).get("epochs", 0)
    if "optimizer" in saved and saved["epoch"] < epochs:
        say(f"note    {source}: {saved['epoch']} of {epochs} epochs, of a run that has not ended")


# ==== The run folder ==============================================================================
@contextlib.contextmanager
def naming(path):
    """Within it what is raised of a full disk, or another one that cannot be written to, is a
    UserError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save puts a RuntimeError, which says nothing of the disk, over the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"{path}: cannot be written: {reason}") from error


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
    nulls = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    append(path, json.dumps(line | nulls) + "\n")


def list_bad(path, bad):
    """Lists videos that could not be read, once each, with the reason."""
    if bad:
        known = path.read_text("utf-8", "surrogateescape") if path.exists() else ""
        new = {video: why for video, why in bad if f"\n{video}\t" not in f"\n{known}"}
        append(path, "".join(f"{video}\t{why}\n" for video, why in new.items()))


@contextlib.contextmanager
def lock_folder(out):
    """Within it the run folder is there, and process 0 holds a lock, which the kernel frees with
    its owner, and loaders do not inherit. UserError if another run has it. An empty folder goes."""
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0]:
        yield
        return
    with naming(out):
        lock = open(out / "lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{out}: another run is writing there; another --out") from error
    except OSError as error:  # file systems without locks
        note = f"note    {lock.name}: {error.strerror}; nothing keeps a second run out"
        print(note, file=sys.stderr)
    try:
        with lock:
            yield
    finally:  # closed before: NFS keeps what is open
        if os.listdir(out) == ["lock"]:  # the run was refused
            os.remove(lock.name)
            out.rmdir()


def load_last(args):
    """The checkpoint from which the run in --out goes on, None if it begins. The same one for all
    processes: a UserError where a machine sees another."""
    path = Path(args.out) / "last.pt"
    saved = weights.load_file(path) if args.resume and path.exists() else None
    if saved and not {"args", "step", "videos"} <= saved.keys():
        raise UserError(
            f"{path}: not a checkpoint that a run goes on from; another --out, or --no-resume"
        )
    found = gather_objects(saved["step"] if saved else 0)
    if len(set(found)) > 1:
        own = found[rank_and_world()[0]]
        raise UserError(
            f"{path}: holds step {own} here, {found[0]} for process 0: machines share --out"
        )
    return saved


# What the machine decides, anew each time; and all that a run may change when it goes on.
OF_MACHINE = ("workers", "device", "out", "resume", "json", "world", "torch")
MAY_CHANGE = (*OF_MACHINE, "amp", "compile", "grad_checkpointing", "save_minutes", "val_split",
              "test_split", "views", "view_grid", "batch_size", "accum", "clip_given",
              "split_clips")  # fmt: skip
# Flags that say where something is: compared by a digest of it, if the checkpoint has one.
BY_CONTENT = {"data": "records", "init": "init_weights", "checkpoint": "init_weights",
              "clip": "clip_weights", "clip_pretrained": "clip_weights"}  # fmt: skip


def parse_like_run(parser, parse, args):
    """Parses again, where the run in --out goes on: its flags are the defaults, so that only flags
    that are typed can differ from it. parser: the one that has the flags. -> args, and the names of
    what was typed."""
    then = weights.flags_of(Path(args.out) / "last.pt") if args.resume else {}
    if then:
        own = vars(args).keys() - OF_MACHINE
        parser.set_defaults(**{name: value for name, value in then.items() if name in own})
        args = parse()
    untyped = object()
    parser.set_defaults(**dict.fromkeys(vars(args), untyped))
    return args, {name for name, value in vars(parse()).items() if value is not untyped}


def digest_of_records(records, keys):
    """A digest of what a run learns from: these keys of its records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.get(key) for key in keys]).encode())
    return digest.hexdigest()[:16]


def digest_of_clips(records):
    """A digest of which clips they are, in whatever order."""
    clips = ([record.get(key) for key in ("video", "start", "end")] for record in records)
    return hashlib.sha256("".join(sorted(map(json.dumps, clips))).encode()).hexdigest()[:16]


def digest_of_weights(source, goes_on):
    """{"init_weights": digest of those in `source`}. A run that goes on does without it if they are
    gone."""
    try:
        _, state, _ = weights.load_checkpoint(source)
    except UserError as error:
        if not goes_on:
            raise
        say(f"note    the run goes on, not compared with the weights that it began with: {error}")
        return {}
    return {"init_weights": weights.digest(state)}


def refuse_another_run(args, saved, now, defaults):
    """UserError that lists what is other than in the run in --out, a checkpoint of which is saved.
    now: flags, sizes of the model, digests. What the checkpoint lacks was at its default."""
    then, changed = defaults | saved["args"] | saved["config"], []
    for name in sorted(then.keys() & now.keys() - set(MAY_CHANGE)):
        was, value = then[name], now[name]
        if BY_CONTENT.get(name) in then:
            continue
        if name == "data":
            was, value = manifest_path(was), manifest_path(value)
        if name in ("data", "init", "checkpoint"):
            was, value = os.path.realpath(str(was)), os.path.realpath(str(value))
        if was != value:
            changed.append(f"{name} {str(was)[:200]} -> {str(value)[:200]}")
    step, was = (of["batch_size"] * of["accum"] for of in (now, then))
    if step != was and now["world"] == then.get("world"):
        changed.append(f"batch_size x accum {was} -> {step}")
    if changed:
        raise UserError(
            f"{args.out}/last.pt is of another run ({', '.join(changed)}): --no-resume starts "
            f"over; another --out begins a new run, with --init {args.out}/last.pt from its weights"
        )


def open_log(out, start):
    """On process 0, before the first step: what an old run has left is set aside by one that begins
    (start 0), the log is cut back to step `start`. -> its last line then, a dict, on all."""
    last = {}
    if rank_and_world()[0] == 0:
        for name in ("last.pt", "best.pt"):
            if start == 0 and (out / name).exists():
                os.replace(out / name, out / f"{name}.old")
        last = cut_log(out / "log.jsonl", start)
    return gather_objects(last)[0]


def read_log(out):
    """The lines of a run's log, dicts."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def say_counts(out):
    """What the log counts that is not as it should be."""
    lines = read_log(out)
    for name, what in (
        ("bad", f"times a video could not be read, another took its place: {out}/bad_videos.txt"),
        ("no_motion", "times a video had no motion vectors: the difference of frames stood in"),
        ("short", "times a video had fewer frames than a clip spans: some were repeated"),
    ):
        if count := sum(line.get(name, 0) for line in lines):
            say(f"{name:<7} {count} {what}")


def cut_log(path, step):
    """Drops the lines after `step`, which the run repeats. -> the last line left, a dict."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(path, "w") as file:
        file.writelines(kept)
    return json.loads(kept[-1]) if kept else {}


def leave(out, saved_step, unfinished, draw):
    """After the last step: nothing listens to SIGTERM any more. A run that it has stopped exits as
    if it had ended it, after process 0 has called `draw`, within GRACE. saved_step: of last.pt."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wait_for_all()  # process 0 has written
    if unfinished:
        if rank_and_world()[0] == 0:
            print(f"stopped by SIGTERM; {out}/last.pt holds step {saved_step}", file=sys.stderr)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when the others are gone
            signal.signal(signal.SIGALRM, lambda *_: sys.exit(128 + signal.SIGTERM))
            signal.alarm(GRACE)
            draw()
        sys.exit(128 + signal.SIGTERM)
