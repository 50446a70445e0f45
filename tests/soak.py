"""Trains for a while on a mix of good and bad files, and watches: memory, open files, threads,
processes.

    python tests/soak.py --minutes 30

Ends with Ctrl-C to the run; fails if anything grew, or if a process is left over."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from test_bad_files import KINDS, damaged  # noqa: E402

import toy  # noqa: E402


def make_data(folder, good=60, bad=20):
    """Toy clips in several codecs, and every fourth file damaged, empty, or not there."""
    rng, lines = np.random.default_rng(0), []
    codecs = [("libx264", {"g": "12"}), ("mpeg4", {})]
    codecs += [("libvpx", {"deadline": "realtime"}), ("mjpeg", {"strict": "-1"})]
    for i in range(good + bad):
        codec, options = codecs[i % 4]
        path = folder / f"{i}.mkv"
        clip = toy.make_clip(np.random.default_rng(i), i % 16)[0]
        toy.write_video(path, clip, codec=codec, options=options)
        if i >= good:
            bad_data = damaged(path.read_bytes(), KINDS[i % len(KINDS)], rng)
            path.write_bytes(bytes(bad_data) if i % 5 else b"")
            if i % 7 == 0:
                path.unlink()
        lines.append(json.dumps({"video": path.name, "captions": ["a thing"]}) + "\n")
    rng.shuffle(lines)
    (folder / "mix.jsonl").write_text("".join(lines))


def family(pid):
    """A process and its descendants."""
    found, left = [], [pid]
    while left:
        one = left.pop()
        try:
            found.append(one)
            for task in Path(f"/proc/{one}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            found.remove(one)
    return found


def look(pid):
    """-> MiB, open files, threads, processes of a run. Memory: what is no file's, and shared by
    processes once (code is left out, since its share depends on who else runs it)."""
    memory = files = threads = 0
    processes = family(pid)
    for one in processes:
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            held = [line for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
            memory += sum(int(line.split()[1]) for line in held)  # kB
            files += len(os.listdir(f"/proc/{one}/fd"))
            threads += len(os.listdir(f"/proc/{one}/task"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return memory / 1024, files, threads, len(processes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long")
    minutes = parser.parse_args().minutes
    # A shell's background ignores SIGINT, and so would children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        words = "--data mix.jsonl --mask mgm --preset toy --batch-size 8 --epochs 1000000 "
        words += "--warmup-epochs 0 --workers 2 --save-minutes 0.2 --out run"
        command = [sys.executable, str(ROOT / "train.py"), *words.split()]
        with open(folder / "said.txt", "w") as said:
            how = {"cwd": folder, "stdout": said, "stderr": said, "start_new_session": True}
            run = subprocess.Popen(command, **how)
            seen, log = [], folder / "run" / "log.jsonl"
            while not log.exists():  # its start is not what is watched
                assert run.poll() is None, (folder / "said.txt").read_text()[-2000:]
                time.sleep(0.1)
            began = time.monotonic()
            print("minute  MiB  files  threads  processes  steps", flush=True)
            while (passed := (time.monotonic() - began) / 60) < minutes:
                time.sleep(min(1, minutes * 60 / 120))
                assert run.poll() is None, (folder / "said.txt").read_text()[-2000:]
                steps = log.read_text().count("\n")
                seen.append((passed, *look(run.pid), steps))
                if len(seen) % 60 == 0:
                    print("{:6.1f} {:5.0f} {:5} {:7} {:8} {:9}".format(*seen[-1]), flush=True)
            processes = family(run.pid)
            os.killpg(run.pid, signal.SIGINT)
            run.wait(60)
        time.sleep(10)
        left = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        bad = sum(json.loads(line)["bad"] for line in log.read_text().splitlines())
        listed = len((folder / "run" / "bad_videos.txt").read_text().splitlines())
        print(
            f"{steps} steps, {bad} times a bad file was met, {listed} are listed; left after "
            f"Ctrl-C: {left or 'none'}"
        )
    third = len(seen) // 3
    middle, end = list(zip(*seen[third : 2 * third])), list(zip(*seen[-third:]))
    for column, what in enumerate(("MiB", "files", "threads", "processes"), 1):
        before, after = statistics.median(middle[column]), statistics.median(end[column])
        print(f"{what:<10} {before:.0f} in the middle third, {after:.0f} in the last")
        # A file that is being read, or a batch on its way, is open for a moment: counts must come
        # back to what they were before, but are more at any one time.
        grown = after > 1.03 * before if what == "MiB" else min(end[column]) > before
        assert not grown, what
    assert not left and bad and listed


if __name__ == "__main__":
    main()
