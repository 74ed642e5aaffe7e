"""A training so small that it can be killed at every place of it, and what is compared afterwards."""

from pathlib import Path

import numpy as np

from gpunet import data, nn
from gpunet.core.step import Step
from gpunet.train import Checkpoint, Trainer, parse_config

SMALL_TOML = """
[model]
name = "mlp"
hidden = [8]
[data]
name = "shapes"
train = 100
test = 20
[optimizer]
lr = 0.005
[train]
epochs = 1
batch = 30
replicas = 1
"""


class Killed(BaseException):
    """What nothing in a training may catch, as nothing catches SIGKILL."""


def halves(train=90, validation=20, test=20, side=6, contrast=60):
    """Two classes: bright left or bright right halves in noise."""
    rng = np.random.default_rng(0)
    labels = (np.arange(train + validation + test) % 2).astype(np.int32)
    images = rng.integers(0, 120, (len(labels), side, side, 3))
    images[labels == 0, :, : side // 2] += contrast
    images[labels == 1, :, side // 2 :] += contrast
    cuts = np.cumsum([train, validation])
    parts = zip(np.split(images.astype(np.uint8), cuts), np.split(labels, cuts), strict=True)
    return data.DataSet("halves", ("left", "right"), *(data.Split(*part) if len(part[1]) else None for part in parts))


def network():
    """All that has a state or draws: batch normalisation, dropout."""
    image = nn.Input((6, 6, 3))
    layers = nn.Sequential(
        nn.Conv2d(3, 3, name="conv"),
        nn.BatchNorm(name="norm"),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(2, name="head"),
        name="net",
    )
    return nn.Graph(image, layers(image))


def recipe(folder, **sections):
    """A config: three epochs of 5 batches, the last one smaller, an update every 2, a checkpoint every 2 updates."""
    table = {
        "model": {"name": "mlp"},
        "data": {"name": "shapes"},
        "augment": {"flip": True, "crop": 1},
        "optimizer": {"lr": 0.05, "weight_decay": 0.001},
        "schedule": {"name": "cosine"},
        "train": {"epochs": 3, "batch": 20, "accumulate": 2, "replicas": 2, "backend": "numpy"},
        "run": {"directory": str(folder / "runs"), "name": "try", "checkpoint_steps": 2, "checkpoint_seconds": 0.0},
    }
    return parse_config({name: table.get(name, {}) | sections.get(name, {}) for name in {**table, **sections}})


def new(config, **options):
    return Trainer(config, graph=network(), data=halves(), show=False, **options)


def on(run, **options):
    return Trainer.resume(run, graph=network(), **{"data": halves(), "show": False, **options})


def last_run(config):
    return max(Path(config.run.directory).iterdir(), key=lambda path: (path.stat().st_ctime_ns, path.name))


def left(run):
    """What has to be the same: all of the checkpoints but times, and the metrics."""
    found = {"metrics": (run / "metrics.jsonl").read_text()}
    for file in ("last", "best"):
        if not (run / f"{file}.safetensors").exists():
            continue
        loaded = Checkpoint.load(run / f"{file}.safetensors")
        tensors = loaded._tensors()
        found[file] = {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}
        own = ("spent", "seconds", "elapsed", "resumed")
        progress = {k: v for k, v in loaded.about["progress"].items() if k not in own}
        progress["totals"] = [round(x, 6) for x in progress["totals"]]  # summed look by look
        found[f"{file} about"] = loaded.state, progress, loaded.about["best"], loaded.about["epoch"]
    return found


def stop_after(patch, steps):
    """Kill a training after so many calls of its step."""
    original, calls = Step.__call__, []

    def step(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == steps + 1:
            raise Killed

    patch.setattr(Step, "__call__", step)
