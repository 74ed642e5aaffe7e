"""What a run or an evaluation came to, as report.md and pictures for people."""

import io
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import gpunet
from gpunet.backends.machine import processor
from gpunet.data import captioned_sheet
from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole
from gpunet.train.config import to_toml
from gpunet.train.plots import plot_confusion, plot_curves, plot_reliability
from gpunet.train.text import clock

# Nothing else of the environment is written: variables hold passwords.
ENVIRONMENT = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GPUNET_DATA")
PACKAGES = ("numpy", "pillow", "safetensors", "cupy-cuda12x", "cupy-cuda13x", "numba")
# What an evaluation may draw, <name>.png each, and what is seen in it
PICTURES = {
    "confusion": "Confusion: a row is the true class, a column the answer.",
    "reliability": "Reliability: how often answers are right, by the confidence they are given with.",
    "mistakes": "The mistakes of the greatest confidence.",
}


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
    resumed: list
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
            lines.append(f"best validation {_score(self, self.best)} after epoch {self.best['epoch']}")
        if self.test:
            views = f", views {self.config.train.views}" if self.config.train.views else ""
            lines.append(f"test {_score(self, vars(self.test))}{views}")
        lines.append(f"{clock(self.seconds)} in all, {self.images_per_second:,.0f} images a second in training")
        if self.data.note:
            lines.append(f"note: {self.data.note}")
        return "\n".join([*lines, str(self.run.path)])


def write_report(result):
    """Write curves.png, report.md and the pictures of evaluation-test into the run directory."""
    path = result.run.path
    if result.updates:
        smoothing = result.config.smoothing
        notes = [result.data.note, f"training loss against labels smoothed by {smoothing:g}" if smoothing else ""]
        note, labelled = "; ".join(n for n in notes if n), result.data.train.labels is not None
        plot_curves(path / "curves.png", _title(result), note, result.rows, labelled)
    pictures = write_pictures(path / "evaluation-test", result.config, result.data, "test", result.test)
    write_whole(path / "report.md", _report(result, pictures).encode())


def write_pictures(folder, config, dataset, name, found):
    """Write those of PICTURES that apply into a folder; return their names.

    `found` is the Evaluation of a split of the data set, or None: then nothing is written. A picture of an earlier
    evaluation that does not apply now is removed.
    """
    if found is None:
        return []
    title, note, drawn = f"{config.model.name} on {dataset.name}, {name}", dataset.note, {}
    if found.confusion is not None:
        drawn["confusion"] = lambda path: plot_confusion(path, title, note, found.confusion, dataset.classes)
    if found.bins:
        drawn["reliability"] = lambda path: plot_reliability(path, title, note, found)
    if found.mistakes:
        drawn["mistakes"] = lambda path: _write_mistakes(path, found, dataset.splits[name].images, dataset.classes)
    if not drawn and not folder.exists():
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            (folder / f"{picture}.png").unlink(missing_ok=True)
    except OSError as error:
        raise GpunetError(f"{folder}: cannot be written: {error.strerror}; choose another place with --out") from None
    for picture, draw in drawn.items():
        draw(folder / f"{picture}.png")
    return list(drawn)


def _write_mistakes(path, found, images, classes):
    """Write the pictures of the mistakes, each with its true class, the answer, and p or the output of both."""
    measure = "output" if found.brier is None else "p"
    captions = []
    for m in found.mistakes:
        certainty = f"{measure} {m.confidence:.3f}, of true {m.probability:.3f}"
        captions.append((f"true: {classes[m.true]}", f"answer: {classes[m.answer]}", certainty))
    content = io.BytesIO()
    captioned_sheet(images[[m.image for m in found.mistakes]], captions).save(content, "PNG")
    write_whole(path, content.getvalue())


def _title(result):
    parts = [f"{result.config.model.name} on {result.data.name}"]
    if result.test:
        known = result.data.train.labels is not None
        parts.append(f"test accuracy {result.test.accuracy:.2%}" if known else f"test loss {result.test.loss:.4g}")
    return ", ".join(parts)


def _score(result, row):
    accuracy = f"accuracy {row['accuracy']:.2%}, " if result.data.train.labels is not None else ""
    return f"{accuracy}loss {row['loss']:.4f} ({row['count']:,} images)"


def _report(result, pictures):
    parts = [
        f"# {result.run.path.name}",
        result.status[0].upper() + result.status[1:] + ".",
        _results(result),
        "![curves](curves.png)" if result.updates else "",
        _data(result.data),
        _classes(result),
        _pictures(pictures),
        "## Settings\n\n```toml\n" + to_toml(result.config) + "```",
        _table("## Machine", machine(result.step)),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _results(result):
    rows = []
    if result.best:
        score = _score(result, result.best)
        rows.append(("best validation", f"{score}, after epoch {result.best['epoch']}: the weights kept"))
    else:
        rows.append(("weights kept", "the last ones: nothing was measured on a validation split"))
    if result.test:
        views = f", the mean over views {result.config.train.views}" if result.config.train.views else ""
        rows.append(("test", f"{result.test.count:,} images, measured once, with the weights kept{views}"))
        rows += [(f"test: {name}", value) for name, value in result.test.lines()]
    if result.config.train.monitor_test:
        rows.append(("watched", "the test split was measured during training (monitor_test = true); it chose nothing"))
    rows += [
        ("trained", f"{result.epochs:.4g} epochs, {result.updates:,} updates, {result.images:,} images"),
        *[("resumed", _resumed(result.resumed))] * bool(result.resumed),
        ("time", f"{clock(result.seconds)} in all, {clock(result.training_seconds)} of it training"),
        ("speed", f"{result.images_per_second:,.0f} images a second in training"),
        ("network", f"{result.step.graph.size:,} weights"),
    ]
    return _table("## Results", rows)


def _resumed(updates):
    times = "once" if len(updates) == 1 else f"{len(updates)} times"
    return f"{times}, at update {', '.join(f'{n:,}' for n in updates)}"


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


def _pictures(names):
    """Return the pictures of evaluation-test with a line on each."""
    parts = [f"{PICTURES[name]}\n\n![{name}](evaluation-test/{name}.png)" for name in names]
    return "\n\n".join(["## Test images in pictures", *parts]) if parts else ""


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
        ("processor", f"{processor()}, {len(os.sched_getaffinity(0))} cores for this process"),
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
