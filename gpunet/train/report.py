"""What a run came to, as report.md and curves.png for people."""

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import gpunet
from gpunet.train.checkpoint import write_whole
from gpunet.train.config import to_toml
from gpunet.train.plots import plot_curves
from gpunet.train.text import clock

# Nothing else of the environment is written: variables hold passwords.
ENVIRONMENT = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GPUNET_DATA")
PACKAGES = ("numpy", "pillow", "safetensors", "cupy-cuda12x", "cupy-cuda13x", "numba")


@dataclass
class Result:
    """What a training came to. `best`: the row of the best validation; `test`: the Evaluation of the weights kept."""

    run: object
    config: object
    data: object = field(repr=False)
    step: object = field(repr=False)
    status: str
    epochs: float
    updates: int
    images: int
    training_seconds: float
    seconds: float
    rows: list = field(repr=False)
    best: dict | None
    test: object

    @property
    def images_per_second(self):
        """Images trained a second, without evaluation and checkpoints."""
        return self.images / max(self.training_seconds, 1e-9)

    @property
    def summary(self):
        """The outcome in a few lines."""
        lines = [self.status]
        if self.best:
            lines.append(f"best validation {_score(self.best)} after epoch {self.best['epoch']}")
        if self.test:
            lines.append(f"test {_score(vars(self.test))}")
        lines.append(f"{clock(self.seconds)} in all, {self.images_per_second:,.0f} images a second in training")
        if self.data.note:
            lines.append(f"note: {self.data.note}")
        return "\n".join([*lines, str(self.run.path)])


def write_report(result):
    """Write curves.png and report.md into the run directory."""
    path = result.run.path
    if result.updates:
        smoothing = result.config.loss.smoothing
        notes = [result.data.note, f"training loss against labels smoothed by {smoothing:g}" if smoothing else ""]
        plot_curves(path / "curves.png", _title(result), "; ".join(n for n in notes if n), result.rows)
    write_whole(path / "report.md", _report(result).encode())


def _title(result):
    parts = [f"{result.config.model.name} on {result.data.name}"]
    if result.test:
        parts.append(f"test accuracy {result.test.accuracy:.2%}")
    return ", ".join(parts)


def _score(row):
    return f"accuracy {row['accuracy']:.2%}, loss {row['loss']:.4f} ({row['count']:,} images)"


def _report(result):
    parts = [
        f"# {result.run.path.name}",
        result.status[0].upper() + result.status[1:] + ".",
        _results(result),
        "![curves](curves.png)" if result.updates else "",
        _data(result.data),
        _classes(result),
        "## Settings\n\n```toml\n" + to_toml(result.config) + "```",
        _table("## Machine", machine(result.step)),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _results(result):
    rows = []
    if result.best:
        rows.append(("best validation", f"{_score(result.best)}, after epoch {result.best['epoch']}: the weights kept"))
    else:
        rows.append(("weights kept", "the last ones: nothing was measured on a validation split"))
    if result.test:
        rows.append(("test", f"{_score(vars(result.test))}, measured once, with the weights kept"))
    if result.config.train.monitor_test:
        rows.append(("watched", "the test split was measured during training (monitor_test = true); it chose nothing"))
    rows += [
        ("trained", f"{result.epochs:.4g} epochs, {result.updates:,} updates, {result.images:,} images"),
        ("time", f"{clock(result.seconds)} in all, {clock(result.training_seconds)} of it training"),
        ("speed", f"{result.images_per_second:,.0f} images a second in training"),
        ("network", f"{result.step.graph.size:,} weights"),
    ]
    return _table("## Results", rows)


def _data(dataset):
    rows = [("set", dataset.name), *((name, f"{len(split):,} images") for name, split in dataset.splits.items())]
    if dataset.note:
        rows.append(("note", f"**{dataset.note}**"))
    return _table("## Data", rows)


def _classes(result):
    """Return accuracy a class with counts, and the confusion matrix."""
    if result.test is None or result.test.confusion is None:
        return ""
    confusion, names = result.test.confusion, result.data.classes
    rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in class_rows(confusion, names)]
    lines = ["## Test images by class", "", rows[0], "|---|---:|---:|---:|---:|", *rows[1:]]
    if len(names) <= 20:
        lines += ["", "Confusion matrix: a row is the true class, a column the answer.", ""]
        lines.append("| |" + "|".join(map(_cell, names)) + "|")
        lines.append("|---|" + "---:|" * len(names))
        lines += [f"| {_cell(n)} |" + "|".join(map(str, row)) + "|" for n, row in zip(names, confusion, strict=True)]
    return "\n".join(lines)


def class_rows(confusion, names):
    """Return a row of titles and one a class: images, right ones, accuracy, what it is most often taken for."""
    rows = [("class", "images", "right", "accuracy", "most often taken for")]
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        wrong = np.where(np.arange(len(names)) == i, 0, row)
        other = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        share = f"{row[i] / row.sum():.1%}" if row.any() else "no images"
        rows.append((name, f"{row.sum():,}", f"{row[i]:,}", share, other))
    return rows


def _table(title, rows):
    lines = [title, "", "| | |", "|---|---|", *(f"| {name} | {_cell(str(value))} |" for name, value in rows)]
    return "\n".join(lines)


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def machine(step):
    """Return (what, value) pairs: backend, types, replicas, processor, versions, and the allowed environment."""
    rows = [
        ("gpunet", gpunet.__version__),
        ("backend", f"{step.backend.name}, {step.types.real}, {step.replicas} replicas, batch {step.batch}"),
        ("processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores for this process"),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("packages", ", ".join(_versions())),
        ("command", " ".join(["gpunet", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "gpunet" else "Python"),
    ]
    return rows + [(name, os.environ[name]) for name in ENVIRONMENT if name in os.environ]


def _versions():
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
