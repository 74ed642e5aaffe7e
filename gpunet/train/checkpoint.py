"""Checkpoints: everything a network needs to go on, in one safetensors file. Never half written, nothing in it is run.

Tensors are named weights/<parameter>, statistics/<parameter>, optimizer/<slot>/<parameter>, input/mean, input/scale;
all else is JSON in the file's metadata, under "gpunet".
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import gpunet
from gpunet.errors import GpunetError

FORMAT = 1
DRAWS = 1  # version of the random draws, which a run that goes on must share


@dataclass
class Checkpoint:
    """Arrays by group, and `about`: config (TOML), classes, epoch, scores, versions. `place` is named in errors."""

    weights: dict
    statistics: dict
    optimizer: dict
    input: dict
    state: dict
    about: dict = field(default_factory=dict)
    place: str = "checkpoint"

    @classmethod
    def of(cls, step, mean, scale, about):
        """Return what a step holds now; mean and scale are those of its images."""
        state = step.state
        return cls(
            dict(step.weights.items()),
            dict(step.statistics.items()),
            {slot: dict(tensors.items()) for slot, tensors in step.optimizer_state.items()},
            {"mean": np.asarray(mean, np.float64), "scale": np.asarray(scale, np.float64)},
            {name: state[name].tolist() for name in state.dtype.names},
            about,
        )

    def save(self, path):
        """Write the file aside, on to the disk, and rename it: the one that was there stays whole until then."""
        meta = {
            "format": FORMAT,
            "draws": DRAWS,
            "gpunet": gpunet.__version__,
            "config_hash": digest(self.about.get("config", "")),
            "state": self.state,
            **self.about,
        }
        content = save(self._tensors(), {"gpunet": json.dumps(meta)})
        write_whole(Path(path), content)

    def _tensors(self):
        groups = {"weights": self.weights, "statistics": self.statistics, "input": self.input}
        groups |= {f"optimizer/{slot}": tensors for slot, tensors in self.optimizer.items()}
        return {f"{group}/{name}": a for group, tensors in groups.items() for name, a in tensors.items()}

    @classmethod
    def load(cls, path):
        """Read a checkpoint; GpunetError names the file and what is wrong with it."""
        place = str(path)
        try:
            with safe_open(path, framework="np") as file:
                meta = _metadata(file.metadata(), place)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            raise GpunetError(f"{place}: expected a checkpoint, found no file") from None
        except (SafetensorError, OSError) as error:
            raise GpunetError(f"{place}: expected a checkpoint; the file is damaged or none: {error}") from None
        groups = {"weights": {}, "statistics": {}, "optimizer": {}, "input": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            if group == "optimizer":
                group, _, rest = rest.partition("/")
                groups["optimizer"].setdefault(group, {})[rest] = tensor
            elif group in groups:
                groups[group][rest] = tensor
        return cls(**groups, state=meta.pop("state"), about=meta, place=place)

    def restore(self, step):
        """Put weights and statistics into a step; also optimizer state and State, if the step has an optimizer.

        Raises GpunetError, and changes nothing, where names or shapes are not the step's.
        """
        pairs = [("weights", self.weights, step.weights), ("statistics", self.statistics, step.statistics)]
        for slot, tensors in step.optimizer_state.items():
            pairs.append((f"optimizer {slot}", self.optimizer.get(slot, {}), tensors))
        for group, given, target in pairs:
            self._check(group, given, target)
        for _, given, target in pairs:
            for name in target:
                target[name] = given[name]
        if step.optimizer is not None:
            record = step.state
            for name in record.dtype.names:
                record[name] = self.state[name]
            step.state = record

    def _check(self, group, given, target):
        """Check that `given` has the names and shapes of `target`."""
        missing, foreign = [n for n in target if n not in given], [n for n in given if n not in target]
        if missing or foreign:
            what = [f"has no {', '.join(missing[:3])}"] if missing else []
            what += [f"has {', '.join(foreign[:3])}, which the network has not"] if foreign else []
            raise GpunetError(
                f"{self.place}: {group}: expected the network's {len(target)} names; the file {' and '.join(what)}"
            )
        for name, array in target.items():
            if given[name].shape != array.shape:
                raise GpunetError(
                    f"{self.place}: {group}: {name}: expected shape {array.shape}, got {given[name].shape}"
                )


def digest(text):
    """Return the first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path, content):
    """Write bytes so that the file is the old one or the new one, never a part; GpunetError if it cannot be."""
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise GpunetError(
            f"{path}: cannot be written ({len(content):,} bytes): {error.strerror}; what was there before is whole"
        ) from None


def _metadata(meta, place):
    """Return gpunet's own part of the metadata."""
    try:
        meta = json.loads((meta or {})["gpunet"])
        version, _ = meta["format"], meta["state"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise GpunetError(f"{place}: expected a gpunet checkpoint, got a safetensors file of something else") from None
    if version != FORMAT:
        raise GpunetError(
            f"{place}: checkpoint format {version} (gpunet {meta.get('gpunet')}): this gpunet reads format {FORMAT}"
        )
    return meta
