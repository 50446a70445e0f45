"""Runs that are killed, asked to stop, moved to other numbers of processes, fed bad numbers, or out
of disk or memory; and files that would run code."""

import argparse
import errno
import itertools
import json
import math
import multiprocessing as mp
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, argv, assert_same_run, log, needs_transformers, write_lines
from test_ranks import torchrun

import captions
import dataset
import eval as ev
import runs
import tgmae
import toy
import train
import weights

FAULTY, TRAIN = Path(__file__).with_name("faulty.py"), ROOT / "train.py"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
FEW = """--epochs 1 --warmup-epochs 0 --preset toy --stride 4 --no-flip --workers 0 --no-amp
         --batch-size 2 --out run"""


def run(*flags):
    train.main(argv(FEW, *flags))


def load(folder):
    return torch.load(f"{folder}/last.pt", weights_only=True)


def assert_finite(saved):
    assert all(value.isfinite().all() for value in saved["model"].values())


def steps(folder):
    """Steps in the log of a run that may be writing it."""
    path = Path(folder) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def start(*command, out=subprocess.PIPE):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; is inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    how = {"env": ONE_THREAD, "stdout": out, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *argv(*command)], start_new_session=True, **how)


def ends(process, code=0, seconds=300):
    """It ends with that code and leaves no process -> what it said."""
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    assert code == -signal.SIGKILL or not of_group(process.pid)
    return said


def wait_until(condition, process=None, seconds=120):
    last = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.01)


def of_group(group):
    """Processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path, config = tmp_path_factory.mktemp("checkpoint") / "start.pt", tgmae.Config(**TINY)
    model = tgmae.TGMAE(config).state_dict()
    runs.save_checkpoint(path, config=vars(config), model=model, args={})
    return path


@pytest.fixture(params=["train", "finetune"])
def command(request, world, checkpoint, workdir, manifest):
    """A run of 48 steps with a held-out part, but for its --out."""
    clip = dataset.read_manifest(world / "manifest.jsonl", "train")[24]
    test = {"video": clip["path"], "label": clip["label"], "split": "test"}
    data = manifest(12, held=4, extra=[test])
    flags = f"--data {data} --val-split held --epochs 8 --warmup-epochs 1"
    flags += " --batch-size 2 --workers 1 --save-minutes 1e-9 --no-amp"
    if request.param == "train":
        clip = f"--clip local-dir:{world / 'clip'}"
        return argv(TRAIN, flags, "--mask tgm --vt --preset toy --stride 4 --blr 0.05", clip)
    views = "--stride 2 --recipe other --views 1x1 --repeat 2 --lr 0.1"
    return argv(ROOT / "eval.py", "finetune", checkpoint, flags, views)


# ----------------------------------------------------------------------------------- kills, signals


@pytest.mark.slow
def test_killed_at_any_moment(command, kills=8):
    """SIGKILL: three times in the writing of a checkpoint; then half of the times at any moment of
    the process, half while it trains. The end is that of an undisturbed run, bit for bit."""
    command = [*command, "--epochs", 4 + kills]  # 6 steps each
    ends(start(*command, "--out whole"), seconds=600)
    for moment in ("half", "whole", "renamed"):
        ends(start(FAULTY, f"{moment}:2", *command, "--out parts"), -signal.SIGKILL)
    # Each step is saved: killed at 2, which is half a file, at 3, at 4, which is there.
    assert load("parts")["step"] == 4
    rng, hits = random.Random(kills), 0
    for kill in range(kills):
        before, began = steps("parts"), time.monotonic()
        process = start(*command, "--out parts")
        if kill % 2 == 0:
            wait_until(lambda: process.poll() is not None or steps("parts") != before)
            until_first_step = time.monotonic() - began
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, until_first_step + 0.3))
        hits += process.poll() is None
        process.kill()
        process.communicate(timeout=60)  # until the last loader, which has the pipe, is gone
    assert hits >= kills * 3 / 4, "it was at its end before it could be killed: more epochs, please"
    ends(start(*command, "--out parts"), seconds=600)
    assert_same_run("whole", "parts")
    assert not list(Path("parts").glob("*.partial"))


@pytest.mark.slow
def test_sigterm_saves_and_stops(command):
    """To all processes of the run, as a scheduler sends it; the loaders must not die before it has
    saved."""
    said = ends(start(FAULTY, "term:8", *command, "--out run --save-minutes 0"), 143)
    assert "stopped by SIGTERM" in said and "Traceback" not in said and "holds step 9" in said
    assert load("run")["step"] == log("run")[-1]["step"] == 9  # not at an epoch's end
    pictures = {path.name for path in Path("run").glob("*.png")}
    assert pictures == {"losses.png"} | (set() if "finetune" in command else {"samples.png"})
    for out in ("run", "whole"):
        ends(start(*command, "--out", out))
    assert_same_run("whole", "run")


@pytest.mark.slow
def test_no_batch_comes(command):
    """A disk that does not answer ends a run after a while, and soon after SIGTERM."""
    said = ends(start(FAULTY, "stuck:2", *command, "--out run"), 1)
    assert "no batch for 2 s: ended without saving" in said and "Traceback" not in said
    process = start(FAULTY, "stuck:1800", *command, "--out run")
    wait_until(lambda: len(of_group(process.pid)) > 1, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    said = ends(process, 1, seconds=25)
    assert "SIGTERM came, and no batch for 1 s" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_batch_that_cannot_be_handed_over(command):
    """Of which multiprocessing prints a traceback, and then goes on without it."""
    said = ends(start(FAULTY, "full:no-space", *command, "--out run"), 1)
    assert "loader: a batch cannot be handed over: no-space" in said and "Traceback" not in said
    assert "DataLoader worker" in said.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(command):
    process = start(*command, "--out run --workers 2")
    wait_until(lambda: steps("run") >= 5, process)
    assert len(of_group(process.pid)) >= 3
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_until(lambda: not of_group(process.pid), seconds=20)


@pytest.mark.slow
def test_an_unexpected_error_ends_the_run(command):
    """With its traceback, and with its loaders, which do not listen to SIGTERM."""
    said = ends(start(FAULTY, "raise:8", *command, "--out run --workers 2"), 1)
    assert said.strip().endswith("RuntimeError: nobody expects this")


@pytest.mark.parametrize("run_is_killed", [False, True])
def test_a_loader_whose_run_was_killed_before_it_watched(workdir, run_is_killed):
    def loader():
        time.sleep(0.5)
        runs.init_loader()
        Path("goes on").touch()

    def run_of_it():
        fork.Process(target=loader).start()
        os._exit(0) if run_is_killed else time.sleep(2)

    fork = mp.get_context("fork")
    process = fork.Process(target=run_of_it)
    process.start()
    process.join()
    time.sleep(2)
    assert Path("goes on").exists() != run_is_killed


@pytest.mark.parametrize("minutes, saved", [("1e-9", [1, 2, 3, 4]), ("0", [2, 4])])
def test_save_often(workdir, manifest, monkeypatch, minutes, saved):
    """--save-minutes; 0 is after epochs alone."""
    written = []
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, **s: written.append(s["step"]))
    run("--data", manifest(4), "--epochs 2 --save-minutes", minutes)
    assert written == saved


# ---------------------------------------------------------------------------------- other processes


def test_share_of_a_step(monkeypatch):
    for world, forward, accum, before, share in (
        (1, 16, 1, None, (16, 16, 1)), (8, 64, 2, None, (1024, 64, 2)),
        (4, 64, 1, 512, (512, 64, 2)), (16, 64, 1, 512, (512, 32, 1)),
        (1, 64, 1, 512, (512, 64, 8)),  # as many in all
        (3, 64, 1, 128, (128, 42, 1)), (7, 64, 1, 512, (512, 36, 2)),  # 126 of 128, 504 of 512
        (5, 2, 3, 5, (5, 1, 1)),
    ):  # fmt: skip
        monkeypatch.setattr(runs, "rank_and_world", lambda: (0, world))
        assert runs.share_step(forward, accum, before) == share
    with pytest.raises(ValueError, match="5 processes cannot share a step of 4"):
        runs.share_step(2, 1, 4)


def test_a_step_is_the_same_for_any_number_of_processes(monkeypatch):
    """The videos of each step, of all processes together; 3 processes take 12 of 16, 2 forwards of
    2 each."""

    class Numbers(runs.TrainingClips):
        def load(self, place, seed):
            return {"place": place}

    args = argparse.Namespace(seed=1, epochs=2, workers=0, device="cpu")
    data, seen = Numbers([{"video": str(i)} for i in range(50)], seed=1), {}
    for world in (1, 2, 3, 8):
        seen[world] = [set() for _ in range(6)]
        for rank in range(world):
            monkeypatch.setattr(runs, "rank_and_world", lambda: (rank, world))
            share = runs.share_step(4, 1, 16)
            how = (data, share, args, 0, lambda samples: {"samples": samples})
            for step, batches in runs.steps(*how):
                batches = [{sample["place"] for sample in b["samples"]} for b in batches]
                assert len(batches) == share[2]
                for mine in batches:
                    assert not mine & seen[world][step]
                    seen[world][step] |= mine
    assert [len(places) for places in seen[1]] == [16] * 6 and seen[1] == seen[2] == seen[8]
    assert all(len(three) == 12 and three < one for three, one in zip(seen[3], seen[1]))
    assert len(set.union(*seen[1][:3])) == 48


QUICK = "--preset toy --stride 4 --warmup-epochs 1 --blr 0.05 --workers 0 --no-amp"
QUICK += " --save-minutes 1e-9"


@pytest.mark.slow
def test_other_processes_and_compiled(workdir, manifest):
    """2 processes, then 1 that compiles, then 3: the losses of one process all along."""
    flags = argv("--data", manifest(12), QUICK, "--mask tube --batch-size 6 --epochs 12")
    train.main([*flags, "--out", "whole"])

    def goes_until(step, processes, more):
        agent = f"-m torch.distributed.run --standalone --nproc_per_node {processes}"
        process = start(agent, TRAIN, *flags, more, "--out parts")
        wait_until(lambda: steps("parts") >= step, process)
        for pid in of_group(process.pid):  # torchrun, too
            os.kill(pid, signal.SIGTERM)
        return process.communicate(timeout=60)[0]

    goes_until(5, 2, "--batch-size 3")
    first = load("parts")["step"]
    said = goes_until(first + 5, 1, "--compile")
    assert f"resume  at step {first} of 24" in said and "batch   6 clips = 1 x 6 x 1" in said
    done = torchrun(3, TRAIN, *flags, "--out", "parts", cwd=workdir)
    assert done.returncode == 0 and "batch   6 clips = 3 x 2 x 1" in done.stdout, done.stderr
    one, parts = log("whole"), log("parts")
    assert [line["step"] for line in parts] == list(range(1, 25))
    for a, b in zip(one, parts):
        assert a["mae"] == pytest.approx(b["mae"], abs=2e-4) and a["lr"] == b["lr"]


def workers_of(agent):
    """torchrun starts them in sessions of their own."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_one_is_lost(workdir, manifest, monkeypatch):
    """torchrun --nnodes 1:2, two agents on loopback. A worker is killed: both start again from the
    last checkpoint. Then a node is: the other goes on alone, to the end."""
    flags = f"--data {manifest(12)} {QUICK} --mask tube --batch-size 3 --epochs 500 --out run"
    agent = f"""-m torch.distributed.run --nnodes 1:2 --nproc_per_node 1 --max-restarts 3
        --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id test
        --rdzv-conf last_call_timeout=5 --local-addr 127.0.0.1 --monitor-interval 0.1"""
    # A store for each rendezvous: in one that all share, a new start finds the addresses of the
    # last.
    monkeypatch.setitem(ONE_THREAD, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    first = start(agent, TRAIN, flags, out=open("first.txt", "w"))
    time.sleep(1)  # the first is the rendezvous' host
    second = start(agent, TRAIN, flags, out=subprocess.DEVNULL)

    def goes_on(processes):  # with its first steps args.json is whole
        if steps("run") <= at + 20:
            return False
        return json.loads(Path("run/args.json").read_text())["world"] == processes

    try:
        at = -16
        wait_until(lambda: goes_on(2), first)
        os.kill(workers_of(second)[0], signal.SIGKILL)
        at = steps("run")
        wait_until(lambda: goes_on(2), first)
        for pid in (second.pid, *workers_of(second)):
            os.kill(pid, signal.SIGKILL)
        at = steps("run")
        wait_until(lambda: goes_on(1), first)
    finally:
        for process in (first, second):
            for pid in (process.pid, *workers_of(process)):
                os.kill(pid, signal.SIGKILL)
            process.wait()
    said = (workdir / "first.txt").read_text()
    assert "resume  at step" in said and "batch   6 clips = 1 x 3 x 2" in said
    assert [line["step"] for line in log("run")] == list(range(1, steps("run") + 1))


def test_machines_that_do_not_share_the_folder(monkeypatch, workdir):
    monkeypatch.setattr(runs, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(runs, "gather_objects", lambda mine: [120, mine])
    args = train.parse_args(["--data", "x.jsonl", "--out", "run"])
    with pytest.raises(ValueError, match="run/last.pt: holds step 0 here, 120 for process 0"):
        runs.load_last(args)


def test_two_runs_in_one_folder(workdir, manifest):
    """The second is refused, until the first has ended, however it did."""
    data, run_folder = manifest(4), workdir / "run"
    run_folder.mkdir()
    holds = "import fcntl, time; f = open('run/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    (workdir / "holds.py").write_text(holds + "print('locked', flush=True); time.sleep(60)")
    first = start("holds.py")
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(SystemExit, match="train.py: run: another run is writing there"):
        run("--data", data)
    assert not (run_folder / "log.jsonl").exists()
    first.kill()
    first.wait()
    run("--data", data)
    assert len(log("run")) == 2


def fails_with(number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


def test_a_file_system_without_locks(workdir, manifest, monkeypatch, capsys):
    """A run goes on, and says what it lacks."""
    monkeypatch.setattr(runs.fcntl, "lockf", fails_with(errno.ENOLCK))
    run("--data", manifest(4))
    assert "run/lock: No locks available; nothing keeps a second run out" in capsys.readouterr().err


def test_too_many_open_files(workdir, manifest, monkeypatch):
    """A line that says what to do; the video is not a bad one."""
    monkeypatch.setattr(dataset.av, "open", fails_with(errno.EMFILE))
    with pytest.raises(SystemExit, match="train.py: .*Too many open files; `ulimit -n 65536`"):
        run("--data", manifest(4))
    assert not Path("run/bad_videos.txt").exists()


# ------------------------------------------------------------------------ bad numbers, disk, memory


def poisoned(monkeypatch, when):
    """The batches of these numbers, counted from 1, are not finite."""
    prepare, numbers = train.prepare, itertools.count(1)

    def poisons(batch, *args):
        video, mask, text = prepare(batch, *args)
        return (video * math.nan if when(next(numbers)) else video), mask, text

    monkeypatch.setattr(train, "prepare", poisons)


@pytest.mark.slow
def test_bad_numbers_stop_all_processes(workdir, manifest):
    data = manifest(12)
    bad = json.loads(data.read_text().splitlines()[3])["video"]
    flags = argv(FEW, "--data", data, "--epochs 9 --save-minutes 1e-9")
    done = torchrun(2, FAULTY, f"nan:{bad}", TRAIN, *flags, cwd=workdir)
    assert done.returncode == 1
    good = len(log("run"))
    assert f"step {good + 1}: loss or gradient is not finite, of " in done.stderr
    assert bad in done.stderr and "Ways out: --no-amp" in done.stderr
    if good:
        assert load("run")["step"] == good
        assert_finite(load("run"))


def test_bad_numbers_stop_the_run(workdir, manifest, monkeypatch):
    """last.pt is the last good one."""
    poisoned(monkeypatch, lambda number: number > 7)
    with pytest.raises(SystemExit, match="step 8: loss or gradient is not finite, of .*/"):
        run("--data", manifest(12), "--epochs 5")
    assert load("run")["step"] == 6 and len(log("run")) == 7
    assert_finite(load("run"))


def test_a_gradient_that_is_not_finite(workdir, manifest, monkeypatch):
    """Though the loss is."""
    clip, count = torch.nn.utils.clip_grad_norm_, []

    def spoils(parameters, limit):
        count.append(None)  # twice a step: the predictor's are clipped by themselves
        if len(count) == 3:
            parameters[0].grad.view(-1)[0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoils)
    with pytest.raises(SystemExit, match="step 2: loss or gradient is not finite"):
        run("--data", manifest(8), "--save-minutes 1e-9")
    assert load("run")["step"] == 1
    assert_finite(load("run"))


@pytest.mark.slow
def test_bad_numbers_stop_finetune(checkpoint, workdir, manifest):
    data = manifest(8, held=2)
    bad = json.loads(data.read_text().splitlines()[3])["video"]
    flags = """--recipe other --epochs 1 --warmup-epochs 0 --batch-size 2 --stride 2 --views 1x1
        --repeat 1 --workers 0 --holdout 0 --test-split held --out tuned --data"""
    command = start(FAULTY, f"nan:{bad}", ROOT / "eval.py", "finetune", checkpoint, flags, data)
    said = ends(command, 1)
    assert "loss or gradient is not finite, of " in said and bad in said


def test_a_full_disk(workdir, world, manifest, checkpoint, monkeypatch):
    """One line that names the file, which stays what it was; nothing else is left."""
    flags, eval_flags = f"--data {manifest(8)}", f"--data {manifest(8)} --workers 0 --stride 2"
    sides = manifest(8, held=4, name="sides.jsonl")
    tuning = "--test-split held --views 1x1 --holdout 0.25 --batch-size 2 --epochs 1"
    tuning = f"finetune {checkpoint} --data {sides} --recipe other --stride 2 {tuning}"
    tuning += " --workers 0 --warmup-epochs 0"
    show = f"show {checkpoint} --data {manifest(8)} --test-split train --stride 2 --out show"
    show += f" --clip local-dir:{world / 'clip'}"
    features = f"features {checkpoint} {eval_flags} --out features.npz"
    run(flags)
    for main, words, name in (
        (train.main, f"{FEW} {flags} --out new", "new/last.pt"),
        (train.main, f"{FEW} {flags}", "run/log.jsonl"),
        (train.main, f"{FEW} {flags} --out new", "new/args.json"),
        (train.main, f"{FEW} {flags}", "run/samples.png"),
        (ev.main, f"{tuning} --out tuned", "tuned/best.pt"),
        (ev.main, features, "features.npz"),
        (ev.main, f"{features} --json result.json", "result.json"),
        (ev.main, show, "show.png"),
        (ev.main, show, "show.gif"),
        (captions.main, f"caption {manifest(8)} --source label --force", manifest(8)),
    ):
        path, partial = Path(name), Path(f"{name}.partial")
        path.parent.mkdir(exist_ok=True)
        before = path.exists() and path.read_bytes()
        partial.symlink_to("/dev/full")
        with pytest.raises(SystemExit) as stop:
            main(argv(words))
        said = stop.value.code
        assert said.endswith(f".py: {name}: cannot be written: No space left on device"), said
        assert (path.exists() and path.read_bytes()) == before and not partial.is_symlink()
    monkeypatch.setattr(runs, "append_log", lambda path, line: runs.append("/dev/full", "1"))
    with pytest.raises(SystemExit, match="train.py: /dev/full: cannot be written: No space left"):
        run(flags, "--no-resume")


def save(folder):
    runs.save_checkpoint(folder / "a.pt", numbers=[torch.ones(9999) for _ in range(99)])


def savez(folder):
    with runs.replacing(folder / "a.npz") as file:
        np.savez(file, numbers=np.random.rand(100_000))


@pytest.mark.parametrize("write, name", [
    (save, "a.pt"),
    (savez, "a.npz"),
    (lambda folder: runs.append(folder / "log", "1" * 200_000), "log"),
    (lambda folder: toy.build(folder / "world", clips=16, clip_steps=1), "world"),
    pytest.param(
        lambda folder: ev.main(argv("export", folder / "start.pt", "--out", folder / "out")), "out",
        marks=needs_transformers,
    ),
])  # fmt: skip
def test_a_disk_that_fills_up_meanwhile(checkpoint, tmp_path, write, name):
    """As if from 100,000 bytes on there were no room: torch, safetensors and zip files make errors
    of their own of it."""
    (tmp_path / "start.pt").symlink_to(checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises((ValueError, SystemExit)) as stop:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(stop.value).removeprefix("eval.py: ")
    assert said.startswith(f"{tmp_path / name}: cannot be written: ") and "too large" in said
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".world*"))


def test_out_of_memory_says_what_lowers_it(workdir, manifest, monkeypatch):
    def full(*_):
        torch_says = (
            "CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total capacity of ..."
        )
        raise torch.OutOfMemoryError(torch_says)

    monkeypatch.setattr(train, "prepare", full)
    less = "9 GiB; what needs less: a smaller --batch-size .*--grad-checkpointing"
    with pytest.raises(SystemExit, match=less):
        run("--data", manifest(4))


# ---------------------------------------------------------------------- machines, flags, processes


@pytest.mark.slow
def test_compile_without_a_compiler(workdir, manifest, monkeypatch):
    monkeypatch.setitem(ONE_THREAD, "CXX", "/nonexistent")
    monkeypatch.setitem(ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR", str(workdir / "cache"))
    said = ends(start(TRAIN, FEW, "--data", manifest(4), "--compile"), 1)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("train.py: --compile: InvalidCxxCompiler: No working")
    assert said.strip().endswith(
        "; leave it out, or install what it needs: g++, and triton for a GPU"
    )


@pytest.mark.parametrize("main, words", [
    (train.main, "--data x.jsonl"), (ev.main, "linear x.pt --data x"),
    (ev.main, "show x.pt --data x"),
    (captions.main, "caption x.jsonl --source llm"), (toy.main, "build --out x"),
])  # fmt: skip
def test_seeds_that_torch_does_not_tell_apart(tmp_path, monkeypatch, main, words):
    monkeypatch.chdir(tmp_path)
    for seed in (-1, 2**32, 2**64 - 1):
        with pytest.raises(SystemExit, match=f"^[a-z]*.py: --seed {seed}: must "):
            main(argv(words, "--seed", seed))
    one, other = (torch.Generator().manual_seed(seed) for seed in (7, 2**32 + 7))
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))


@pytest.mark.parametrize("cores, processes, workers", [
    (64, 1, 8), (64, 8, 8), (6, 2, 3), (6, 1, 6), (1, 1, 1), (4, 8, 1),
])  # fmt: skip
def test_as_many_loaders_as_there_are_cores(monkeypatch, cores, processes, workers):
    """That this process may use, shared with the others of the machine."""
    args = argparse.Namespace(device="cpu", amp=False, workers=None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    runs.start_processes(args)
    assert args.workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert runs.usable_cores() == 128
    args.workers = 0
    runs.start_processes(args)
    assert args.workers == 0


COMMANDS = [f"eval {command}" for command in ev.COMMANDS]
COMMANDS += ["train", "toy", "captions index", "captions caption", "captions maps"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_defaults_and_never_none(command, capsys, monkeypatch):
    script, *words = command.split()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    with pytest.raises(SystemExit):
        {"eval": ev, "train": train, "toy": toy, "captions": captions}[script].main([*words, "-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert "None" not in said and said.count("(default: ") > 2 * (words != ["export"])
    if "--workers" in said:
        assert "its share of the CPU cores, at most 8 --" in f"{said} --"


def says_nothing(kind):
    def fails(*_, **__):
        raise kind()

    return fails


@pytest.mark.parametrize("where, name, call, said", [
    (torch, "empty", lambda: runs.start_processes(argparse.Namespace(device="cpu", amp=False)),
     "--device cpu: RuntimeError"),
    ("open_clip", "create_model", lambda: weights.load_clip("local-dir:x", None, "cpu"),
     "--clip local-dir:x --clip-pretrained None: RuntimeError. Ways out"),
    ("transformers", "AutoTokenizer.from_pretrained",
     lambda: captions.from_pretrained("AutoTokenizer", "."), "--model .: OSError. Way out"),
    (weights, "_find", lambda: weights.load_checkpoint("."), ".: neither a checkpoint.*: OSError$"),
    (torch, "load", lambda: weights.load_file("x.pt"), "x.pt: cannot be loaded.*: OSError$"),
])  # fmt: skip
def test_errors_that_say_nothing(monkeypatch, where, name, call, said):
    """Are called by their class."""
    target = f"{where if isinstance(where, str) else where.__name__}.{name}"
    monkeypatch.setattr(target, says_nothing(RuntimeError if "Runtime" in said else OSError))
    with pytest.raises(ValueError, match=f"^{said}"):
        call()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bug", [ValueError, OSError])
def test_a_bug_keeps_its_traceback(workdir, manifest, monkeypatch, bug, workers):
    """In somebody's own changed copy, in loaders too: only a UserError becomes a line."""

    def crop(*_, **__):
        raise bug("a bug")

    monkeypatch.setattr(dataset, "multi_scale_crop", crop)
    with pytest.raises(bug, match="a bug"):
        run("--data", manifest(4), f"--workers {workers}")


def test_processes_part_after_a_good_end_alone(monkeypatch):
    """After an error the others may stand in a collective, for which parting would wait."""
    left = []
    monkeypatch.setattr(runs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runs.dist, "destroy_process_group", lambda: left.append(True))
    for error in (ValueError, RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(BaseException), runs.one_line_errors("train.py", "less"):
            raise error("a fault")
    assert not left
    with runs.one_line_errors("train.py", "less"):
        pass
    assert left


@pytest.mark.slow
def test_one_of_two_processes_fails(workdir, manifest):
    """While the other waits for it."""
    began = time.monotonic()
    flags = argv(FEW, "--data", manifest(12), "--epochs 100")
    done = torchrun(2, FAULTY, "raise:3", TRAIN, *flags, cwd=workdir)
    assert done.returncode == 1 and "nobody expects this" in done.stderr
    assert time.monotonic() - began < 90 and steps("run") == 3


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_buffers_are_not_sent(workdir, manifest, checkpoint, monkeypatch, command):
    """At each step: every process computes the same, and tables of positions do not change."""

    def wraps(model, **how):
        raise ValueError(f"wrapped {how}")

    data = manifest(12, held=4)
    monkeypatch.setattr(runs, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(runs, "gather_objects", lambda mine: [mine, mine])
    monkeypatch.setattr(runs, "DistributedDataParallel", wraps)
    with pytest.raises(ValueError, match="wrapped {'broadcast_buffers': False}"):
        if command == "train":
            run("--data", data)
        else:
            flags = "--recipe other --test-split held --batch-size 2 --workers 0 --out tuned"
            ev.main(argv("finetune", checkpoint, "--data", data, flags))


# -------------------------------------------------------------------------------------------- trust


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.fixture
def evil(workdir, world, manifest):
    """Files that would run code when unpickled: checkpoints, a CLIP, a text map."""
    for folder in ("run", "folder", "clip"):
        Path(folder).mkdir()
    torch.save({"model": Evil(), "config": {}}, "evil.pt")
    Path("bare.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"args": Evil()}, "run/last.pt")
    Path("folder/config.json").write_text('{"model_type": "videomae"}')
    torch.save({"x": Evil()}, "folder/pytorch_model.bin")
    config = (world / "clip/open_clip_config.json").read_bytes()
    Path("clip/open_clip_config.json").write_bytes(config)
    torch.save({"x": Evil()}, "clip/open_clip_pytorch_model.bin")
    data = manifest(4, name="data.jsonl")
    lines = [json.loads(line) | {"maps": "evil.npz"} for line in data.read_text().splitlines()]
    write_lines(Path("maps.jsonl"), lines)
    parts = ("similarity", "frames", "text", "captions", "clip")
    np.savez("evil.npz", **dict.fromkeys(parts, np.array([Evil()])))


@pytest.mark.parametrize("main, flags, named", [
    (run, "--data data.jsonl --out a --init evil.pt", "evil.pt: cannot be loaded"),
    (run, "--data data.jsonl --out a --init bare.pt", "bare.pt: cannot be loaded"),
    (run, "--data data.jsonl --out a --init folder", "model.bin: cannot be loaded"),
    (run, "--data data.jsonl", "run/last.pt: cannot be loaded"),
    (run, "--data data.jsonl --mask tgm --out a --clip ViT-B-32 --clip-pretrained evil.pt",
     "evil.pt: Weights only load failed"),
    (run, "--data data.jsonl --mask tgm --out a --clip local-dir:clip",
     "openai: Weights only load failed"),
    (run, "--data maps.jsonl --mask tgm --out a", "evil.npz: not a whole text map"),
    (ev.main, "linear evil.pt --data data.jsonl", "evil.pt: cannot be loaded"),
    (ev.main, "export bare.pt", "bare.pt: cannot be loaded"),
    (captions.main, "maps data.jsonl --clip local-dir:clip", "openai: Weights only load failed"),
])  # fmt: skip
def test_pickles_run_no_code(evil, main, flags, named):
    """They are refused in a line."""
    with pytest.raises(SystemExit) as stop:
        main(flags) if main is run else main(flags.split())
    assert named in str(stop.value) and "\n" not in str(stop.value)
    assert not Path("hacked").exists()
    pickle.loads(Path("bare.pt").read_bytes())
    assert Path("hacked").exists()  # it would


def test_checkpoints_of_other_things_are_told(workdir, manifest):
    """Safe to load, and still none."""
    data, sizes = manifest(4), vars(tgmae.Config(**TINY))
    model = tgmae.TGMAE(tgmae.Config(**TINY)).state_dict()
    embedding = "videomae.embeddings.patch_embeddings.projection.weight"
    for i, (saved, reason) in enumerate((
        ([1, 2], "holds a list"), ({"model": 5, "config": sizes}, "no dict of names"),
        ({"model": {1: 2}, "config": sizes}, "no dict of names"),
        ({"model": model, "config": 3}, "makes no model"),
        ({"model": model, "config": {"x": 1}}, "makes no model"),
        ({"model": {}, "config": sizes}, "has no"),
        ({"model": model, "config": sizes | {"depth": "two"}}, "makes no model"),
        ({"model": model, "config": sizes | {"num_heads": 5}}, "embed_dim, num_heads: "),
        ({"model": dict.fromkeys(model, "a"), "config": sizes}, "no dict of names and tensors"),
        ({"videomae.embeddings.x": torch.ones(1)}, "not VideoMAE's weights"),
        ({embedding: torch.ones(1, 1, 1, 1, 1)}, "config.json is needed"),
    )):  # fmt: skip
        torch.save(saved, f"{i}.pt")
        with pytest.raises(SystemExit) as stop:
            run("--data", data, f"--init {i}.pt")
        said = stop.value.code
        assert f"{i}.pt: " in said and reason in said and "\n" not in said


def test_a_manifest_writes_nowhere_else(world, tmp_path):
    """Names that climb out of the folder, absolute ones, and maps that are somewhere else: what is
    written stays beside the manifest."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    (away / "precious.npz").write_text("precious")
    clips = dataset.read_manifest(world / "manifest.jsonl")
    lines = [
        {"video": "../away/climb.mp4", "maps": "../away/precious.npz"},
        {"video": str(away / "absolute.mp4"), "maps": str(away / "precious.npz")},
        {"video": "../away/..mp4"},
    ]
    for line, clip in zip(lines, clips):
        (home / line["video"]).symlink_to(clip["path"])
    data = write_lines(home / "data.jsonl", [line | {"captions": ["a"]} for line in lines])

    def others():
        found = (path for path in tmp_path.rglob("*") if not path.is_relative_to(home))
        return {path: path.lstat().st_mtime_ns for path in found}

    before, clip = others(), f"local-dir:{world / 'clip'}"
    small = "--image-size 32 --patch-size 8 --every 8 --workers 0 --force"
    captions.main(argv("maps", data, "--clip", clip, small))
    made = [Path(record["map_path"]) for record in dataset.read_manifest(data)]
    assert all(path.exists() and (home / "maps") in path.resolve().parents for path in made)
    assert others() == before and (away / "precious.npz").read_text() == "precious"


# ---------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_soak(minutes=1):
    """Good and bad files: memory, open files, threads stay as they are, and Ctrl-C leaves no
    process."""
    said = ends(start(ROOT / "tests/soak.py", "--minutes", minutes), seconds=minutes * 60 + 200)
    assert "left after Ctrl-C: none" in said
