"""Whether a training by Winograd's convolution reaches what one by plain sums does: seeds of each, on real CIFAR-10.

    python benchmarks/engines.py [--engines winograd unfold] [--seeds 5] [--epochs 3] [--images 10000] [--write]

Each seed is trained by every engine from the same weights on the same batches. Printed are the means over seeds, their
standard deviation, and the difference to the last engine named in units of its standard error: within 2 is no
difference that can be seen. How fast the engines are says `gpunet tune`. GPUNET_DATA says where CIFAR-10 is.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from results import machine, store

from gpunet.core.backend import ENGINES
from gpunet.train import Trainer, load_config

RECIPE = "cifar10_fast_cpu"  # all convolutions but the first are 3 x 3 at stride 1
FIGURES = ("train_loss", "validation_loss", "validation_accuracy")


def train(engine, seed, epochs, images):
    """Train once; return FIGURES, the training's loss being the mean of its last half epoch."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(RECIPE)
        config.data.limit, config.data.directory, config.run.directory = images, os.environ["GPUNET_DATA"], folder
        config.train.epochs, config.train.seed, config.train.conv_engine = epochs, seed, engine
        config.train.backend = "numpy"
        trainer = Trainer(config, show=False)
        if engine not in trainer.step.engines().values():
            sys.exit(f"engines.py: engine {engine} computes no layer of {RECIPE} here")
        result = trainer.fit()
    rows = [row for row in result.rows if row["split"] == "train"]
    last = [row["loss"] for row in rows if row["epoch"] > rows[-1]["epoch"] - 0.5]
    validation = [row for row in result.rows if row["split"] == "validation"][-1]
    return dict(zip(FIGURES, (sum(last) / len(last), validation["loss"], validation["accuracy"]), strict=True))


def main():
    """Train, print, and with --write store all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["winograd", "unfold"], choices=ENGINES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: expected at least 2, for a spread")
    if not Path(os.environ.get("GPUNET_DATA", "")).is_dir() or "GPUNET_DATA" not in os.environ:
        sys.exit("engines.py: set GPUNET_DATA to the folder that holds CIFAR-10")
    rows = []
    for seed in range(arguments.seeds):
        for engine in arguments.engines:
            rows.append({"engine": engine, "seed": seed, **train(engine, seed, arguments.epochs, arguments.images)})
            print(f"seed {seed}  {engine:<10}" + "  ".join(f"{k} {rows[-1][k]:.4f}" for k in FIGURES), flush=True)
    for figure in FIGURES:
        found = {e: [row[figure] for row in rows if row["engine"] == e] for e in arguments.engines}
        base = found[arguments.engines[-1]]
        for engine, values in found.items():
            error = ((statistics.variance(values) + statistics.variance(base)) / len(values)) ** 0.5
            apart = (statistics.mean(values) - statistics.mean(base)) / max(error, 1e-30)
            spread = f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"
            print(f"{figure:<20} {engine:<10} {spread}, {apart:+.2f} standard errors from {arguments.engines[-1]}")
    if arguments.write:
        settings = {"seeds": arguments.seeds, "epochs": arguments.epochs, "images": arguments.images}
        store("engines", RECIPE, {**machine(), **settings, "rows": rows})


if __name__ == "__main__":
    main()
