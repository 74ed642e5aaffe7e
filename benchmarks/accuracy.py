"""Accuracy and whole-process time of a recipe over several seeds, each in a fresh process on real data.

    python benchmarks/accuracy.py configs/cifar10_fast_cpu.toml [--seeds 3] [--set train.epochs=2]... [--write]

Time is from the start of the process to its end: imports, data, training, test. The accuracy is that of the test split,
measured once, after the training. GPUNET_DATA says where CIFAR-10 is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import machine, store


def train(config, seed, overrides):
    """Train in a child process; return what its run directory and the clock say."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpunet", "train", config, "--out", folder, "--set", f"train.seed={seed}"]
        for override in overrides:
            command += ["--set", override]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        run = next(Path(folder).glob("*/"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tests = [row for row in rows if row["split"] == "test"]
    updates = [row for row in rows if row["split"] == "train"]
    last = [row["loss"] for row in updates if row["epoch"] > updates[-1]["epoch"] - 1]
    return {
        "seed": seed,
        "seconds": seconds,
        "test_accuracy": tests[-1]["accuracy"],
        "train_loss_last_epoch": statistics.mean(last),
        "train_loss_at_end": statistics.mean(last[-len(last) // 10 :]),
    }


def main():
    """Train every seed, print each and the medians; --write stores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if "GPUNET_DATA" not in os.environ:
        sys.exit("accuracy.py: set GPUNET_DATA to the folder that holds CIFAR-10")
    runs = []
    for seed in range(arguments.seeds):
        runs.append(train(arguments.config, seed, arguments.overrides))
        print(", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "seed"}
    print("median: " + ", ".join(f"{k} {v:.4g}" for k, v in medians.items()))
    if arguments.write:
        name = Path(arguments.config).stem
        store("accuracy", name, {**machine(), "overrides": arguments.overrides, "runs": runs, "median": medians})


if __name__ == "__main__":
    main()
