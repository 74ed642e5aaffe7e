"""Going on with a run: where it stands, and whether what is here gives the same bits as what was there."""

import hashlib
import os
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

import gpunet
from gpunet import ops
from gpunet.backends.machine import blas, processor
from gpunet.core import random
from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole
from gpunet.train.config import Natural, Section, parse_config, read_toml, to_toml
from gpunet.train.monitor import Plateau, Waited
from gpunet.train.run import NUMBERS, Run

# What may change in a run that goes on; what of it could change the bits is held to what was recorded.
FREE = ("run.keep", "run.checkpoint_steps", "run.checkpoint_seconds", "data.directory", "train.backend",
        "train.replicas", "train.steps_per_launch", "train.window", "train.watch", "train.watch_every")  # fmt: skip
PICTURES = 200  # of a split that are looked at to know it again


class Finished(GpunetError):
    """There is nothing left to do in this run."""


def _measured(best):
    """Check that the row of the best validation has the numbers that are compared."""
    for key in (*NUMBERS, "update", "count") if best is not None else ():
        if not isinstance(best.get(key), int | float):
            raise ValueError(f"{key}: expected a number")
    return best


class Position(Section):
    """Where a training stands, beside State: what `_Training` counts, and how much of metrics.jsonl belongs to it."""

    ended: Natural = 0  # epochs
    seen: Natural = 0  # updates, their rows logged
    steps: Natural = 0  # taken, skipped ones too
    images: Natural = 0
    totals: list[float] = Field([0.0] * 3, min_length=3, max_length=3)  # losses, hits, images of the epoch at hand
    spent: float = 0.0  # seconds of training in the epoch at hand
    seconds: float = 0.0  # in those before
    elapsed: float = 0.0  # with all else
    explained: bool = False
    logged: Natural = 0
    inexact: list[str] = Field([])  # what has been another since, by --inexact
    resumed: list[Natural] = Field([])  # at which updates it has been gone on with
    waited: Waited = Field(default_factory=Waited)
    plateau: Plateau = Field(default_factory=Plateau)
    best: Annotated[dict[str, int | float | str] | None, AfterValidator(_measured)] = None


class Resumption:
    """A locked run directory, the config that holds in it, and the newest checkpoint that is whole, None if none is.

    given: a Config that has to be the run's. overrides: "section.key=value", of keys that are FREE.
    """

    def __init__(self, path, overrides=(), given=None):
        self.run = Run.open(path)
        self.run.lock()
        try:
            self.checkpoint, self.damaged = self.run.newest()
            self.notes = [f"note: {text}; it is now {path.name}.damaged" for path, text in self.damaged.items()]
            self.position, recorded = Position(), self.run.config()
            if self.checkpoint is not None:
                self.position, recorded = _recorded(self.checkpoint)
                self._check_end()
            self.config = self._config(recorded, overrides, given)
        except BaseException:
            self.run.close()
            raise

    def _check_end(self):
        """Raise where there is nothing to go on with."""
        if self.checkpoint.about.get("finished"):
            raise Finished(f"run '{self.run.path}' has finished, after {self.position.ended} epochs: nothing to do")
        if self.checkpoint.state["halt"] >= 0:
            raise GpunetError(
                f"run '{self.run.path}': stopped where loss or gradient was not finite, and going on would meet the "
                "same again; report.md says where. Train with other settings: gpunet train CONFIG --set ..."
            )

    def _config(self, recorded, overrides, given):
        """Return the run's config with what overrides change; all else has to be as recorded."""
        place = self.run.path
        if given is not None and (found := differences(recorded, given, "in the one given")):
            raise GpunetError(
                f"run '{place}' has another config than the one given: {'; '.join(found)}. "
                "Leave CONFIG out to go on with the run's own, or --resume to begin a new run"
            )
        if found := differences(recorded, self.run.config(), "in the file now"):
            raise GpunetError(f"{place / 'config.toml'}: was changed since the checkpoint: {'; '.join(found)}")
        config = self.run.config(overrides)
        if found := differences(recorded, config, "by --set"):
            raise GpunetError(f"run '{place}': {'; '.join(found)}; with --resume these can be set: {', '.join(FREE)}")
        return config

    def enter(self, trainer, inexact):
        """Put the checkpoint into a Trainer, where data and machine are those of the run."""
        if self.checkpoint is not None:
            about, place = self.checkpoint.about, self.run.path
            if about.get("data") != trainer.data_digest:
                raise GpunetError(
                    f"run '{place}': expected the data set it was trained on ({about.get('data')}), got another: "
                    f"{trainer.data} ({trainer.data_digest}); --data says where it is"
                )
            changed = _changed(about.get("pins"), trainer.pins) + self._best(inexact)
            if changed and not inexact:
                raise GpunetError(
                    f"run '{place}': going on here would not give the same bits: {'; '.join(changed)}; have it as it "
                    "was (train.replicas can be set), or go on all the same with --inexact"
                )
            self.notes += [f"note: inexact: {text}" for text in changed]
            self.position.inexact = [*self.position.inexact, *changed]
            self.checkpoint.restore(trainer.step)
        self.position.resumed = [*self.position.resumed, self.position.seen]
        for path in self.damaged:  # else it would take the place of the good one before it
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        if to_toml(self.config) != (self.run.path / "config.toml").read_text(encoding="utf-8"):
            write_whole(self.run.path / "config.toml", to_toml(self.config).encode())

    def _best(self, inexact):
        """Return what is wrong with the best checkpoint, in a list; if exact, one newer than `last` comes again."""
        if self.position.best is None:
            return []
        try:
            best = self.run.checkpoint("best")
        except GpunetError as error:
            if inexact:
                self.position.best = None
            return [f"{error}; the best weights until now are lost"]
        if inexact and best.state["update"] > self.checkpoint.state["update"]:
            self.position.best = _recorded(best)[0].best
        return []

    def line(self, batches):
        """Return where the training goes on, and from what."""
        if self.checkpoint is None:
            return f"resumed {self.run.path}: no checkpoint yet, from the beginning"
        update, place = self.position.seen, self.checkpoint.state["batch"] - self.position.ended * batches
        return (
            f"resumed {self.run.path}: from {os.path.basename(self.checkpoint.place)} at update {update}, "
            f"{self.position.ended} epochs and {place} of {batches} batches, checksum {self.checkpoint.checksum[:12]}"
        )


def _recorded(checkpoint):
    """Return (Position, Config) that a checkpoint was written at."""
    about = checkpoint.about
    try:
        config = parse_config(read_toml(about["config"], checkpoint.place), checkpoint.place)
        _ = checkpoint.input["mean"], checkpoint.input["scale"]
        return Position.model_validate({**about["progress"], "best": about["best"]}), config
    except (KeyError, TypeError, ValidationError):
        raise GpunetError(f"{checkpoint.place}: expected a checkpoint of a training, got one to predict with") from None


def differences(run, other, where):
    """Return ["optimizer.lr is 0.1 in the run, 0.2 <where>"], what differs in two configs and could change the bits."""
    tables = [
        {
            name: part
            for section, values in config.model_dump(exclude={"run"}).items()
            for key, value in values.items()
            for name, part in _parts(f"{section}.{key}", value)
        }
        for config in (run, other)
    ]
    keys = [key for key in {**tables[0], **tables[1]} if key not in FREE]
    pairs = [(key, *(table.get(key) for table in tables)) for key in keys]
    return [f"{key} is {_shown(a)} in the run, {_shown(b)} {where}" for key, a, b in pairs if a != b]


def _parts(name, value):
    """Yield (name, value) of a setting, of a list of tables each of theirs."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        for number, table in enumerate(value, 1):
            yield from ((f"{name} {number}.{key}", part) for key, part in table.items())
    else:
        yield name, value


def _shown(value):
    return "unset" if value is None else repr(value)


def _changed(recorded, now):
    """Return what differs of two records of pins."""
    recorded = recorded if isinstance(recorded, dict) else {}
    keys = [*now, *(key for key in recorded if key not in now)]
    pairs = [(key, recorded.get(key, "none"), now.get(key, "none")) for key in keys]
    return [f"{key} was {was}, is {present}" for key, was, present in pairs if was != present]


def pins(step):
    """Return {what: value} of all on which the bits of a training depend, beside its config and data."""
    return {
        "gpunet": gpunet.__version__,
        "numpy": np.__version__,
        "blas": blas(),
        "draws": random.FORMAT,
        "backend": step.backend.name,
        **step.backend.versions,
        "engine": ", ".join(f"{name} {engine}" for name, engine in step.engines().items()) or "none",
        "dtype": step.types.compute,
        "replicas": step.replicas,
        "processor": processor(),
        **ops.digests(step.graph),
    }


def data_digest(dataset):
    """Return 12 hex digits of what a data set is: classes, sizes, all targets, and some pictures of each split."""
    digest = hashlib.sha256(repr(dataset.classes).encode())
    for name, split in dataset.splits.items():
        some = split.images[:: -(-len(split) // PICTURES)]
        digest.update(f"{name} {split.images.shape} {split.images.dtype}".encode())
        digest.update(split.targets)
        digest.update(np.ascontiguousarray(some))
    return digest.hexdigest()[:12]
