"""Runs a script with a fault in it, for test_faults.py: python faulty.py FAULT SCRIPT ARGUMENT...

FAULT  half:N     SIGKILL in the middle of writing the N-th checkpoint
       whole:N    SIGKILL when it is written, under its other name
       renamed:N  SIGKILL when it has its own name
       nan:NAME   the frames of that video are not finite
       term:N     SIGTERM, twice, to all processes of the run, as a scheduler and torchrun send it,
                  after N steps
       stuck:S    loaders wait for the disk for ever; PATIENCE is S seconds, and 1 after SIGTERM
       full:WHY   shared memory or files have run out: batches cannot be handed over
       raise:N    an error that nobody expects after N steps"""

import importlib
import io
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import runs  # noqa: E402
import train  # noqa: E402


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(moment, number):
    save, rename, count, number = torch.save, os.replace, 0, int(number)

    def saves(state, file):
        nonlocal count
        count += 1
        if moment == "half" and count == number:
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        save(state, file)

    def renames(one, other):
        if moment == "whole" and count == number:
            die()
        rename(one, other)
        if moment == "renamed" and count == number:
            die()

    torch.save, os.replace = saves, renames


def poisons(name):
    load, prepare = runs.TrainingClips.__getitem__, train.prepare

    def loads(self, key):  # fine-tuning's clips are floats
        sample = load(self, key)
        if sample["name"] == name and sample["video"].is_floating_point():
            sample["video"] = sample["video"] * math.nan
        return sample

    def prepares(batch, *more):
        video, mask, text = prepare(batch, *more)
        return (video * math.nan if name in batch["names"] else video), mask, text

    runs.TrainingClips.__getitem__, train.prepare = loads, prepares


def sticks(seconds):
    runs.PATIENCE, runs.GRACE = int(seconds), 1
    runs.TrainingClips.__getitem__ = lambda self, key: time.sleep(1000)


class Unsendable:
    def __init__(self, why):
        self.why = why

    def __reduce__(self):
        raise OSError(self.why)


def fills(why):
    load = runs.TrainingClips.__getitem__
    runs.TrainingClips.__getitem__ = lambda self, key: load(self, key) | {"bad": [Unsendable(why)]}


def terminate():
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.001)
    os.killpg(0, signal.SIGTERM)


def unexpected():
    raise RuntimeError("nobody expects this")


def after_step(happens, step):
    append = runs.append_log

    def appends(path, line):
        append(path, line)
        if line["step"] == int(step):
            happens()

    runs.append_log = appends


FAULTS = {
    "nan": poisons,
    "term": partial(after_step, terminate),
    "raise": partial(after_step, unexpected),
    "stuck": sticks,
    "full": fills,
} | {moment: partial(dies_at, moment) for moment in ("half", "whole", "renamed")}

if __name__ == "__main__":
    (kind, _, value), sys.argv = sys.argv[1].partition(":"), sys.argv[2:]
    FAULTS[kind](value)
    importlib.import_module(Path(sys.argv[0]).stem).main()  # with what was replaced in train
