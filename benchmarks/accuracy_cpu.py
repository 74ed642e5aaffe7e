"""Time to 80, 90 and 94 % on CIFAR-10 on the CPU: whole processes on real data, several seeds of a recipe for each.

    python benchmarks/accuracy_cpu.py                                  # the three recipes, 3 seeds each
    python benchmarks/accuracy_cpu.py cifar10_94 --seeds 5 --write     # one of them; store the figures
    python benchmarks/accuracy_cpu.py configs/cifar10_resnet9.toml --set train.epochs=2

Time is from the start of python to its end: imports, data, training, test, report. The accuracy is that of the test
split, measured once, after the training. A seed is a folder OUT/RECIPE/seed-N with its run directory: called again,
this reads back what has finished and goes on with what has not, whose time is then that until its checkpoint and that
of the process which went on. GPUNET_DATA says where CIFAR-10 is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from quiet import Others, may_store, verdict
from results import machine, store

from gpunet.errors import GpunetError
from gpunet.train.config import load_config
from gpunet.train.resume import differences
from gpunet.train.run import Run

GOALS = {  # recipe: (accuracy, the minutes that it is meant to take on two cores)
    "cifar10_fast_cpu": (0.80, 3),
    "cifar10_90": (0.90, 12),
    "cifar10_94": (0.94, None),
}
PEERS = (
    "Published, on one GPU and without loading and compiling: airbench94 with Muon 94.01 % in 2.59 s (A100, mean of "
    "200 runs), ResNet-9 94.1 % in 26 s (V100, Page 2019). For two CPU cores no figure is known to us."
)


def train(recipe, seed, overrides, folder):
    """Return the record of a seed: read back where it has finished, else trained in a process of its own."""
    wanted = load_config(recipe, [*overrides, f"train.seed={seed}"])
    run = next((Run.open(path.parent) for path in folder.glob("*/config.toml")), None)
    if run is not None and (found := differences(run.config(), wanted, "in what is asked for")):
        raise GpunetError(f"{run.path}: {'; '.join(found)}; choose another folder with --out")
    done = folder / "result.json"
    if run is not None and done.is_file():
        return json.loads(done.read_text())
    before, others, started = elapsed(run), Others(), time.perf_counter()
    if run is None:
        settings = [word for text in (*overrides, f"train.seed={seed}") for word in ("--set", text)]
        arguments = [recipe, "--out", str(folder), *settings]
    else:
        arguments = ["--resume", str(run.path)]
    code = subprocess.run([sys.executable, "-m", "gpunet", "train", *arguments], stdout=subprocess.DEVNULL).returncode
    seconds = before + time.perf_counter() - started
    if code:
        raise GpunetError(f"{folder}: the training ended with code {code}; called again, this goes on with it")
    run = run or Run.open(next(folder.glob("*/config.toml")).parent)
    record = {"seed": seed, "seconds": seconds, "others_load": others.share(), **outcome(run)}
    done.write_text(json.dumps(record, indent=1) + "\n")
    return record


def elapsed(run):
    """Return the seconds that a run has taken until its newest checkpoint."""
    checkpoint = run and run.newest()[0]
    return checkpoint.about["progress"]["elapsed"] if checkpoint else 0.0


def outcome(run):
    """Return what a finished run's metrics say, and at which updates it was gone on with."""
    rows = run.metrics()
    updates = [row for row in rows if row["split"] == "train"]
    last = [row["loss"] for row in updates if row["epoch"] > updates[-1]["epoch"] - 1]
    return {
        "test_accuracy": next(row["accuracy"] for row in reversed(rows) if row["split"] == "test"),
        "train_loss_last_epoch": statistics.mean(last),
        "train_loss_at_end": statistics.mean(last[-len(last) // 10 :]),
        "resumed": run.checkpoint("last").about["progress"]["resumed"],
    }


def summary(runs, goal):
    """Return the medians over seeds, and the line that is printed."""
    numbers = [key for key in runs[0] if key not in ("seed", "resumed")]
    medians = {key: statistics.median(run[key] for run in runs) for key in numbers}
    line = f"median: test accuracy {medians['test_accuracy']:.2%} in {medians['seconds'] / 60:.1f} minutes"
    if goal:
        accuracy, minutes = goal
        within = f" in {minutes} minutes" if minutes else ""
        reached = medians["test_accuracy"] >= accuracy and medians["seconds"] <= 60 * (minutes or float("inf"))
        line += f"; the goal of {accuracy:.0%}{within} is {'reached' if reached else 'NOT reached'}"
    return medians, line


def measure(recipe, arguments):
    """Train all seeds of a recipe, print each and the medians; store them where that is asked for."""
    name, runs = Path(recipe).stem, []
    for seed in range(arguments.seeds):
        run = train(recipe, seed, arguments.overrides, arguments.out / name / f"seed-{seed}")
        note = f", resumed {len(run['resumed'])} times" if run["resumed"] else ""
        print(f"{name}, seed {seed}: {run['test_accuracy']:.2%} in {run['seconds']:.0f} s{note}; "
              f"{verdict(run['others_load'])}", flush=True)  # fmt: skip
        runs.append(run)
    goal = None if arguments.overrides else GOALS.get(name)
    medians, line = summary(runs, goal)
    print(f"{name}: {line}", flush=True)
    if arguments.write and may_store(max(run["others_load"] for run in runs), arguments.force):
        about = {"goal": goal and goal[0], "overrides": arguments.overrides, "peers": PEERS}
        packages = ["numba"] * (find_spec("numba") is not None)
        store("accuracy", name, {**machine(*packages), **about, "runs": runs, "median": medians})


def main():
    """Measure the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[*GOALS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="where the seeds' folders are")
    parser.add_argument("--write", action="store_true", help="store the figures in results/")
    parser.add_argument("--force", action="store_true", help="store those of a busy machine, too, marked")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {arguments.seeds}")
    if "GPUNET_DATA" not in os.environ:
        sys.exit("accuracy_cpu.py: set GPUNET_DATA to the folder that holds CIFAR-10")
    try:
        for recipe in arguments.recipes:
            measure(recipe, arguments)
    except GpunetError as error:
        sys.exit(f"accuracy_cpu.py: {error}")


if __name__ == "__main__":
    main()
