"""Pre-trains a (text-guided) video masked autoencoder.

    torchrun train.py --mask tgm --vt                      # toy world: no download, any machine
    torchrun --nproc_per_node 8 train.py --data k400.jsonl --preset base --mask tgm --vt

Loss = MAE + vt_weight * VT (3.5). The paper's eight runs (Table 2): --mask tube|mgm|tgm, with
nothing more (MAE), with --vt (MAE + VT), with --vt --no-mae (VT).

The first command builds the toy world (data/toy) and ends by itself in under five minutes on two
CPU cores; the MAE loss ends near 0.8 (1.0 is predicting each cube's mean) and samples.png shows
clip, mask and reconstruction. Run again, any command goes on from where its last checkpoint stands.
"""

import argparse
import atexit
import contextlib
import errno
import fcntl
import functools
import itertools
import json
import math
import multiprocessing as mp
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

# Loader processes share the cores with us: threads without work must sleep, not spin. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import dataset
import tgmae
import weights
from tgmae import MASK_RATIOS, PRESETS

TOY = {"preset": "toy", "epochs": 14, "warmup_epochs": 1, "batch_size": 16, "blr": 0.016,
       "min_lr": 1e-4,
       "stride": 4, "flip": False, "clip": "local-dir:data/toy/clip"}  # fmt: skip
REAL = {"preset": "base", "epochs": 200, "warmup_epochs": 40, "batch_size": 64, "blr": 1.5e-4,
        "min_lr": 1e-5,
        "stride": 4, "flip": True, "clip": "ViT-B-32-quickgelu"}  # fmt: skip

# ==================================================================================================
# What fine-tuning (eval.py) and captions.py share with this script: processes, schedule, the place
# of a video that cannot be read, log, checkpoints, steps with bad numbers, stopping and going on.
# ==================================================================================================


def end_loaders():
    """At exit: multiprocessing asks loaders that are left to end, by SIGTERM, which a run's ignore,
    and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for child in mp.active_children():
        if child.daemon:
            child.kill()


def start_processes(args, backend=None, timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if it is torchrun that started us; settles args.device
    ("auto") and args.amp (None). -> rank, world size. The first process may need `timeout` to build
    the toy world."""
    if args.device == "auto":
        there = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
        }
        args.device = next(name for name in there if there[name])
    try:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=args.device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an AssertionError from a torch that is built without CUDA
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.amp is None:
        args.amp = tgmae.bf16_is_fast(args.device)
    atexit.register(end_loaders)
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group(
        backend or ("nccl" if args.device == "cuda" else "gloo"), timeout=timeout
    )
    return dist.get_rank(), dist.get_world_size()


def rank_and_world():
    """(rank, world size) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def manifest_of(data):
    """For --data of the scripts: the path of a manifest, or "toy": the world in data/toy, which the
    first process makes where it is not there yet."""
    if data != "toy":
        return Path(data)
    rank, world = rank_and_world()
    if rank == 0:
        import toy

        toy.build("data/toy")
    if world > 1:
        dist.barrier()
    return Path("data/toy/manifest.jsonl")


def load_clip(name, pretrained, device):
    """tgmae.load_clip, for --clip and --clip-pretrained: without a hub it says so in seconds, and
    errors name the flags and the ways out."""
    on_disk = name.startswith("local-dir:") or Path(str(pretrained)).is_file()
    online = on_disk or weights.work_offline_if_no_hub()
    try:
        return tgmae.load_clip(name, pretrained, device)
    except ValueError as error:
        reason = str(error.__cause__).strip().splitlines()[0]
        reason = reason if online else "the hub cannot be reached"
        raise ValueError(
            f"--clip {name} --clip-pretrained {pretrained}: {reason}. Ways out: --clip-pretrained "
            "FILE (weights on disk), --clip local-dir:FOLDER (an open_clip folder), or a manifest "
            "with text maps"
        ) from error


def gather_objects(mine):
    """What each process holds, in order of ranks."""
    parts = [mine] * rank_and_world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    return parts


def last_line(error):
    """What an exception says, in one line: a loader process puts its traceback in front of the
    message."""
    if isinstance(error, torch.OutOfMemoryError):  # followed by a page of advice
        return ". ".join(str(error).split(". ")[:2])
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    text += "; `ulimit -n 65536` allows more" * (os.strerror(errno.EMFILE) in text)
    return text.removeprefix("dataset.VideoError: ").removeprefix("ValueError: ")


@functools.cache
def say_once(line):
    """Of process 0."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def clip_bytes(config):
    return config.in_chans * config.num_frames * config.image_size**2


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
    return last + (peak - last) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    )


MAX_REPLACEMENTS = 100  # bad videos in a row before all are thought to be bad


class TrainingClips(torch.utils.data.Dataset):
    """A dataset of (epoch, index) -> sample. A subclass has load(place, seed), which makes a dict
    of record number `place`; the seed follows from (the run's seed, epoch, index) alone, never from
    a worker's history, so a run that is resumed sees the same samples. A video that cannot be read
    gives its place to another, drawn from the same numbers; the sample's "bad" lists [(video, why),
    ...]. replace_bad=False: it is a VideoError instead."""

    def __init__(self, records, seed, *, replace_bad=True):
        self.records, self.run_seed = records, seed
        self.attempts = min(len(records), MAX_REPLACEMENTS) if replace_bad else 1

    def __len__(self):
        return len(self.records)

    def _places(self, epoch, index):
        """`index`, then the others in random order."""
        yield index
        generator = torch.Generator().manual_seed(seed_of(self.run_seed, epoch, index, 0))
        yield from (
            i for i in torch.randperm(len(self), generator=generator).tolist() if i != index
        )

    def __getitem__(self, epoch_and_index):
        (epoch, index), bad = epoch_and_index, []
        for place in itertools.islice(self._places(epoch, index), self.attempts):
            try:
                return {**self.load(place, seed_of(self.run_seed, epoch, index, 1)), "bad": bad}
            except dataset.VideoError as error:
                bad.append((self.records[place]["video"], str(error)))
        raise dataset.VideoError(
            f"{len(bad)} video(s) in a row cannot be read, the last: {bad[-1][1]}"
        )


class Share(NamedTuple):
    """A step's videos, and how the processes share them."""

    videos: int  # of a step
    forward: int  # of a process in a forward
    accum: int  # forwards a step


def share_step(forward, accum, videos=None):
    """Splits a step over the processes that there are: `accum` forwards of `forward` videos each;
    or, where a run goes on, the `videos` that its steps had, at most `forward` at a time. A
    remainder that cannot be split evenly is left out of every step. More processes than videos:
    ValueError."""
    _, world = rank_and_world()
    videos = videos or forward * accum * world
    mine = videos // world
    if not mine:
        raise ValueError(f"{world} processes cannot share a step of {videos} video(s)")
    accum = -(-mine // forward)
    return Share(videos, mine // accum, accum)


def init_loader(_=None):
    """worker_init_fn of loader processes: one for which its run would wait in vain ends, and the
    run with it."""
    if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
        os._exit(1)  # the run was killed before; torch watches whomever it finds as parent

    def end(error):
        print(f"loader: a batch cannot be handed over: {last_line(error)}", file=sys.stderr)
        os._exit(1)

    # multiprocessing itself goes on without what found no shared memory, or no open file.
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: end(error))
    sys.excepthook = lambda kind, error, trace: end(error)


def init_run_loader(_=None):
    """The same for a run that saves when a scheduler sends SIGTERM to all processes: it needs its
    loaders until then, and they end when it does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    init_loader()


SHM = Path("/dev/shm")  # where loaders put batches


def fit_loaders(workers, batch, spare=0):
    """-> how many loader processes, at most `workers`, and how many batches of each ahead, of
    `batch` bytes, leave `spare` bytes of shared memory free. ValueError if not even one does."""
    free = shutil.disk_usage(SHM).free if SHM.exists() else sys.maxsize
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = (free - spare) // batch - 2  # one more is handed over, one in use
    if not workers or room >= 2 * workers:
        return workers, 2
    has = f"{SHM} has {free / 1e6:,.1f} MB free for each process"
    ways = "docker run --shm-size=... or --ipc=host, a smaller --batch-size, --workers 0"
    if room < 1:
        need = f"one loader needs {(3 * batch + spare) / 1e6:,.1f} MB for its batches"
        raise ValueError(f"--workers {workers}: {has}, {need}: {ways}")
    fewer = min(workers, room)
    now = f"{fewer} loaders instead of {workers}, each one batch ahead"
    say_once(f"note    {has}, a batch takes {batch / 1e6:,.1f} MB: {now}. For more: {ways}")
    return fewer, 1


PATIENCE = 30 * 60, 20  # seconds for a batch to come, and when SIGTERM has come


_stop = {"asked": False}


def ask_to_stop(*_):
    """At SIGTERM: the run will save and stop after this step, see Run."""
    _stop["asked"] = True
    if signal.alarm(0):  # a batch is awaited
        signal.alarm(PATIENCE[1])


def asked_to_stop():
    return _stop["asked"]


def no_batch(*_):
    """At SIGALRM, while a batch is awaited."""
    end_loaders()  # they might not listen
    came = "SIGTERM came, and " if asked_to_stop() else ""
    raise TimeoutError(f"{came}no batch for {PATIENCE[asked_to_stop()]} s: ended without saving")


def batches_of(data, workers, *, bytes=1, spare=0, init=init_run_loader, **more):
    """Yields the batches of a DataLoader, which take `bytes` bytes each, see fit_loaders.
    TimeoutError if one does not come."""
    workers, ahead = fit_loaders(workers, bytes, spare)
    more |= {"worker_init_fn": init, "prefetch_factor": ahead} if workers else {}
    stream = iter(DataLoader(data, num_workers=workers, **more))
    signal.signal(signal.SIGALRM, no_batch)
    while True:
        signal.alarm(PATIENCE[0])
        if asked_to_stop():
            signal.alarm(PATIENCE[1])
        try:
            batch = next(stream)
        except StopIteration:
            return
        finally:
            signal.alarm(0)
        yield batch


def training_batches(data, share, args, step, steps_per_epoch, collate, **room):
    """Batches of samples for this process, share.accum of them a step, from global step `step` on
    to the end of the last epoch. An epoch's order follows from the seed alone, whatever the number
    of processes. The loader processes are the same all along, and go on into the next epoch; `room`
    as in batches_of."""
    rank, world = rank_and_world()

    def order():
        for epoch in range(step // steps_per_epoch, args.epochs):
            generator = torch.Generator().manual_seed(args.seed + epoch)
            indices = torch.randperm(len(data), generator=generator).tolist()
            for place in range(max(0, step - epoch * steps_per_epoch), steps_per_epoch):
                mine = indices[place * share.videos : (place + 1) * share.videos][rank::world]
                yield from ((epoch, index) for index in mine[: share.forward * share.accum])

    return batches_of(
        data,
        args.workers,
        **room,
        batch_size=share.forward,
        sampler=order(),
        collate_fn=collate,
        pin_memory=args.device == "cuda",
    )


def add_run_flags(add):
    """The flags of a Run, for train.py and eval.py finetune."""
    add(
        "--save-steps",
        type=int,
        default=0,
        help="steps between checkpoints (0: none between epochs)",
    )
    add(
        "--save-minutes",
        type=float,
        default=10,
        help="minutes between checkpoints (0: none between epochs)",
    )
    add(
        "--keep", type=int, default=0, help="how many checkpoints stay as step-N.pt, beside last.pt"
    )
    yes_no = argparse.BooleanOptionalAction
    add("--resume", action=yes_no, default=True, help="go on from the run folder's last.pt")


RUN_FLAGS = "save_steps", "save_minutes", "keep"


def check_flags(args, *, positive=(), not_negative=()):
    """ValueError that names the first of these flags, of those that there are, with a value that
    cannot be."""
    for name in (*positive, *not_negative):
        value = getattr(args, name, 1)
        if value < 0 or value == 0 and name in positive:
            flag, must = (
                name.replace("_", "-"),
                "be positive" if name in positive else "not be negative",
            )
            raise ValueError(f"--{flag} {value}: must {must}")


def load_last(args):
    """The checkpoint from which the run in --out goes on, None if it begins. The same one for all
    processes: a ValueError where a machine sees another."""
    path = Path(args.out) / "last.pt"
    saved = weights.load_file(path) if args.resume and path.exists() else None
    if saved and not {"args", "step", "videos"} <= saved.keys():
        raise ValueError(
            f"{path}: not a checkpoint that a run goes on from; another --out, or --no-resume"
        )
    steps = gather_objects(saved["step"] if saved else 0)
    if len(set(steps)) > 1:
        here = steps[rank_and_world()[0]]
        raise ValueError(
            f"{path}: holds step {here} here, {steps[0]} for process 0: machines share --out"
        )
    return saved


def refuse_another_run(args, then, now, keys):
    """ValueError if what the run in --out was made with differs in one of the keys."""
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in keys if then.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"{args.out}/last.pt is of another run ({', '.join(changed)}): another --out, or "
            "--no-resume to start over"
        )


@contextlib.contextmanager
def naming(path):
    """Within it an OSError, such as a full disk's, names `path`, which by itself it does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot be written: {error.strerror or error}", str(path)
        ) from error


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


def _append(path, text):
    # Names that are no UTF-8 stay what they are.
    with naming(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def append_log(path, line):
    """Adds a dict to a file of JSON lines."""
    _append(path, json.dumps(line) + "\n")


def _cut_log(path, step):
    """Drops the lines after `step`: those steps will be taken again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(path, "w") as file:
        file.write("".join(kept))


def save_checkpoint(path, *, keep=0, **state):
    """Writes `state` to `path`. With keep, a link to it stays as step-N.pt, and only the newest
    `keep` of these do."""
    with replacing(path) as file:
        torch.save(state, file)
    if keep:
        numbered = path.with_name(f"step-{state['step']:08}.pt")
        numbered.unlink(missing_ok=True)
        os.link(path, numbered)
        written = sorted(path.parent.glob("step-*.pt"), key=lambda file: file.stat().st_mtime)
        for old in written[:-keep]:
            old.unlink()


def lock_folder(out):
    """-> a file that holds a lock as long as it is open: the kernel frees it with its owner, and
    loaders do not inherit it. ValueError if another run has it."""
    file = open(out / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{out}: another run is writing there; another --out") from error
    except OSError as error:  # file systems without locks
        note = f"note    {out}/lock: {error.strerror}; nothing keeps a second run out"
        print(note, file=sys.stderr)
    return file


MAX_NON_FINITE = 10  # steps in a row without finite numbers before a run stops


class Run:
    """A training run: its folder and log, where it stands, and when it saves, leaves out a step,
    stops. Inside `with`, SIGTERM asks it to save and stop. All processes call agree, log and save
    together."""

    def __init__(self, args, step, steps_per_epoch):
        self.args, self.step, self.steps_per_epoch = args, step, steps_per_epoch
        self.total = args.epochs * steps_per_epoch
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rank, self.world = rank_and_world()
        if self.rank == 0:
            self.lock = lock_folder(self.out)
            _cut_log(self.out / "log.jsonl", step)
        self.skipped = 0  # steps in a row
        self.stopping = False
        self.saved_step, self.saved_at = step, time.monotonic()
        self.bar = progress(total=self.total, initial=step, unit="step", disable=self.rank > 0)

    def __enter__(self):
        _stop["asked"] = False
        self.before = signal.signal(signal.SIGTERM, ask_to_stop)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)
        self.bar.close()

    def note_bad(self, bad):
        """Lists videos that could not be read in bad_videos.txt, once each, with the reason."""
        path = self.out / "bad_videos.txt"
        if bad:
            how = {"encoding": "utf-8", "errors": "surrogateescape"}
            known = path.read_text(**how) if path.exists() else ""
            new = {video: why for video, why in bad if f"\n{video}\t" not in f"\n{known}"}
            _append(path, "".join(f"{video}\t{why}\n" for video, why in new.items()))

    def agree(self, sums, norms, videos):
        """Losses and counts of this process's step (n,), norms of the gradient, the step's videos
        -> sums over all processes, and, if a number of any process is not finite, the videos to
        blame: then every process must leave the step out. They are those of the processes whose
        first sum is not finite, or of all if there is none."""
        suspect = not sums[0].isfinite()
        broken = not sums.isfinite().all() or not all(map(math.isfinite, norms))
        sums = torch.cat([sums, sums.new_tensor([broken, suspect, asked_to_stop()])])
        if self.world > 1:
            dist.all_reduce(sums)
        *_, broken, suspects, signalled = sums.tolist()
        self.stopping = signalled > 0
        blamed = gather_objects(videos if suspect or not suspects else []) if broken else []
        return sums[:-3], sorted(set(itertools.chain(*blamed)))

    def log(self, line, blamed=()):
        """Ends a step: its line in log.jsonl. ValueError after too many in a row without finite
        numbers."""
        self.step += 1
        self.skipped = self.skipped + 1 if blamed else 0
        line = {key: value if math.isfinite(value) else None for key, value in line.items()}
        self.bar.set_postfix(
            {key: line[key] for key in ("mae", "vt", "loss", "wait") if key in line}, refresh=False
        )
        self.bar.update()
        if self.rank == 0:
            append_log(self.out / "log.jsonl", line | ({"skipped": blamed} if blamed else {}))
        if self.skipped == MAX_NON_FINITE:
            raise ValueError(
                f"step {self.step}: {self.skipped} in a row without a finite loss and gradient, "
                f"the videos are in {self.out}/log.jsonl; {self.out}/last.pt is as it was, of "
                f"step {self.saved_step}"
            )

    def save(self, state):
        """Writes last.pt, state() and all, if that is due: at the end of an epoch, after
        --save-steps or --save-minutes, when asked to stop (then SystemExit); not between steps that
        were left out."""
        args, last = self.args, self.step == self.total
        due = self.step % self.steps_per_epoch == 0 or self.stopping
        due |= args.save_steps > 0 and self.step % args.save_steps == 0
        due |= args.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * args.save_minutes
        if due and (last or not self.skipped):
            if self.rank == 0:
                save_checkpoint(self.out / "last.pt", keep=args.keep, step=self.step, **state())
            self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.stopping and not last:
            if self.world > 1:
                dist.barrier()  # until process 0 has written
            self.bar.close()
            if self.rank == 0:
                print(
                    f"stopped by SIGTERM; {self.out}/last.pt holds step {self.saved_step}",
                    file=sys.stderr,
                )
            sys.exit(
                128 + signal.SIGTERM
            )  # as for a process that the signal ends: the run is not finished


@contextlib.contextmanager
def one_line_errors(script, less):
    """For a script's main: a user's mistake is one line and exit code 1, and so is a lack of
    memory, with what needs `less`; anything else keeps its traceback. Names that are no UTF-8 can
    be printed."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {last_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: {last_line(error)}; what needs less: {less}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"{script}: {error}")  # the loader has said why, or the kernel's log does
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ==================================================================================================
# Command line.
# ==================================================================================================


def check_args(args):
    positive = "epochs", "batch_size", "accum", "repeat", "stride", "temperature"
    not_negative = (
        "num_captions",
        "blr",
        "min_lr",
        "weight_decay",
        "clip_grad",
        "workers",
        "seed",
        *RUN_FLAGS,
    )
    check_flags(args, positive=positive, not_negative=not_negative)
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask-ratio {args.mask_ratio}: must lie between 0 and 1")
    if not (args.mae or args.vt):
        raise ValueError("--no-mae without --vt leaves nothing to optimise")
    if args.batch_size % args.repeat:
        raise ValueError(
            f"--batch-size {args.batch_size} is not divisible by --repeat {args.repeat}"
        )
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs}: must lie in 0 to --epochs {args.epochs}"
        )


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction

    def either(name, help, **more):  # a flag whose default depends on the data
        key = name[2:].replace("-", "_")
        more.setdefault("default", argparse.SUPPRESS)
        add(name, help=f"{help} (toy: {TOY[key]}, other data: {REAL[key]})", **more)

    add("--data", default="toy", help="toy, or a manifest (JSON lines, see captions.py)")
    add("--split", default="train", help="split of the manifest to train on")
    add(
        "--val-split",
        default=argparse.SUPPRESS,
        help="split for held-out losses after each epoch (none)",
    )
    either("--preset", "size of the model", choices=PRESETS)
    add(
        "--mask",
        default="tube",
        choices=MASK_RATIOS,
        help="noise, most motion, or most like the caption",
    )
    add(
        "--mask-ratio",
        type=float,
        default=argparse.SUPPRESS,
        help=f"share of cubes masked ({MASK_RATIOS})",
    )
    add(
        "--bottom-k",
        action=yes_no,
        default=False,
        help="mask the lowest scores instead of the highest",
    )
    add("--vt", action=yes_no, default=False, help="optimise the video-text contrastive loss")
    add("--mae", action=yes_no, default=True, help="optimise the reconstruction loss")
    add("--vt-weight", type=float, default=1.0, help="weight of the contrastive loss")
    add("--temperature", type=float, default=0.07, help="of the contrastive loss")
    either(
        "--clip",
        "open_clip model, hf-hub:NAME or local-dir:FOLDER; if given, vt is at least watched",
    )
    add("--clip-pretrained", default="openai", help="tag of open_clip, or a file of weights")
    add("--num-captions", type=int, default=0, help="captions to draw from, evenly spread (0: all)")
    add(
        "--init",
        default=argparse.SUPPRESS,
        help="checkpoint to start from: ours, VideoMAE's, transformers'",
    )
    add(
        "--grad-checkpointing",
        action=yes_no,
        default=False,
        help="less memory for about a third more time",
    )
    either("--epochs", "passes over the data", type=int)
    either("--warmup-epochs", "epochs of linear warm-up", type=float)
    either("--batch-size", "clips per process and forward", type=int)
    add("--accum", type=int, default=1, help="forwards per step")
    add(
        "--repeat",
        type=int,
        default=1,
        help="clips of the same frames: crop, mask and caption of their own",
    )
    either("--blr", "learning rate per 256 clips of global batch", type=float)
    either("--min-lr", "last learning rate per 256 clips", type=float)
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on matrices only")
    add("--clip-grad", type=float, default=0.0, help="largest gradient norm (0: no limit)")
    either("--stride", "frames from one frame of a clip to the next", type=int)
    either("--flip", "mirror half the clips", action=yes_no)
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="loader processes per process",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    add(
        "--amp",
        action=yes_no,
        default=argparse.SUPPRESS,
        help="bf16 autocast (where the hardware has it)",
    )
    add("--compile", action=yes_no, default=False, help="torch.compile encoder and decoder")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks")
    add("--out", default=argparse.SUPPRESS, help="run folder (runs/DATA-MASK...)")
    add_run_flags(add)
    args = parser.parse_args(argv)

    given, defaults = vars(args), TOY if args.data == "toy" else REAL
    name = "-".join(
        [Path(args.data).stem, args.mask] + ["no-mae"] * (not args.mae) + ["vt"] * args.vt
    )
    late = {"mask_ratio": MASK_RATIOS[args.mask], "out": f"runs/{name}"}
    late |= dict.fromkeys(("val_split", "init", "amp"))
    args.clip_given = "clip" in given
    for key, value in {**defaults, **late}.items():
        given.setdefault(key, value)
    check_args(args)
    return args


# =================================================================================================
# Data.
# =================================================================================================


class Clips(TrainingClips):
    """Samples for training: `repeat` clips of the same frames of a video, each with its own crop,
    mask (unless CLIP has to see the clip first) and caption. text_from: None, "clip" (which will
    embed the captions) or "maps" (for which it has done so)."""

    def __init__(self, records, config, args, *, text_from, replace_bad=True):
        super().__init__(records, args.seed, replace_bad=replace_bad)
        self.config, self.args, self.text_from = config, args, text_from

    def load(self, place, seed):
        record, args, c = self.records[place], self.args, self.config
        generator = torch.Generator().manual_seed(seed)
        motion = args.mask == "mgm"
        with (
            dataset.open_video(record["path"], motion=motion) as video,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", dataset.NoMotionVectors)
            span = dataset.frame_range(video, record.get("start"), record.get("end"))
            numbers = dataset.clip_indices(*span, c.num_frames, args.stride, generator=generator)
            read = dataset.read_clip(video, numbers, motion=motion)
        frames, motion = read if motion else (read, None)
        chosen = self.draw_captions(record, args.repeat, generator)
        text_map = None
        if self.text_from == "maps":
            text_map = dataset.read_map(record["map_path"], record["captions"], args.clip)
        videos, masks = [], []
        for i in range(args.repeat):  # clips of the same frames
            crop = dataset.multi_scale_crop(frames.shape[1:3], flip=args.flip, generator=generator)
            videos.append(dataset.crop_frames(frames, crop, c.image_size))
            if args.mask == "tube":
                scores = tgmae.tube_scores(1, c.grid, generator=generator)
            elif args.mask == "mgm":
                scores = tgmae.motion_scores(
                    dataset.crop_motion(motion, crop, c.grid)[None], c.grid
                )
            elif text_map:
                firsts = numbers[:: c.tubelet_size]
                scores = dataset.map_scores(
                    text_map, chosen[i], firsts, crop, frames.shape[1:3], c.grid
                )[None]
            else:
                continue  # in `prepare`, on the device, where CLIP is
            masks.append(
                tgmae.topk_mask(
                    scores, args.mask_ratio, bottom_k=args.bottom_k, generator=generator
                )[0]
            )
        return {
            "video": torch.stack(videos),
            "mask": torch.stack(masks) if masks else None,
            "captions": [record["captions"][i] for i in chosen],
            "text": text_map.text[chosen] if text_map else None,
            "name": record["video"],
            "group": place,
            "seed": seed,
            "no_motion": any(w.category is dataset.NoMotionVectors for w in caught),
        }

    def draw_captions(self, record, count, generator):
        """Numbers of `count` captions, each drawn from --num-captions of them, evenly spread."""
        if not self.text_from:
            return []
        total = len(record["captions"])
        among = min(self.args.num_captions or total, total)
        drawn = torch.randint(among, (count,), generator=generator).tolist()
        return [(2 * i + 1) * total // (2 * among) for i in drawn]


def collate(samples):
    """Samples -> a batch of their clips: video (B,3,T,S,S) uint8, mask (B,N) or None, captions,
    ..."""
    repeat = len(samples[0]["video"])
    masks = [sample["mask"] for sample in samples]
    return {
        "video": torch.cat([sample["video"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "mask": None if masks[0] is None else torch.cat(masks),
        "captions": sum((sample["captions"] for sample in samples), []),
        "text": None
        if samples[0]["text"] is None
        else torch.cat([sample["text"] for sample in samples]),
        "groups": torch.tensor([sample["group"] for sample in samples]).repeat_interleave(repeat),
        "seeds": [sample["seed"] + i for sample in samples for i in range(repeat)],
        "bad": sum((sample["bad"] for sample in samples), []),
        "no_motion": sum(sample["no_motion"] for sample in samples),
    }


def prepare(batch, clip, args, config):
    """A batch on the device -> video (B,3,T,S,S) float, mask (B,N) on the CPU, text (B,E) or
    None."""
    video = tgmae.normalize(batch["video"].to(args.device, non_blocking=True))
    text, mask = batch["text"], batch["mask"]
    if text is not None:
        text = text.to(args.device, torch.float32, non_blocking=True)
    elif clip:
        text = tgmae.encode_text(*clip, batch["captions"])
    if mask is None:
        scores = tgmae.text_scores(
            clip[0], video, text, config.patch_size, config.tubelet_size
        ).cpu()
        mask = torch.cat(
            [
                tgmae.topk_mask(
                    score[None],
                    args.mask_ratio,
                    bottom_k=args.bottom_k,
                    generator=torch.Generator().manual_seed(seed),
                )
                for score, seed in zip(scores, batch["seeds"])
            ]
        )
    return video, mask, text


# =================================================================================================
# Optimisation.
# =================================================================================================


def make_optimizer(model, args):
    """AdamW as in VideoMAE: betas .9/.95, no decay on 1-D parameters and the mask token."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if p.ndim > 1 and name != "mask_token"]
    rest = [p for name, p in params if p.ndim <= 1 or name == "mask_token"]
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def freeze_unused(model, args, text_from):
    """What gets no gradient is frozen: DDP would wait for it, and stop at the second step."""
    if not text_from:
        model.predictor.requires_grad_(False)
    if not args.mae:
        for part in (model.decoder, model.encoder_to_decoder):
            part.requires_grad_(False)
        model.mask_token.requires_grad_(False)


def clip_together(model, args):
    """Parameters whose gradient norm --clip-grad limits together: those of a predictor that only
    watches by themselves, since it must not change what the others learn."""
    watching = [] if args.vt else list(model.predictor.parameters())
    others = [
        p for name, p in model.named_parameters() if args.vt or not name.startswith("predictor.")
    ]
    return [others, watching]


# =================================================================================================
# The run folder.
# =================================================================================================

# What a run that goes on must share with its checkpoint, beside the sizes of the model.
SAME = """data clips split text_from clip clip_pretrained mask mask_ratio bottom_k mae vt vt_weight
weight_decay seed epochs repeat""".split()


def settings(args, data):
    """What args.json and checkpoints keep of a run."""
    world = rank_and_world()[1]
    own = {
        "clips": len(data),
        "text_from": data.text_from,
        "world": world,
        "torch": str(torch.__version__),
    }
    return vars(args) | own


def go_on(saved, model, optimizer, args, data):
    """Loads a checkpoint of the same run; another one's is refused. -> its step, of how many
    processes it was."""
    config = asdict(model.config)
    now = settings(args, data) | config
    refuse_another_run(args, saved["args"] | saved["config"], now, (*SAME, *config))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    found = saved["step"], saved["args"]["world"]
    saved.clear()  # gigabytes
    return found


@torch.no_grad()
def reconstruct(video, mask, pred, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), pred (B,Nm,P) of TGMAE.forward, or None ->
    dict of videos (B,3,T,H,W) in [0,1]: `clip`, `masked` (in grey), and with pred `reconstructed`,
    in which masked cubes have their true mean and std put back, and `predicted`, in which they have
    not: 0.5 + pred/6 (4.7). Without norm_pix_loss these two are the same."""
    c = config
    std, mean = (
        video.new_tensor(v).view(3, 1, 1, 1) for v in (tgmae.IMAGENET_STD, tgmae.IMAGENET_MEAN)
    )
    cubes = tgmae.patchify(
        video * std + mean, c.patch_size, c.tubelet_size
    )  # (B,N,P), pixels in [0,1]
    _, ids_mask = tgmae.split_mask(mask, video.device)
    ids_mask = ids_mask[..., None].expand(-1, -1, c.patch_dim)  # (B,Nm,P)
    volumes = {"clip": cubes, "masked": cubes.scatter(1, ids_mask, 0.5)}
    if pred is not None:
        _, mean, std = tgmae.reconstruction_target(video, mask, c)
        pixels = (pred.unflatten(-1, (-1, 3)) * std + mean).flatten(2)  # (B,Nm,P)
        volumes["reconstructed"] = cubes.scatter(1, ids_mask, pixels)
        volumes["predicted"] = cubes.scatter(
            1, ids_mask, 0.5 + pred / 6 if c.norm_pix_loss else pixels
        )
    return {
        name: tgmae.unpatchify(volume, c.grid, c.patch_size, c.tubelet_size).clamp(0, 1)
        for name, volume in volumes.items()
    }


@torch.no_grad()
def draw_samples(path, model, video, mask, captions, mae):
    """samples.png: for each clip its frames, the frames with the mask, and, if a decoder was
    trained, the reconstruction, in which masked cubes have their own mean and std put back."""
    c = model.config
    model.eval()
    videos = reconstruct(video, mask, model(video, mask)["pred"].float() if mae else None, c)
    names = [name for name in ("clip", "masked", "reconstructed") if name in videos]
    every = max(1, c.num_frames // 8)  # at most 8 frames side by side
    rows = torch.stack([videos[name][:, :, ::every] for name in names], 1)  # (B, rows, C, t, S, S)
    rows = rows.mul(255).byte().cpu()
    B, _, _, t, S, _ = rows.shape
    scale, margin = max(1, 96 // S), 16
    S = S * scale
    height = len(names) * (S + 2) + margin  # of a clip
    sheet = Image.new("RGB", (90 + t * (S + 2), B * height), "white")
    draw = ImageDraw.Draw(sheet)
    for b in range(B):
        draw.text((4, b * height + 2), captions[b] if captions else "", fill="black")
        for row, name in enumerate(names):
            top = b * height + margin + row * (S + 2)
            draw.text((4, top + S // 2), name, fill="black")
            for i in range(t):
                frame = Image.fromarray(rows[b, row, :, i].permute(1, 2, 0).numpy())
                sheet.paste(frame.resize((S, S), Image.NEAREST), (90 + i * (S + 2), top))
    sheet.save(path)


# =================================================================================================
# The run.
# =================================================================================================


def check_text(manifest, record, with_maps):
    """ValueError if a record lacks what its text needs."""
    captioning = f"python captions.py caption {manifest} --source ... makes them"
    making = f"python captions.py maps {manifest} makes them"
    gone = with_maps and not os.path.exists(record.get("map_path", ""))
    for wrong, what in (
        ("failed" in record, 'is marked "failed": take it out'),
        (
            not record.get("captions"),
            f"has no captions, which --mask tgm, --vt and --clip need; {captioning}",
        ),
        ("map_path" in record and not with_maps, f"has a text map, others have none; {making}"),
        (gone and "map_path" not in record, f"has no text map, others have; {making}"),
        (gone, f"has no text map at {record.get('map_path')}; {making}"),
    ):
        if wrong:
            raise ValueError(f"{manifest}: {record['video']} {what}")


def clip_of_maps(args, manifest, record):
    """The CLIP that made the text maps, of which one is read. ValueError if --clip is another."""
    made_by = dataset.read_map(record["map_path"], record["captions"]).clip
    wanted = dataset.clip_name(args.clip, args.clip_pretrained)
    if args.clip_given and not made_by.startswith(wanted + " "):
        again = f"python captions.py maps {manifest} makes them again, with --force"
        raise ValueError(f"--clip: {wanted} is not the CLIP of the text maps, {made_by}; {again}")
    return made_by


def load_data(args, rank, world):
    """-> training records, validation records or None, and where text comes from: see Clips."""
    manifest = manifest_of(args.data)
    records = dataset.read_manifest(manifest, args.split)
    val = dataset.read_manifest(manifest, args.val_split) if args.val_split else None
    # VT is watched where that costs no download that nobody asked for: on the toy world, or with
    # --clip.
    with_text = args.mask == "tgm" or args.vt or args.data == "toy" or args.clip_given
    if with_text:  # what captions.py could not read is left out, and said so; never in validation
        failed = np.fromiter(("failed" in record for record in records), bool, len(records))
        if failed.any() and rank == 0:
            example = records[failed][0]["video"]
            print(
                f'{manifest}: {failed.sum()} clips marked "failed" are left out, such as {example}'
            )
        records = records[~failed]
        with_maps = any("map_path" in record for record in records[:1])
        for record in itertools.chain(records, val or ()):
            check_text(manifest, record, with_maps)
    for part, name in ((records, args.split), (val, args.val_split)):
        if part is not None and len(part) < world * args.batch_size // args.repeat * args.accum:
            raise ValueError(
                f"{manifest}: {len(part)} clips of split {name!r} are fewer than a step takes "
                f"({world} processes x --batch-size {args.batch_size} x --accum {args.accum} / "
                f"--repeat {args.repeat})"
            )
    if not with_text:
        return records, val, None
    videos = world * args.batch_size // args.repeat
    if videos < 2:
        what = "--vt" if args.vt else "VT, which is watched,"
        raise ValueError(f"{what} with a global batch of {videos} video: no negatives")
    if with_maps:
        args.clip = clip_of_maps(args, manifest, records[0])
    return records, val, "maps" if with_maps else "clip"


def build_model(args, text_from, record, *, init=True):
    """-> model on the device, with the weights of --init unless init=False, and (clip, tokenizer),
    or None where there are text maps, or no text."""
    clip = load_clip(args.clip, args.clip_pretrained, args.device) if text_from == "clip" else None
    config = replace(PRESETS[args.preset], temperature=args.temperature)
    if text_from:
        maps = None if clip else dataset.read_map(record["map_path"], record["captions"])
        text_dim = (tgmae.encode_text(*clip, ["a"]) if clip else maps.text).shape[1]
        config = replace(config, text_dim=text_dim)
    tgmae.topk_mask(
        torch.zeros(1, *config.grid), args.mask_ratio
    )  # refuses a ratio that masks none or all
    torch.manual_seed(args.seed)
    model = tgmae.TGMAE(config)
    if args.init and init:
        theirs, state, _ = weights.load_checkpoint(args.init)
        if theirs.text_dim != config.text_dim:  # its predictor was for another CLIP
            state = {
                name: value for name, value in state.items() if not name.startswith("predictor.")
            }
        try:
            missing = model.load_state_dict(state, strict=False).missing_keys
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(
                f"--init {args.init}: does not fit --preset {args.preset}: {reason}"
            ) from error
        if any(name.startswith("encoder.") for name in missing):
            raise ValueError(f"--init {args.init}: has no {missing[0]}")
    model.set_grad_checkpointing(args.grad_checkpointing)
    freeze_unused(model, args, text_from)
    return model.to(args.device), clip


def describe(args, model, data, share, steps_per_epoch, step, processes_then):
    """Prints what the run is, and, if it goes on from `step`, of how many processes it was."""
    world = rank_and_world()[1]
    c = model.config
    count = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in model.named_children()
    }
    t, h, w = c.grid
    batch, clips = args.batch_size * world, share.videos * args.repeat
    which, k = "lowest" if args.bottom_k else "highest", int(args.mask_ratio * h * w)
    mask = f"{args.mask}, {which} {k} of {h * w} patches"
    mask += f" in each of {t} slices"
    if args.mask == "tgm":
        online = f"CLIP online ({args.clip}), {c.num_patches} image embeddings a clip"
        source = online if data.text_from == "clip" else f"text maps ({args.clip})"
        mask += f"; similarity from {source}"
    loss = " + ".join(["MAE"] * args.mae + [f"{args.vt_weight:g} VT"] * args.vt)
    if data.text_from:
        loss += "" if args.vt else ", VT watched"
        loss += f"; {batch - args.repeat} negatives a clip, temperature {c.temperature:g}"
    left = clips - batch * args.accum
    left_out = f", {left} left out of each step" if left else ""
    print(
        f"model   {args.preset}, {sum(count.values()):.1f} M parameters (encoder "
        f"{count['encoder']:.1f}, decoder {count['decoder']:.1f}); clips of {c.num_frames} frames "
        f"{c.image_size}x{c.image_size}, {c.num_patches} cubes\ndata    {args.data}, split "
        f"{args.split}: {len(data)} videos, stride {args.stride}, {args.repeat} clip(s) a decode, "
        f"flip {'on' if args.flip else 'off'}\nmask    {mask}\nloss    {loss}\nsteps   "
        f"{args.epochs} epochs x {steps_per_epoch} steps; global batch {clips} = {world} "
        f"process(es) x {args.batch_size} x {args.accum}{left_out}; learning rate "
        f"{args.blr * clips / 256:.3g}\ndevice  {args.device}, {'bf16' if args.amp else 'fp32'}; "
        f"run folder {args.out}"
    )
    if processes_then:
        total = args.epochs * steps_per_epoch
        finished = ": finished, --no-resume starts over" if step == total else ""
        print(
            f"resume  at step {step} of {total}, so far of {processes_then} process(es){finished}"
        )
    sys.stdout.flush()


@torch.no_grad()
def validate(net, data, clip, args, rank, world):
    """Held-out losses, of the same clips and masks each time."""
    net.eval()
    samples = [
        (0, index) for index in DistributedSampler(data, world, rank, shuffle=False, drop_last=True)
    ]
    loader = batches_of(
        data,
        args.workers,
        bytes=args.batch_size * clip_bytes(data.config),
        batch_size=args.batch_size // args.repeat,
        sampler=samples,
        collate_fn=collate,
        drop_last=True,
    )
    losses = []
    for batch in loader:
        video, mask, text = prepare(batch, clip, args, data.config)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = net(video, mask, text, mae=args.mae, groups=batch["groups"].to(args.device))
        losses.append([out[name].item() for name in ("mae", "vt") if name in out])
    net.train()
    mean = torch.tensor(losses).mean(0).to(args.device)
    if world > 1:
        dist.all_reduce(mean)
    names = ["val_mae"] * args.mae + ["val_vt"] * bool(data.text_from)
    return dict(zip(names, (mean / world).tolist()))


def losses_and_gradients(net, batch, clip, args, config):
    """One forward and backward -> (4,) sums to log: mae, vt, bad videos, clips without motion
    vectors."""
    video, mask, text = prepare(batch, clip, args, config)
    groups = batch["groups"].to(args.device)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        out = net(video, mask, text, mae=args.mae, watch=not args.vt, groups=groups)
    zero = torch.zeros((), device=args.device)
    mae, vt = out.get("mae", zero), out.get("vt", zero)
    # VT that is only watched trains the predictor alone, so its weight changes nothing else.
    loss = mae + args.vt_weight * vt  # (3.5)
    (loss / args.accum).backward()
    counts = zero.new_tensor([len(batch["bad"]), batch["no_motion"]])
    return torch.cat(
        [torch.stack([mae.detach().float(), vt.detach().float()]) / args.accum, counts]
    )


def log_line(args, text_from, world, sums, step, epoch, lr, norm, took, waited):
    """What log.jsonl says of a step: losses (means over ranks), schedule, speed, and what went
    wrong."""
    mae, vt, bad, no_motion = sums.tolist()
    line = {"step": step, "epoch": epoch}
    line |= {"mae": round(mae / world, 6)} if args.mae else {}
    line |= {"vt": round(vt / world, 6)} if text_from else {}
    clips = args.batch_size * args.accum * world
    line |= {"lr": lr, "grad_norm": round(norm, 4), "clips_per_s": round(clips / took, 2)}
    return line | {"wait": round(waited / took, 3), "bad": int(bad), "no_motion": int(no_motion)}


def train(args, share, saved, model, clip, data, val):
    rank, world = rank_and_world()
    steps_per_epoch = len(data) // share.videos
    # Both rates, like VideoMAE's, are given per 256 clips.
    peak, last = (rate * share.videos * args.repeat / 256 for rate in (args.blr, args.min_lr))
    warmup = int(args.warmup_epochs * steps_per_epoch)
    optimizer = make_optimizer(model, args)
    step, processes_then = go_on(saved, model, optimizer, args, data) if saved else (0, None)
    if rank == 0:
        describe(args, model, data, share, steps_per_epoch, step, processes_then)
    if (
        args.compile
    ):  # each by itself: between them the mask's counts are read, which breaks a graph
        model.encoder.compile()
        model.decoder.compile()
    # No device_ids: the mask stays on the CPU.
    net = DistributedDataParallel(model) if world > 1 else model
    clipped = clip_together(model, args)

    def state():
        return {
            "config": asdict(model.config),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": run.step // steps_per_epoch,
            "videos": share.videos,
            "args": settings(args, data),
        }

    with Run(args, step, steps_per_epoch) as run:
        if rank == 0:
            (run.out / "args.json").write_text(json.dumps(settings(args, data), indent=1))
        batch = args.batch_size * clip_bytes(model.config)
        room = {"bytes": batch, "spare": 3 * batch if val else 0}  # for validate
        stream = training_batches(data, share, args, step, steps_per_epoch, collate, **room)
        while run.step < run.total:
            lr = learning_rate(run.step, warmup, run.total, peak, last)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            statistics = [buffer.clone() for buffer in model.predictor.buffers()]
            began, waited, sums, videos = time.perf_counter(), 0.0, 0, []
            for micro in range(args.accum):
                asked = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - asked
                videos += batch["names"]
                run.note_bad(batch["bad"])
                with (
                    contextlib.nullcontext()
                    if world == 1 or micro == args.accum - 1
                    else net.no_sync()
                ):
                    sums = sums + losses_and_gradients(net, batch, clip, args, model.config)
            limit = args.clip_grad or math.inf
            norms = [torch.nn.utils.clip_grad_norm_(part, limit).item() for part in clipped]
            sums, blamed = run.agree(sums, norms, videos)
            if blamed:  # BatchNorm has seen the bad numbers
                for buffer, value in zip(model.predictor.buffers(), statistics):
                    buffer.copy_(value)
            else:
                optimizer.step()
            epoch, took = run.step // steps_per_epoch, time.perf_counter() - began
            run.log(
                log_line(
                    args,
                    data.text_from,
                    world,
                    sums,
                    run.step + 1,
                    epoch,
                    lr,
                    norms[0],
                    took,
                    waited,
                ),
                blamed,
            )
            if val and run.step % steps_per_epoch == 0:
                losses = validate(net, val, clip, args, rank, world)
                if rank == 0:
                    append_log(run.out / "log.jsonl", {"step": run.step, "epoch": epoch, **losses})
            run.save(state)


def finish(args, model, clip, data):
    """The pictures, and what the reader should know."""
    out = Path(args.out)
    batch = collate([data[0, i * len(data) // 4] for i in range(min(4, len(data)))])
    video, mask, _ = prepare(batch, clip, args, model.config)
    with torch.compiler.set_stance("force_eager"):  # so few clips are not worth compiling for
        draw_samples(out / "samples.png", model, video, mask, batch["captions"], args.mae)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    skipped = [line["step"] for line in steps if "skipped" in line]
    last = [line for line in steps[-max(1, len(steps) // 20) :] if "skipped" not in line]
    names = [name for name in ("mae", "vt") if last and name in last[0]]
    means = ", ".join(
        f"{name} {sum(line[name] for line in last) / len(last):.3f}" for name in names
    )
    print(f"done    {means} (mean of the last {len(last)} steps); {out}/samples.png, {out}/last.pt")
    if skipped:
        print(
            f"numbers {len(skipped)} step(s) were not finite and left out, such as {skipped[0]}: "
            f"{out}/log.jsonl"
        )
    bad, no_motion = (sum(line[name] for line in steps) for name in ("bad", "no_motion"))
    if bad:
        print(
            f"bad     {bad} times a video could not be read, another took its place: "
            f"{out}/bad_videos.txt"
        )
    if no_motion:
        print(
            f"motion  {no_motion} times a video had no motion vectors: the difference of frames "
            "stood in"
        )


def main(argv=None):
    less = "a smaller --batch-size (with a larger --accum), --grad-checkpointing, --amp, "
    less += "a smaller --preset"
    with one_line_errors("train.py", less):
        args = parse_args(argv)
        rank, world = start_processes(args)
        saved = load_last(args)
        share = share_step(args.batch_size // args.repeat, args.accum, saved and saved["videos"])
        args.batch_size, args.accum = share.forward * args.repeat, share.accum
        records, val, text_from = load_data(args, rank, world)
        model, clip = build_model(args, text_from, records[0], init=not saved)
        data = Clips(records, model.config, args, text_from=text_from)
        val = val and Clips(val, model.config, args, text_from=text_from, replace_bad=False)
        train(args, share, saved, model, clip, data, val)
        if rank == 0:
            finish(args, model, clip, val or data)


if __name__ == "__main__":
    main()
