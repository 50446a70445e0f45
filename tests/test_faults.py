"""Runs that are killed, asked to stop, moved to other numbers of processes, fed bad numbers, or out
of disk or memory; and files that would run code."""

import argparse
import errno
import json
import math
import multiprocessing as mp
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_ranks import torchrun

import captions
import dataset
import tgmae
import train

FAULTY = Path(__file__).with_name("faulty.py")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def steps(folder):
    """Steps in the log of a run that may be writing it."""
    path = Path(folder) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def start(command, cwd, out=subprocess.PIPE):
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as in a shell's background; would be inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=ONE_THREAD,
        stdout=out,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process=None, seconds=120):
    ends = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < ends, "waited in vain"
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


def assert_same_run(one, other):
    a, b = (torch.load(f"{folder}/last.pt", weights_only=True) for folder in (one, other))
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = a["optimizer"]["state"], b["optimizer"]["state"]
    assert all(
        torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0]
    )
    logs = [
        [{k: v for k, v in line.items() if k not in ("clips_per_s", "wait")} for line in log(f)]
        for f in (one, other)
    ]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "start.pt"
    config = tgmae.Config(**TINY)
    train.save_checkpoint(
        path, config=vars(config), model=tgmae.TGMAE(config).state_dict(), args={}
    )
    return path


@pytest.fixture(params=["train", "finetune"])
def command(request, world, checkpoint, workdir, manifest):
    """A run of 48 steps with a held-out part, but for its --out."""
    records = dataset.read_manifest(world / "manifest.jsonl", "train")
    held = [
        {"video": r["path"], "captions": r["captions"], "label": r["label"], "split": "held"}
        for r in records[20:24]
    ]
    data = manifest(12, extra=held)
    lines = [{"split": "train", **json.loads(line)} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--data", data, "--val-split", "held", "--epochs", 8, "--warmup-epochs", 1,
             "--batch-size", 2, "--workers", 1,
             "--save-minutes", 1e-9, "--no-amp"]  # fmt: skip
    if request.param == "train":
        clip = "--clip", f"local-dir:{world / 'clip'}"
        return [
            ROOT / "train.py",
            *flags,
            "--mask",
            "tgm",
            "--vt",
            "--preset",
            "toy",
            "--stride",
            4,
            "--blr",
            0.05,
            *clip,
        ]
    return [
        ROOT / "eval.py",
        "finetune",
        checkpoint,
        *flags,
        "--test-split",
        "held",
        "--stride",
        2,
        "--recipe",
        "other",
        "--views",
        "1x1",
        "--repeat",
        2,
        "--lr",
        0.1,
    ]


# ----------------------------------------------------------------------------------- kills, signals


@pytest.mark.slow
def test_killed_at_any_moment(command, workdir, kills=8):
    """SIGKILL: three times in the writing of a checkpoint; then half of the times at any moment of
    the process, half while it trains. The end is that of an undisturbed run, bit for bit."""
    command = [*command, "--epochs", 4 + kills]  # 6 steps each
    process = start([*command, "--out", "whole"], workdir)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    for moment in ("half", "whole", "renamed"):
        process = start([FAULTY, f"{moment}:2", *command, "--out", "parts"], workdir)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, said
    # Each step is saved: killed at 2, which is half a file, at 3, at 4, which is there.
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 4
    rng, hits = random.Random(kills), 0
    for kill in range(kills):
        before, began = steps("parts"), time.monotonic()
        process = start([*command, "--out", "parts"], workdir)
        if kill % 2 == 0:
            wait_until(lambda: process.poll() is not None or steps("parts") != before)
            until_first_step = time.monotonic() - began
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, until_first_step + 0.3))
        hits += process.poll() is None
        process.kill()
        process.communicate(
            timeout=60
        )  # until the last loader, which has the other end of the pipe, is gone
    assert hits >= kills * 3 / 4, "it was at its end before it could be killed: more epochs, please"
    process = start([*command, "--out", "parts"], workdir)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert_same_run("whole", "parts")
    assert not list(Path("parts").glob("*.partial"))


@pytest.mark.slow
def test_sigterm_saves_and_stops(command, workdir):
    """To all processes of the run, as a scheduler sends it; the loaders must not die before it has
    saved."""
    process = start(
        [FAULTY, "term:8", *command, "--out", "run", "--save-minutes", 0],
        workdir,
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said and "Traceback" not in said
    saved, lines = torch.load("run/last.pt", weights_only=True)["step"], log("run")
    assert saved == lines[-1]["step"] == 9 and "holds step 9" in said  # not at an epoch's end
    assert not of_group(process.pid)
    for out in ("run", "whole"):
        process = start([*command, "--out", out], workdir)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert_same_run("whole", "run")


@pytest.mark.slow
def test_no_batch_comes(command, workdir):
    """A disk that does not answer ends a run after a while, and soon after SIGTERM."""
    process = start([FAULTY, "stuck:2", *command, "--out", "run"], workdir)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "no batch for 2 s: ended without saving" in said, said
    assert "Traceback" not in said and not of_group(process.pid)
    process = start([FAULTY, "stuck:1800", *command, "--out", "run"], workdir)
    wait_until(lambda: len(of_group(process.pid)) > 1, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=25)
    assert process.returncode == 1 and "SIGTERM came, and no batch for 1 s" in said, said
    assert "Traceback" not in said and not of_group(process.pid)


@pytest.mark.slow
def test_a_batch_that_cannot_be_handed_over(command, workdir):
    """Of which multiprocessing prints a traceback, and then goes on without it."""
    process = start([FAULTY, "full:No space left", *command, "--out", "run"], workdir)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "loader: a batch cannot be handed over: No space left" in said
    assert "DataLoader worker" in said.splitlines()[-1] and not of_group(process.pid)


def test_loaders_fit_shared_memory(monkeypatch, capsys):
    """In batches of 10 bytes, two of which are handed over and in use."""
    for free, asked, processes, fits in (
        (180, 8, 1, (8, 2)), (179, 8, 1, (8, 1)), (99, 8, 1, (7, 1)), (30, 8, 1, (1, 1)),
        (30, 1, 1, (1, 1)), (40, 1, 1, (1, 2)), (360, 8, 2, (8, 2)), (359, 8, 2, (8, 1)),
        (0, 0, 1, (0, 2)),
    ):  # fmt: skip
        usage = argparse.Namespace(free=free)
        monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert train.fit_loaders(asked, 10) == fits
        said = capsys.readouterr().out
        assert (f"{fits[0]} loaders instead of {asked}" in said) == (fits[1] < 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    usage.free = 29
    with pytest.raises(ValueError, match="--workers 4: /dev/shm has 0.0 MB free.*--ipc=host"):
        train.fit_loaders(4, 10)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(command, workdir):
    process = start([*command, "--out", "run", "--workers", 2], workdir)
    wait_until(lambda: steps("run") >= 5, process)
    assert len(of_group(process.pid)) >= 3
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_until(lambda: not of_group(process.pid), seconds=20)


@pytest.mark.slow
def test_an_unexpected_error_ends_the_run(command, workdir):
    """With its traceback, and with its loaders, which do not listen to SIGTERM."""
    process = start([FAULTY, "raise:8", *command, "--out", "run", "--workers", 2], workdir)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and said.strip().endswith("RuntimeError: nobody expects this"), (
        said
    )
    assert not of_group(process.pid)


@pytest.mark.parametrize("run_is_killed", [False, True])
def test_a_loader_whose_run_was_killed_before_it_watched(workdir, run_is_killed):
    def loader():
        time.sleep(0.5)
        train.init_loader()
        Path("goes on").touch()

    def run():
        mp.get_context("fork").Process(target=loader).start()
        os._exit(0) if run_is_killed else time.sleep(2)

    process = mp.get_context("fork").Process(target=run)
    process.start()
    process.join()
    time.sleep(2)
    assert Path("goes on").exists() != run_is_killed


def test_save_often(workdir, manifest, monkeypatch):
    """--save-minutes; 0 is after epochs alone."""
    written, save = [], train.save_checkpoint
    monkeypatch.setattr(
        train, "save_checkpoint", lambda path, **s: written.append(s["step"]) or save(path, **s)
    )
    for minutes, steps in (("1e-9", [1, 2, 3, 4]), ("0", [2, 4])):
        written.clear()
        flags = ["--data", str(manifest(4)), *FEW, "--epochs", "2", "--save-minutes", minutes]
        train.main([*flags, "--out", minutes])
        assert written == steps


# ---------------------------------------------------------------------------------- other processes


def test_share_of_a_step(monkeypatch):
    for world, forward, accum, before, share in (
        (1, 16, 1, None, (16, 16, 1)), (8, 64, 2, None, (1024, 64, 2)),
        (4, 64, 1, 512, (512, 64, 2)), (16, 64, 1, 512, (512, 32, 1)),
        (1, 64, 1, 512, (512, 64, 8)),  # as many in all
        (3, 64, 1, 128, (128, 42, 1)), (7, 64, 1, 512, (512, 36, 2)),  # 126 of 128, 504 of 512
        (5, 2, 3, 5, (5, 1, 1)),
    ):  # fmt: skip
        monkeypatch.setattr(train, "rank_and_world", lambda: (0, world))
        assert train.share_step(forward, accum, before) == share
    with pytest.raises(ValueError, match="5 processes cannot share a step of 4"):
        train.share_step(2, 1, 4)


def test_a_step_is_the_same_for_any_number_of_processes(monkeypatch):
    """The videos of each step, of all processes together; 3 processes take 12 of 16, 2 forwards of
    2 each."""

    class Numbers(train.TrainingClips):
        def load(self, place, seed):
            return {"place": place}

    def as_dict(samples):
        return {"samples": samples}

    args = train.argparse.Namespace(seed=1, epochs=2, workers=0, device="cpu")
    data, seen = Numbers([{"video": str(i)} for i in range(50)], seed=1), {}
    for world in (1, 2, 3, 8):
        seen[world] = [set() for _ in range(6)]
        for rank in range(world):
            monkeypatch.setattr(train, "rank_and_world", lambda: (rank, world))
            share = train.share_step(4, 1, 16)
            for step, batches in train.steps(data, share, args, 0, as_dict, (0, 2)):
                batches = list(batches)
                assert len(batches) == share[2]
                for batch in batches:
                    mine = {sample["place"] for sample in batch["samples"]}
                    assert not mine & seen[world][step]
                    seen[world][step] |= mine
    assert [len(places) for places in seen[1]] == [16] * 6 and seen[1] == seen[2] == seen[8]
    assert all(len(three) == 12 and three < one for three, one in zip(seen[3], seen[1]))
    assert len(set.union(*seen[1][:3])) == 48


@pytest.mark.slow
def test_other_processes_and_compiled(workdir, manifest):
    """2 processes, then 1 that compiles, then 3: the losses of one process all along."""
    flags = ["--data", manifest(12), "--preset", "toy", "--stride", 4, "--mask", "tube",
             "--batch-size", 6, "--epochs", 12,
             "--warmup-epochs", 1, "--blr", 0.05, "--workers", 0, "--no-amp",
             "--save-minutes", 1e-9]  # fmt: skip
    train.main([*map(str, flags), "--out", "whole"])

    def goes_until(step, processes, *more):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        process = start([*command, ROOT / "train.py", *flags, *more, "--out", "parts"], workdir)
        wait_until(lambda: steps("parts") >= step, process)
        for pid in of_group(process.pid):  # torchrun, too
            os.kill(pid, signal.SIGTERM)
        return process.communicate(timeout=60)[0]

    goes_until(5, 2, "--batch-size", 3)
    first = torch.load("parts/last.pt")["step"]
    said = goes_until(first + 5, 1, "--compile")
    assert f"resume  at step {first} of 24" in said
    assert "batch   6 clips = 1 x 6 x 1" in said
    done = torchrun(3, ROOT / "train.py", *flags, "--out", "parts", cwd=workdir)
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
    flags = ["--data", manifest(12), "--preset", "toy", "--stride", 4, "--mask", "tube",
             "--batch-size", 3, "--epochs", 500,
             "--warmup-epochs", 1, "--blr", 0.05, "--workers", 0, "--no-amp",
             "--save-minutes", 1e-9, "--out", "run"]  # fmt: skip
    agent = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", 1,
             "--max-restarts", 3, "--rdzv-backend",
             "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test",
             "--local-addr", "127.0.0.1",
             "--rdzv-conf", "last_call_timeout=5", "--monitor-interval", 0.1]  # fmt: skip
    # A store for each rendezvous: in one that all share, a new start finds the addresses of the
    # last.
    monkeypatch.setitem(ONE_THREAD, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    said = [open(workdir / name, "w+") for name in ("first.txt", "second.txt")]
    first = start([*agent, ROOT / "train.py", *flags], workdir, said[0])
    time.sleep(1)  # the first is the rendezvous' host
    second = start([*agent, ROOT / "train.py", *flags], workdir, said[1])

    def goes_on(processes):  # with its first steps args.json is whole
        return (
            steps("run") > at + 20
            and json.loads(Path("run/args.json").read_text())["world"] == processes
        )

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
    numbers = [line["step"] for line in log("run")]
    assert numbers == list(range(1, len(numbers) + 1))


def test_machines_that_do_not_share_the_folder(monkeypatch, workdir):
    monkeypatch.setattr(train, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(
        train.dist,
        "all_gather_object",
        lambda steps, mine: steps.__setitem__(slice(2), [120, mine]),
    )
    args = train.parse_args(["--data", "x.jsonl", "--out", "run"])
    with pytest.raises(ValueError, match="run/last.pt: holds step 0 here, 120 for process 0"):
        train.load_last(args)


def test_two_runs_in_one_folder(workdir, manifest):
    """The second is refused, until the first has ended, however it did."""
    (workdir / "run").mkdir()
    holds = "import fcntl, time; f = open('run/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    first = start(["-c", holds + "print('locked', flush=True); time.sleep(60)"], workdir)
    assert first.stdout.readline() == "locked\n"
    flags = ["--data", str(manifest(4)), *FEW, "--out", "run"]
    with pytest.raises(SystemExit, match="train.py: run: another run is writing there"):
        train.main(flags)
    assert not Path("run/log.jsonl").exists()
    first.kill()
    first.wait()
    train.main(flags)
    assert len(log("run")) == 2


def test_a_file_system_without_locks(workdir, manifest, monkeypatch, capsys):
    """A run goes on, and says what it lacks."""

    def lacks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(train.fcntl, "lockf", lacks)
    train.main(["--data", str(manifest(4)), *FEW, "--out", "run"])
    assert "run/lock: No locks available; nothing keeps a second run out" in capsys.readouterr().err


def test_too_many_open_files(workdir, manifest, monkeypatch):
    """A line that says what to do; the video is not a bad one."""

    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(dataset.av, "open", full)
    with pytest.raises(SystemExit, match="train.py: .*Too many open files; `ulimit -n 65536`"):
        train.main(["--data", str(manifest(4)), *FEW, "--out", "run"])
    assert not Path("run/bad_videos.txt").exists()


# ------------------------------------------------------------------------ bad numbers, disk, memory


FEW = ("--epochs", "1", "--warmup-epochs", "0", "--preset", "toy", "--stride", "4", "--no-flip",
       "--workers", "0",
       "--no-amp", "--batch-size", "2")  # fmt: skip


@pytest.mark.slow
def test_bad_numbers_on_one_of_two_processes(workdir, manifest):
    """Both leave the step out; the process that had them names its videos."""
    data = manifest(12)
    bad = json.loads(data.read_text().splitlines()[3])["video"]
    done = torchrun(
        2,
        FAULTY,
        f"nan:{bad}",
        ROOT / "train.py",
        "--data",
        data,
        *FEW,
        "--out",
        "run",
        cwd=workdir,
    )
    assert done.returncode == 0, done.stderr
    lines = log("run")
    (skipped,) = [line for line in lines if "skipped" in line]
    assert len(lines) == 3 and skipped["mae"] is None and skipped["skipped"] is True
    assert f"step {skipped['step']}: not finite, left out" in done.stderr and bad in done.stderr
    assert all(value.isfinite().all() for value in torch.load("run/last.pt")["model"].values())
    assert "skipped 1 steps were left out" in done.stdout


def test_bad_numbers_leave_the_statistics_alone(workdir, world, manifest, monkeypatch):
    """A step that is left out is as if it had not been: weights, moments, BatchNorm."""
    data, states, prepare = manifest(4), [], train.prepare

    def poisoned(batch, clip, args, config):
        video, mask, text = prepare(batch, clip, args, config)
        return (video if states else video * math.nan), mask, text

    summed = train.sum_over_ranks
    monkeypatch.setattr(train, "prepare", poisoned)
    monkeypatch.setattr(train, "sum_over_ranks", lambda x: states.append(None) or summed(x))
    torch.manual_seed(0)
    train.main(
        ["--data", str(data), *FEW, "--vt", "--clip", f"local-dir:{world / 'clip'}", "--out", "run"]
    )
    first, second = log("run")
    assert first["mae"] is None and first["vt"] is None
    assert first["skipped"] is True and "skipped" not in second
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["model"]["predictor.1.num_batches_tracked"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert all(state["step"] == 1 for state in saved["optimizer"]["state"].values())


def test_many_bad_numbers_in_a_row_stop_the_run(workdir, manifest, monkeypatch):
    """The last checkpoint stays as it is, though an epoch ends meanwhile."""
    prepare, count = train.prepare, []

    def poisoned(batch, *args):
        video, mask, text = prepare(batch, *args)
        count.append(None)
        return (video * math.nan if len(count) > 7 else video), mask, text

    monkeypatch.setattr(train, "prepare", poisoned)
    with pytest.raises(SystemExit, match="step 17: 10 in a row without a finite loss and gradient"):
        train.main(["--data", str(manifest(12)), *FEW, "--epochs", "5", "--out", "run"])
    assert torch.load("run/last.pt", weights_only=True)["step"] == 6
    assert [line["step"] for line in log("run") if "skipped" in line] == list(range(8, 18))


def test_a_log_that_names_what_was_skipped(tmp_path, capsys):
    """As runs wrote it until --save-steps went: they still go on to their end."""
    line = {"lr": 0.1, "mae": 1.0, "bad": 2, "no_motion": 0}
    lines = [line | {"step": 1}, line | {"step": 2, "skipped": ["a.mp4", "b.mp4"]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    train.finish(tmp_path)
    said = capsys.readouterr().out
    assert "skipped 1 steps were left out" in said and "bad     4 times" in said


@pytest.mark.slow
def test_finetune_leaves_bad_numbers_out(checkpoint, workdir, manifest):
    data = manifest(8)
    bad = json.loads(data.read_text().splitlines()[3])["video"]
    command = [FAULTY, f"nan:{bad}", ROOT / "eval.py", "finetune", checkpoint, "--data", data,
               "--recipe", "other",
               "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 2, "--stride", 2, "--views",
               "1x1", "--repeat", 1,
               "--workers", 0, "--holdout", 0, "--test-split", "train", "--out",
               "tuned"]  # fmt: skip
    process = start(command, workdir)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (skipped,) = [line for line in log("tuned") if "skipped" in line]
    assert skipped["skipped"] is True and skipped["loss"] is None
    assert "not finite, left out" in said and bad in said
    assert all(value.isfinite().all() for value in torch.load("tuned/last.pt")["model"].values())


def test_a_full_disk(workdir, manifest, monkeypatch):
    """While a checkpoint is written, and while the log is: one line that names the file; nothing
    lost."""
    flags = ["--data", str(manifest(4)), *FEW, "--out", "run"]
    train.main([*flags, "--epochs", "2"])
    before = Path("run/last.pt").read_bytes()
    state = torch.load("run/last.pt", weights_only=True)
    Path("run/last.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device.*run/last.pt"):
        train.save_checkpoint(Path("run/last.pt"), **state)
    assert (
        Path("run/last.pt").read_bytes() == before and not Path("run/last.pt.partial").is_symlink()
    )
    monkeypatch.setattr(train, "append_log", lambda path, line: train.append("/dev/full", "1"))
    with pytest.raises(
        SystemExit, match="train.py: .*cannot be written: No space left on device: '/dev/full'"
    ):
        train.main([*flags, "--no-resume"])
    assert Path("run/last.pt").read_bytes() == before


def test_out_of_memory_says_what_lowers_it(workdir, manifest, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(train, "prepare", full)
    with pytest.raises(
        SystemExit, match="9 GiB; what needs less: a smaller --batch-size .*--grad-checkpointing"
    ):
        train.main(["--data", str(manifest(4)), *FEW, "--out", "run"])


# -------------------------------------------------------------------------------------------- trust


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_pickles_run_no_code(workdir, world, manifest, tmp_path):
    """A checkpoint, a CLIP, a text map, a BLIP-2 that would run code when unpickled: refused in a
    line."""
    import pickle

    assert pickle.loads(pickle.dumps(Evil())) == 0 and Path("hacked").exists()  # it would
    Path("hacked").unlink()
    data = manifest(4)
    torch.save({"model": Evil(), "config": {}}, "evil.pt")
    Path("bare.pt").write_bytes(pickle.dumps(Evil()))
    Path("run").mkdir()
    torch.save({"args": Evil()}, "run/last.pt")
    Path("folder").mkdir()
    (Path("folder") / "config.json").write_text('{"model_type": "videomae"}')
    torch.save({"x": Evil()}, "folder/pytorch_model.bin")
    Path("clip").mkdir()
    Path("clip/open_clip_config.json").write_bytes(
        (world / "clip/open_clip_config.json").read_bytes()
    )
    torch.save({"x": Evil()}, "clip/open_clip_pytorch_model.bin")
    maps = [json.loads(line) | {"maps": "evil.npz"} for line in data.read_text().splitlines()]
    Path("maps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in maps))
    made = np.empty(1, object)
    made[0] = Evil()
    np.savez(
        "evil.npz", **dict.fromkeys(("similarity", "frames", "text", "captions", "clip"), made)
    )
    import eval as ev

    few, tgm = ["--data", str(data), *FEW], ["--mask", "tgm"]
    for main, flags, named in (
        (train.main, [*few, "--out", "a", "--init", "evil.pt"], "evil.pt: cannot be loaded"),
        (train.main, [*few, "--out", "a", "--init", "bare.pt"], "bare.pt: cannot be loaded"),
        (train.main, [*few, "--out", "a", "--init", "folder"], "model.bin: cannot be loaded"),
        (train.main, [*few, "--out", "run"], "run/last.pt: cannot be loaded"),
        (train.main, [*few, *tgm, "--out", "a", "--clip", "ViT-B-32", "--clip-pretrained",
                      "evil.pt"], "evil.pt: Weights only load failed"),
        (train.main, [*few, *tgm, "--out", "a", "--clip", "local-dir:clip"],
         "openai: Weights only load failed"),
        (train.main, ["--data", "maps.jsonl", *FEW, *tgm, "--out", "a"],
         "evil.npz: not a whole text map"),
        (ev.main, ["linear", "evil.pt", "--data", str(data)], "evil.pt: cannot be loaded"),
        (ev.main, ["export", "bare.pt"], "bare.pt: cannot be loaded"),
        (captions.main, ["maps", str(data), "--clip", "local-dir:clip"],
         "openai: Weights only load failed"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert named in str(stop.value) and "\n" not in str(stop.value), (flags, stop.value)
        assert not Path("hacked").exists(), flags


def test_checkpoints_of_other_things_are_told(workdir, manifest):
    """Safe to load, and still none."""
    sizes, weights = vars(tgmae.Config(**TINY)), tgmae.TGMAE(tgmae.Config(**TINY)).state_dict()
    for i, (saved, reason) in enumerate((
        ([1, 2], "holds a list"), ({"model": 5, "config": sizes}, "no dict of names"),
        ({"model": {1: 2}, "config": sizes}, "no dict of names"),
        ({"model": weights, "config": 3}, "makes no model"),
        ({"model": weights, "config": {"x": 1}}, "makes no model"),
        ({"model": {}, "config": sizes}, "has no"),
        ({"model": weights, "config": sizes | {"depth": "two"}}, "makes no model"),
        ({"model": weights, "config": sizes | {"num_heads": 5}}, "not divisible by num_heads=5"),
        ({"model": dict.fromkeys(weights, "a"), "config": sizes}, "does not fit"),
        ({"videomae.embeddings.x": torch.ones(1)}, "not VideoMAE's weights"),
        ({"videomae.embeddings.patch_embeddings.projection.weight": torch.ones(1, 1, 1, 1, 1)},
         "config.json is needed"),
    )):  # fmt: skip
        torch.save(saved, f"{i}.pt")
        with pytest.raises(SystemExit) as stop:
            train.main(["--data", str(manifest(4)), *FEW, "--out", "a", "--init", f"{i}.pt"])
        assert (
            f"{i}.pt: " in stop.value.code
            and reason in stop.value.code
            and "\n" not in stop.value.code
        )


def test_a_gradient_that_is_not_finite(workdir, manifest, monkeypatch):
    """Though the loss is."""
    clip, count = torch.nn.utils.clip_grad_norm_, []

    def spoils(parameters, limit):
        count.append(None)  # twice a step: the predictor's are clipped by themselves
        if len(count) == 3:
            parameters[0].grad.view(-1)[0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoils)
    train.main(["--data", str(manifest(8)), *FEW, "--out", "run"])
    lines = log("run")
    assert ["skipped" in line for line in lines] == [False, True, False, False]
    assert lines[1]["mae"] > 0 and lines[1]["grad_norm"] is None and lines[1]["skipped"] is True
    assert all(value.isfinite().all() for value in torch.load("run/last.pt")["model"].values())


def test_a_manifest_writes_nowhere_else(world, tmp_path):
    """Names that climb out of the folder, absolute ones, and maps that are somewhere else: what is
    written stays beside the manifest."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    (away / "precious.npz").write_text("precious")
    clips = [r["path"] for r in dataset.read_manifest(world / "manifest.jsonl")[:3]]
    for i, name in enumerate(("climb.mp4", "absolute.mp4", "..mp4")):
        (away / name).symlink_to(clips[i])
    lines = [
        {"video": "../away/climb.mp4", "captions": ["a"], "maps": "../away/precious.npz"},
        {
            "video": str(away / "absolute.mp4"),
            "captions": ["a"],
            "maps": str(away / "precious.npz"),
        },
        {"video": "../away/..mp4", "captions": ["a"]},
    ]
    data = home / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def others():
        return {
            p: p.lstat().st_mtime_ns
            for p in tmp_path.rglob("*")
            if p != home and home not in p.parents
        }

    before = others()
    captions.main(
        [
            "maps",
            str(data),
            "--clip",
            f"local-dir:{world / 'clip'}",
            "--image-size",
            "32",
            "--patch-size",
            "8",
            "--every",
            "8",
            "--workers",
            "0",
            "--force",
        ]
    )
    made = [Path(r["map_path"]) for r in dataset.read_manifest(data)]
    assert all(path.exists() and (home / "maps") in path.resolve().parents for path in made)
    assert others() == before and (away / "precious.npz").read_text() == "precious"


# ---------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_soak(tmp_path, minutes=1):
    """Good and bad files: memory, open files, threads stay as they are, and Ctrl-C leaves no
    process."""
    process = start([ROOT / "tests/soak.py", "--minutes", minutes], tmp_path)
    said, _ = process.communicate(timeout=minutes * 60 + 200)
    assert process.returncode == 0 and "left after Ctrl-C: none" in said, said
