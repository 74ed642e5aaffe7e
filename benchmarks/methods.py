"""What every method comes to at its documented defaults: optimizers, regularizers, augmentations, on real CIFAR-10.

    python benchmarks/methods.py [--only optimizers|regularizers|augmentations] [--write]

One small network, 10,000 training images, 2 epochs, so a row says that a method works here and does not diverge, not
which is best: augmentation and regularization pay in longer trainings. SGD runs with three seeds, for the spread.
GPUNET_DATA says where CIFAR-10 is.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

from results import machine, store

from gpunet.data import AUGMENTATIONS
from gpunet.optim import OPTIMIZERS
from gpunet.train import Trainer, parse_config

NET = [
    {"layer": "Conv2d", "name": "conv1", "outputs": 32, "size": 3, "bias": False},
    {"layer": "BatchNorm"},
    {"layer": "ReLU"},
    {"layer": "MaxPool", "name": "pool1", "size": 2},
    {"layer": "Conv2d", "name": "conv2", "outputs": 64, "size": 3, "bias": False},
    {"layer": "BatchNorm"},
    {"layer": "ReLU"},
    {"layer": "MaxPool", "name": "pool2", "size": 2},
    {"layer": "Conv2d", "name": "conv3", "outputs": 64, "size": 3, "bias": False},
    {"layer": "BatchNorm"},
    {"layer": "ReLU"},
    {"layer": "MaxPool", "name": "pool3", "size": 2},
    {"layer": "Linear", "name": "head"},
]
BASE = {
    "model": {"name": "layers", "layers": NET},
    "data": {"name": "cifar10", "validation": 2000, "limit": 10_000},
    "optimizer": {"name": "sgd"},
    "train": {"epochs": 2, "batch": 100},
}


def net(*changes):
    """Return the model with layers replaced, {"at": name, ...}, or put in behind, {"behind": name, ...}."""
    layers = copy.deepcopy(NET)
    for change in changes:
        (where, name), *entry = change.items()
        index = next(i for i, layer in enumerate(layers) if layer.get("name") == name)
        layers[index + (where == "behind") : index + 1] = [dict(entry)]
    return {"model": {"name": "layers", "layers": layers}}


def pools(layer):
    """Return the model with another pooling."""
    return net(*({"at": f"pool{i}", "layer": layer, "name": f"pool{i}", "size": 2} for i in (1, 2, 3)))


def hidden(layer, **arguments):
    """Return the model with a hidden layer of 128 in front of the head, a layer between them."""
    between = [{"layer": layer, **arguments}] if layer else []
    first = [] if layer == "DropConnect" else [{"layer": "Linear", "outputs": 128}, {"layer": "ReLU"}]
    return {"model": {"name": "layers", "layers": [*NET[:-1], *first, *between, NET[-1]]}}


def sgd(**settings):
    """Return what makes SGD's section."""
    return {"optimizer": BASE["optimizer"] | settings}


GROUPS = {
    "optimizers": {
        **{f"sgd, seed {seed}": {"train": BASE["train"] | {"seed": seed}} for seed in range(3)},
        "sgd, nesterov": sgd(nesterov=True),
        "sgd, no momentum, rate 0.1": sgd(momentum=0.0, lr=0.1),
        "sgd, sam 0.05": sgd(sam=0.05),
        "sgd, ema": {"average": {"name": "ema", "decay": 0.98}},
        "sgd, swa": {"average": {"name": "swa", "start": 1.0, "every": 0.1}},
        **{name: {"optimizer": {"name": name}} for name in OPTIMIZERS if name != "sgd"},
    },
    "regularizers": {
        "weight_decay 5e-4": sgd(weight_decay=5e-4),
        "l1 1e-5": sgd(l1=1e-5),
        "max_norm 3": sgd(max_norm=3.0),
        "clip 1": sgd(clip=1.0),
        "label smoothing 0.1": {"loss": {"smoothing": 0.1}},
        "hidden layer of 128, nothing more": hidden(None),
        "dropout 0.5, inverted": hidden("Dropout", rate=0.5),
        "dropout 0.5, plain": hidden("Dropout", rate=0.5, form="plain"),
        "dropconnect 0.5, a mask a batch": hidden("DropConnect", outputs=128, rate=0.5, mask="batch"),
        "dropconnect 0.5, a mask an example": hidden("DropConnect", outputs=128, rate=0.5),
        "spatial dropout 0.2": net({"behind": "pool2", "layer": "Dropout2d", "rate": 0.2}),
        "stochastic pooling": pools("StochasticPool"),
        "average pooling": pools("AvgPool"),
    },
    "augmentations": {name: {"augment": dict(what.example)} for name, what in AUGMENTATIONS.items()},
}


def train(changes):
    """Train once; return validation and training loss, accuracy, seconds, and whether all went well."""
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config({**BASE, **changes, "run": {"directory": folder}})
        config.data.directory = os.environ["GPUNET_DATA"]
        started = time.perf_counter()
        trainer = Trainer(config, show=False)
        result = trainer.fit()
    rows = [row for row in result.rows if row["split"] == "train"]
    last = [row["loss"] for row in rows if row["epoch"] > rows[-1]["epoch"] - 0.5]
    validation = [row for row in result.rows if row["split"] == "validation"]
    return {
        "train_loss": sum(last) / len(last),
        "validation_loss": validation[-1]["loss"],
        "validation_accuracy": validation[-1]["accuracy"],
        "first_validation_loss": validation[0]["loss"],
        "seconds": time.perf_counter() - started,
    }


def main():
    """Train every row, print each as it comes; --write stores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not Path(os.environ.get("GPUNET_DATA", "")).is_dir() or "GPUNET_DATA" not in os.environ:
        sys.exit("methods.py: set GPUNET_DATA to the folder that holds CIFAR-10")
    started, rows = time.perf_counter(), []
    for group in [arguments.only] if arguments.only else GROUPS:
        for name, changes in GROUPS[group].items():
            found = train(changes)
            rows.append({"group": group, "method": name, **found})
            print(f"{group[:-1]:<14}{name:<36}" + "  ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(rows)} trainings in {minutes:.1f} minutes")
    if arguments.write:
        store("methods", "cifar10", {**machine(), "minutes": minutes, "rows": rows})


if __name__ == "__main__":
    main()
