"""Gives gpunet nearly valid inputs of every kind that it reads: nothing but a GpunetError may come of them.

    python benchmarks/fuzz.py [--inputs 20000] [--seed 0] [--target NAME] [--workers 1] [--keep fuzz-failures]
    python benchmarks/fuzz.py --replay fuzz-failures/checkpoint-0-17.json

Inputs are read in worker processes, each within a limit of memory (RLIMIT_AS) and of file size; a watchdog ends one
that takes too long. A failure is any other exception, a warning, a message that is empty, endless or not printable,
more memory than allowed, a hang or a crash; its files are kept in one JSON file that --replay runs again. Exit code 1
if there is one. Nothing is fetched; every input has a folder of its own that is removed.
"""

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

import fuzz_targets

MEMORY = 1 << 30  # bytes: resident at most, and to be had beside what is mapped before the first input
FILE = 100 << 20  # bytes of a file that is written
SECONDS = 30.0  # for one input
LONGEST = 3000  # letters of a message

ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: else each thread maps 64 MiB of addresses, and those are limited


def make(target, seed, number):
    """Return the files {name: bytes} of an input, the same ones for the same arguments."""
    return fuzz_targets.TARGETS[target].make(random.Random(f"{target} {seed} {number}"))


def examine(target, files):
    """Run one input; return (what GpunetError said or None, what is wrong or None, the most bytes resident)."""
    _reset_peak()
    try:
        with limits():
            said, wrong = fuzz_targets.run(target, files), None
    except BaseException:
        said, wrong = None, traceback.format_exc()
    peak = _status("VmHWM")
    if wrong is None and peak > MEMORY:
        wrong = f"{peak >> 20} MiB resident, at most {MEMORY >> 20} expected"
    lines = (said or "").split("\n")  # behind the line there may be a log of ours
    if said is not None and (not lines[0].strip() or not all(map(str.isprintable, lines)) or len(said) > LONGEST):
        wrong = f"expected printable lines of at most {LONGEST} letters, got {len(said)}: {said[:500]!r}"
    return said, wrong, peak


@contextmanager
def limits(memory=MEMORY, file=FILE):
    """Let this process have no more memory and write no larger files."""
    kept = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    wanted = {resource.RLIMIT_AS: _status("VmSize") + memory, resource.RLIMIT_FSIZE: file}
    try:
        for kind, most in wanted.items():
            resource.setrlimit(kind, (most, kept[kind][1]))
        yield
    finally:
        for kind, before in kept.items():
            resource.setrlimit(kind, before)


def _status(field):
    """Return a number of bytes that the kernel tells of this process."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{field}:"))


def _reset_peak():
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def worker(jobs, seed, shared, results):
    """Run jobs (target, number); `shared` holds the place of the one at hand and when it began."""
    for place, (target, number) in jobs:
        files, began = make(target, seed, number), time.monotonic()
        shared[:16] = struct.pack("<qd", place, began)
        said, wrong, peak = examine(target, files)
        results.send((place, said is None, wrong, files if wrong else None, time.monotonic() - began, peak))
    results.close()


class Worker:
    """A process that runs jobs; one that hangs or dies is replaced, and its job is a failure."""

    def __init__(self, jobs, seed):
        self.jobs, self.seed = jobs, seed
        self.shared = mmap.mmap(-1, 16)
        self._begin()

    def _begin(self):
        self.shared[:16] = struct.pack("<qd", -1, time.monotonic())
        self.receive, send = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")  # what was made once is there
        self.process = context.Process(target=worker, args=(self.jobs, self.seed, self.shared, send), daemon=True)
        self.process.start()
        send.close()

    def results(self):
        """Yield what has come in: (place, accepted, wrong, files, seconds, peak)."""
        while self.jobs:
            try:
                if not self.receive.poll(0.05):
                    place, began = struct.unpack("<qd", self.shared[:16])
                    if time.monotonic() - began < SECONDS:
                        return
                    self.process.kill()
                    what = f"took more than {SECONDS:g} s"
                else:
                    found = self.receive.recv()
                    self.jobs = self.jobs[1:]
                    yield found
                    continue
            except EOFError:
                place, began = struct.unpack("<qd", self.shared[:16])
                self.process.join()
                what = f"the process ended with exit code {self.process.exitcode}"
            self.process.join()
            place, (target, number) = self.jobs[0]
            self.jobs = self.jobs[1:]
            yield place, False, what, make(target, self.seed, number), time.monotonic() - began, 0
            if self.jobs:
                self._begin()

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.join()


def plan(inputs, names):
    """Return [(target, number)]: as many as asked for, shared out as the targets want."""
    weight = sum(fuzz_targets.TARGETS[name].share for name in names)
    counts = {name: inputs * fuzz_targets.TARGETS[name].share // weight for name in names}
    counts[names[0]] += inputs - sum(counts.values())
    return [(name, number) for name, count in counts.items() for number in range(count)]


def fuzz(jobs, seed, workers, keep):
    """Run all jobs, print a line a target and one for each failure; return the number of failures."""
    accepted, refused, failed, peaks, slowest = Counter(), Counter(), Counter(), Counter(), {}
    numbered = list(enumerate(jobs))
    crew = [Worker(numbered[i::workers], seed) for i in range(workers)]
    done, shown, begin = 0, time.monotonic(), time.monotonic()
    try:
        while any(member.jobs for member in crew):
            for member in crew:
                for place, good, wrong, files, seconds, peak in member.results():
                    target, number = jobs[place]
                    done += 1
                    if wrong:
                        failed[target] += 1
                        path = save(keep, target, seed, number, wrong, files)
                        print(f"FAILED {path}: {wrong.strip().splitlines()[-1][:300]}", flush=True)
                    elif good:
                        accepted[target] += 1
                    else:
                        refused[target] += 1
                    peaks[target] = max(peaks[target], peak)
                    slowest[target] = max(slowest.get(target, 0), seconds)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{done:,} of {len(jobs):,} in {shown - begin:.0f} s", file=sys.stderr, flush=True)
    finally:
        for member in crew:
            member.close()
    print(f"{'target':<16}{'inputs':>8}{'accepted':>10}{'refused':>9}{'failed':>8}{'slowest':>10}{'peak':>10}")
    for name in dict.fromkeys(target for target, _ in jobs):
        counts = accepted[name], refused[name], failed[name]
        cells = "".join(f"{n:>{w},}" for n, w in zip((sum(counts), *counts), (8, 10, 9, 8), strict=True))
        print(f"{name:<16}{cells}{slowest[name]:>8.1f} s{peaks[name] >> 20:>6} MiB")
    failures = failed.total()
    print(
        f"{done:,} inputs, seed {seed}: {accepted.total():,} accepted, {refused.total():,} refused, {failures} failed; "
        f"{time.monotonic() - begin:.0f} s, at most {max(peaks.values()) >> 20} MiB resident"
    )
    return failures


@contextmanager
def own_folder():
    """Have all temporary folders in one that is removed: those of a process that was killed, too."""
    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory(prefix="gpunet-fuzz-") as tempfile.tempdir:
            yield
    finally:
        tempfile.tempdir = before


def save(keep, target, seed, number, wrong, files):
    """Keep the files of a failing input; return the path."""
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{target.replace(' ', '_')}-{seed}-{number}.json"
    content = {"target": target, "wrong": wrong, "files": {name: raw.decode("latin1") for name, raw in files.items()}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def replay(path):
    """Run a kept input again; return whether it fails."""
    kept = json.loads(Path(path).read_text(encoding="utf-8"))
    files = {name: text.encode("latin1") for name, text in kept["files"].items()}
    said, wrong, peak = examine(kept["target"], files)
    print(wrong or ("accepted" if said is None else f"refused: {said}"))
    print(f"at most {peak >> 20} MiB resident")
    return wrong is not None


def main():
    """Fuzz, or run one failing input again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", action="append", choices=list(fuzz_targets.TARGETS), help="only this; may be repeated"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--replay", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.replay:
        sys.exit(replay(arguments.replay))
    fuzz_targets.warm()
    jobs = plan(arguments.inputs, arguments.target or list(fuzz_targets.TARGETS))
    with own_folder():
        failures = fuzz(jobs, arguments.seed, arguments.workers, arguments.keep)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
