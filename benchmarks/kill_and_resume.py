"""Kills trainings at random moments, resumes them, and compares all that they leave with an uninterrupted training.

    python benchmarks/kill_and_resume.py [--kills 30] [--seed 0] [--backend numpy]

Each kill is a SIGKILL to a process of its own: after a random time, at the next moment at which it does what is wanted
in this trial (a step, the write of a checkpoint, an evaluation), and a random little later. Which it was doing when it
died is what it last wrote to a shared byte. Compared are weights, running statistics, optimizer state and State, of the
last and of the best checkpoint, bit for bit, and metrics.jsonl. Exit code 1 if one differs.
"""

import argparse
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

PHASES = {b"s": "a step", b"c": "a checkpoint's write", b"e": "an evaluation", b" ": "something else"}
RECIPE = """
[model]
name = "vgg"
widths = [4, 4, 4, 4, 8]
dropout = 0.2
[data]
name = "shapes"
train = 360
test = 20
validation = 100
[augment]
flip = true
crop = 2
[optimizer]
lr = 0.02
weight_decay = 0.001
nesterov = true
[schedule]
name = "cosine"
[train]
epochs = 6
batch = 25
accumulate = 3
replicas = 2
[run]
checkpoint_steps = 1
name = "killed"
"""


def child(place, arguments):
    """Train as the command does, and keep the byte in `place` telling what is being done."""
    from gpunet import cli
    from gpunet.core.step import Step
    from gpunet.train import report, trainer
    from gpunet.train.run import Run

    report.plot_curves = lambda *arguments: None
    trainer.write_report = lambda result: None
    with open(place, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 1)

    def told(owner, name, phase):
        original = getattr(owner, name)

        def call(*arguments, **options):
            before, shared[0:1] = shared[0:1], phase
            try:
                return original(*arguments, **options)
            finally:
                shared[0:1] = before

        setattr(owner, name, call)

    told(Step, "__call__", b"s")
    told(Step, "evaluate", b"e")
    told(Run, "save", b"c")
    sys.argv = ["gpunet", *arguments]
    cli.main()


class Child:
    """A training in a process of its own, and the byte that tells what it does."""

    def __init__(self, folder, *arguments):
        self.byte = folder / "phase"
        self.byte.write_bytes(b" ")
        with open(self.byte, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 1)
        command = [sys.executable, __file__, "--child", str(self.byte), "train", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)

    @property
    def phase(self):
        """What it does, or did when it ended; b" " between these and before its first step."""
        return bytes(self.shared[0:1])

    def reach(self, phases):
        """Wait until it does one of these; return whether it came to that."""
        while self.phase not in phases:
            if self.process.poll() is not None:
                return False
            time.sleep(0.0002)
        return True

    def end(self):
        """Wait for its end; return what it printed."""
        _, said = self.process.communicate(timeout=300)
        if self.process.returncode:
            sys.exit(f"the training ended with exit code {self.process.returncode}:\n{said}")
        return said


def contents(run):
    """Return {what: array or bytes} of all that has to be the same."""
    from gpunet.train import Checkpoint

    found = {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}
    for name in ("last", "best"):
        checkpoint = Checkpoint.load(run / f"{name}.safetensors")
        groups = {"weights": checkpoint.weights, "statistics": checkpoint.statistics} | checkpoint.optimizer
        found |= {f"{name} {g} {n}": array for g, tensors in groups.items() for n, array in tensors.items()}
        found[f"{name} state"] = checkpoint.state
    return found


def difference(one, other):
    """Return what is not the same in two runs' contents, or nothing."""
    names = [name for name in {**one, **other} if not _same(one.get(name), other.get(name))]
    return ", ".join(names[:3])


def _same(a, b):
    arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    return (a.dtype == b.dtype and a.tobytes() == b.tobytes()) if arrays else a == b


def killed(folder, wanted, seconds, draw):
    """Train in `folder` until a kill, while it does `wanted`; return (run, what it did), None if it came too late."""
    started = Child(folder, "recipe.toml")
    try:
        started.reach([b"s"])
        time.sleep(draw.uniform(0, 0.7 * seconds))
        if not started.reach([wanted]):
            return None
        time.sleep(draw.uniform(0, 0.003))
        started.process.kill()
        started.process.communicate()
        return (next((folder / "runs").iterdir()), started.phase) if started.process.returncode == -9 else None
    finally:
        started.process.kill()


def trial(folder, recipe, wanted, seconds, draw):
    """Kill one training and resume it; return (run, what it did when it was killed, what the resumed one said)."""
    for number in range(20):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "recipe.toml").write_text(recipe)
        if done := killed(place, wanted, seconds, draw):
            said = Child(place, "--resume", done[0]).end()
            return *done, next(line for line in said.splitlines() if line.startswith("resumed"))
    sys.exit(f"no kill came in time to hit {PHASES[wanted]}")


def main():
    """Train once as a whole, then kill and resume; print each trial and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    draw, hits, good = random.Random(arguments.seed), Counter(), 0
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    recipe = RECIPE.replace("epochs = 6", f'epochs = {arguments.epochs}\nbackend = "{arguments.backend}"')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "recipe.toml").write_text(recipe)
        whole = Child(folder, "recipe.toml")
        whole.reach([b"s"])
        started = time.perf_counter()
        whole.end()
        seconds = time.perf_counter() - started
        expected = contents(next((folder / "runs").iterdir()))
        rows = expected["metrics.jsonl"].count(b'"split": "train"')
        print(f"uninterrupted: {rows} updates, {seconds:.1f} s from the first step on, {arguments.backend}", flush=True)
        for number in range(1, arguments.kills + 1):
            wanted = list(PHASES)[number % 3]
            run, phase, said = trial(folder / f"trial{number}", recipe, wanted, seconds, draw)
            wrong = difference(expected, contents(run))
            hits[PHASES[phase]] += 1
            good += not wrong
            print(
                f"{number:>3}: killed in {PHASES[phase]}; {said.partition(': ')[2]}; {wrong or 'the same'}", flush=True
            )
    print(f"{good} of {arguments.kills}; killed in " + ", ".join(f"{what} {count}" for what, count in hits.items()))
    sys.exit(good < arguments.kills)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
