"""Part accuracy: trainings on real CIFAR-10 through the Trainer: test accuracy, seconds, and whether a seed repeats.

A quick run trains tiny nets on a few pictures, drawn ones where there is no CIFAR-10.
"""

import hashlib
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpunet
from gpu.bench import Item, Skip
from gpunet.data import subset

WIDE = ("model.widths=[64, 128, 256, 512]", "train.batch=512", "optimizer.lr=0.4")
TRAININGS = "Trainings on CIFAR-10"
ABOUT = {
    TRAININGS: "Whole: from the recipe to the report, data and compilation included, in a process that has the backend "
    "loaded; training: the epochs alone. The test split is measured once, with the weights of the best validation.",
}


def items(options):
    """Return the items; the long training comes last."""
    return [
        Item("resnet9 float16, 8 epochs", partial(resnet9, dtype="float16", epochs=8), needs=20),
        Item("fast_cpu twice", twice, needs=20),
        Item("resnet9 float32, 4 epochs", partial(resnet9, dtype="float32", epochs=4), needs=30),
        Item("resnet9 float16 twice, 2 epochs", partial(resnet9, dtype="float16", epochs=2, runs=2), needs=20),
        Item("resnet9 float16, 24 epochs", partial(resnet9, dtype="float16", epochs=24), needs=60),
    ]


def resnet9(bench, dtype, epochs, runs=1):
    """Train ResNet-9 at its full widths."""
    overrides = [*WIDE, f"train.dtype={dtype}", f"train.epochs={1 if bench.quick else epochs}"]
    overrides += [f"schedule.warmup={epochs / 4:.1f}"]
    if bench.quick:
        overrides += ["model.widths=[2, 2, 4, 4]", "train.batch=8"]
    return trainings(bench, "cifar10_resnet9", overrides, runs)


def twice(bench):
    """Train the recipe for two cores, twice from one seed."""
    overrides = ["model.widths=[2, 2, 2, 2, 2]", "train.batch=8", "train.epochs=1"] if bench.quick else []
    return trainings(bench, "cifar10_fast_cpu", overrides, 2)


def trainings(bench, recipe, overrides, runs):
    """Train a recipe some times from one seed; the weights should be the same bit for bit."""
    rows, digests, losses = [], [], []
    for _ in range(runs):
        row, digest, loss = train(bench, recipe, overrides)
        rows.append(row)
        digests.append(digest)
        losses.append(loss)
    same = len(set(digests)) == 1
    if runs > 1:
        rows[-1]["same weights as before"] = same
    problems = [] if same else [f"{recipe}: the weights of {runs} runs from one seed differ"]
    line = f"test {rows[-1]['test accuracy']}, {rows[-1]['whole, s']:.1f} s"
    about = {"weights": digests, "test_losses": losses, "overrides": overrides}
    return {"line": line, "problems": problems, **about, "about": ABOUT, "rows": {TRAININGS: rows}}


def train(bench, recipe, overrides):
    """Train once; return (row, digest of the weights, test loss)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = [f'run.directory="{folder}"', f'train.backend="{bench.options.backend}"']
        config = gpunet.load_config(recipe, [*overrides, *settings])
        trainer = gpunet.Trainer(config, data=pictures(bench, config), show=False)
        result = trainer.fit()
    whole = time.perf_counter() - start
    weights = b"".join(values.tobytes() for _, values in sorted(trainer.step.weights.items()))
    row = {
        "recipe": recipe,
        "type": config.train.dtype,
        "batch": config.train.batch,
        "epochs": config.train.epochs,
        "test accuracy": f"{result.test.accuracy:.2%}",
        "whole, s": whole,
        "training, s": result.training_seconds,
        "images/s": result.images_per_second,
        "data": result.data.name,
    }
    return row, hashlib.sha256(weights).hexdigest()[:16], result.test.loss


def pictures(bench, config):
    """Return the DataSet of a recipe; a quick run takes a few of its pictures."""
    given = bench.options.data or os.environ.get("GPUNET_DATA")
    if not given and not bench.quick:
        raise Skip("no data: say --data FOLDER, or set GPUNET_DATA, to the folder that holds CIFAR-10")
    if not given:
        return gpunet.data.load("shapes", validation=8, train=40, test=16)
    whole = gpunet.data.load("cifar10", str(Path(given).absolute()), validation=config.data.validation)
    if not bench.quick:
        return whole
    return replace(whole, **{name: subset(split, 16) for name, split in whole.splits.items()})
