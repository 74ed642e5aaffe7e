"""Checkpoints: everything a network needs to go on, in one safetensors file. Never half written, nothing in it is run.

Tensors are named weights/<parameter>, statistics/<parameter>, optimizer/<slot>/<parameter>, input/mean, input/scale
and what else images go through (gpunet.data.preprocess); where weights are averaged, weights/ has the averages and
optimizer/weights/ the weights. All else is JSON in the file's metadata, under "gpunet". Beside it, under "sha256",
stands the digest of the whole file with 64 zeros in the digest's place: a byte that changed anywhere is noticed when
the file is read.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

import gpunet
from gpunet.core import random
from gpunet.core.state import new_state
from gpunet.errors import GpunetError

FORMAT = 3
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # raised by what reads it
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # what tensors may be, and to NumPy
SEAL, BLANK = b'"sha256":"', b"0" * 64  # as they stand in the header; inside the other JSON quotes are escaped


@dataclass
class Checkpoint:
    """Arrays by group, and `about`: config (TOML), classes, epoch, scores, versions. `place` is named in errors.

    checksum: that of the file it was read from or last written to.
    """

    weights: dict
    statistics: dict
    optimizer: dict
    input: dict
    state: dict
    about: dict = field(default_factory=dict)
    place: str = "checkpoint"
    checksum: str = ""

    @classmethod
    def of(cls, step, mean, scale, about, preprocess=None):
        """Return what a step holds now; mean, scale and a Preprocess are those of its images."""
        state, weights = step.state, step.weights.copy()
        slots = {slot: tensors.copy() for slot, tensors in step.optimizer_state.items()}
        if step.averages is not None:  # whoever reads the file takes the averages; the weights are for going on
            weights, slots["weights"] = weights | slots.pop("average"), weights
        return cls(
            weights,
            step.statistics.copy(),
            slots,
            {
                "mean": np.asarray(mean, np.float64),
                "scale": np.asarray(scale, np.float64),
                **(preprocess.arrays() if preprocess else {}),
            },
            {name: state[name].tolist() for name in state.dtype.names},
            about,
        )

    def save(self, path, keep=1):
        """Write the file aside, on to the disk, and rename it: the one that was there stays whole until then.

        keep: how many there are then, this one and those before it, which become <name>-1, <name>-2 and so on.
        """
        write_whole(Path(path), self.content(), keep)

    def content(self):
        """Return the bytes of the file."""
        meta = {
            "format": FORMAT,
            "draws": random.FORMAT,
            "gpunet": gpunet.__version__,
            "config_hash": digest(self.about.get("config", "")),
            "state": self.state,
            **self.about,
        }
        content = save(self._tensors(), {"gpunet": json.dumps(meta), "sha256": BLANK.decode()})
        self.checksum = hashlib.sha256(content).hexdigest()
        return content.replace(SEAL + BLANK, SEAL + self.checksum.encode(), 1)

    def _tensors(self):
        groups = {"weights": self.weights, "statistics": self.statistics, "input": self.input}
        groups |= {f"optimizer/{slot}": tensors for slot, tensors in self.optimizer.items()}
        return {f"{group}/{name}": a for group, tensors in groups.items() for name, a in tensors.items()}

    @classmethod
    def load(cls, path):
        """Read a checkpoint; GpunetError names the file and what is wrong with it."""
        path, place = Path(path), str(path)
        if not path.is_file():
            raise GpunetError(f"{place}: expected a checkpoint, found no file")
        try:
            content = path.read_bytes()
            tensors = dict(sorted(deserialize(content)))
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise GpunetError(f"{place}: expected a checkpoint; the file is damaged or none: {error}") from None
        meta = _metadata(header.get("__metadata__", {}), place)
        checksum = _checksum(header["__metadata__"].get("sha256"), content, place)
        groups = {"weights": {}, "statistics": {}, "optimizer": {}, "input": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            if group not in groups:
                continue
            kept = groups[group]
            if group == "optimizer":
                slot, _, rest = rest.partition("/")
                kept = kept.setdefault(slot, {})
            kept[rest] = _array(f"{place}: {name}", tensor)
        return cls(**groups, state=meta.pop("state"), about=meta, place=place, checksum=checksum)

    def check(self, graph):
        """Raise GpunetError where names or shapes are not those of a network."""
        for group, given, trainable in (("weights", self.weights, True), ("statistics", self.statistics, False)):
            self._check(group, given, {p.name: p.shape for p in graph.parameters() if p.trainable is trainable})

    def restore(self, step):
        """Put weights and statistics into a step; also optimizer state and State, if the step has an optimizer.

        Raises GpunetError, and changes nothing, where names or shapes are not the step's.
        """
        averages, slots = step.averages, step.optimizer_state
        pairs = [("weights", self.weights, step.weights if averages is None else averages)]
        pairs.append(("statistics", self.statistics, step.statistics))
        if averages is not None:
            slots["weights"] = step.weights
            del slots["average"]
        for slot, tensors in slots.items():
            pairs.append((f"optimizer {slot}", self.optimizer.get(slot, {}), tensors))
        for group, given, target in pairs:
            self._check(group, given, {name: array.shape for name, array in target.items()})
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, as the file has it as good as
            for _, given, target in pairs:
                for name in target:
                    target[name] = given[name]
        if step.optimizer is not None:
            record = step.state
            for name in record.dtype.names:
                record[name] = self.state[name]
            step.state = record

    def _check(self, group, given, shapes):
        """Check that `given` has the names and shapes in `shapes`."""
        missing, foreign = [n for n in shapes if n not in given], [n for n in given if n not in shapes]
        if missing or foreign:
            what = [f"has no {', '.join(missing[:3])}"] if missing else []
            what += [f"has {', '.join(foreign[:3])}, which the network has not"] if foreign else []
            raise GpunetError(
                f"{self.place}: {group}: expected the network's {len(shapes)} names; the file {' and '.join(what)}"
            )
        for name, shape in shapes.items():
            if given[name].shape != shape:
                raise GpunetError(f"{self.place}: {group}: {name}: expected shape {shape}, got {given[name].shape}")


def digest(text):
    """Return the first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_own(path, mode):
    """Open a file of ours, unbuffered; a link in its place is refused, so that nothing elsewhere is written to."""
    return open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def write_whole(path, content, keep=1):
    """Write bytes so that the file is the old one or the new one, never a part; GpunetError if it cannot be.

    keep: how many there are then, this one and older ones.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with open_own(aside, "wb") as file:
            write_all(file, content)
            os.fsync(file.fileno())
        _set_back(path, keep)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise GpunetError(
            f"{path}: cannot be written ({len(content):,} bytes): {error.strerror}; what was there before is whole"
        ) from None


def write_all(file, content):
    """Write bytes to an unbuffered file, which may take a part of them at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def numbered(path, number):
    """Return the name of the file that was `path` so many writes ago: last-1.safetensors."""
    return path.with_stem(f"{path.stem}-{number}") if number else path


def _set_back(path, keep):
    """Make room for a new `path`: the older ones move by one, and the newest is linked, so that it is always there."""
    files = [numbered(path, number) for number in range(keep)]
    for newer, older in reversed([*pairwise(files)]):
        if not newer.exists():
            continue
        if newer is not path:
            os.replace(newer, older)
            continue
        older.unlink(missing_ok=True)
        try:
            os.link(newer, older)
        except OSError:  # a file system without links
            os.replace(newer, older)


def _checksum(given, content, place):
    """Return the digest of a file's content, which has to be the `given` one in its header."""
    sealed = SEAL + str(given).encode("utf-8", "replace")
    checksum = hashlib.sha256(content.replace(sealed, SEAL + BLANK, 1)).hexdigest()
    if checksum != given:
        raise GpunetError(
            f"{place}: expected a checkpoint; the file is damaged or none: its checksum is {checksum[:12]}, "
            f"expected {str(given)[:12]}"
        )
    return checksum


def _metadata(meta, place):
    """Return gpunet's own part of the metadata."""
    try:
        meta = json.loads((meta or {})["gpunet"])
        version, record = meta["format"], new_state()
        for name in record.dtype.names:
            record[name] = meta["state"][name]
        meta["state"] = {name: record[name].tolist() for name in record.dtype.names}
    except MALFORMED:
        raise GpunetError(f"{place}: expected a gpunet checkpoint, got a safetensors file of something else") from None
    if version != FORMAT:
        raise GpunetError(
            f"{place}: checkpoint format {version} (gpunet {meta.get('gpunet')}): this gpunet reads format {FORMAT}"
        )
    for key, (expected, fits) in ABOUT.items():
        if key in meta and not fits(meta[key]):
            raise GpunetError(f"{place}: {key}: expected {expected}, got {meta[key]!r}")
    return meta


def _whole(value, least=1):
    """Return whether a value of JSON is a whole number from `least` on that an index can be."""
    return type(value) is int and least <= value < 2**31


# What is said of a network where anything is said of it: in words, and whether a value is that.
ABOUT = {
    "config": ("a recipe in TOML", lambda value: isinstance(value, str)),
    "classes": ("a list of names", lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value)),
    "input_shape": (
        "height, width and channels, whole numbers from 1 on",
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_whole, value)),
    ),
    "outputs": ("a whole number from 1 on", _whole),
    "epoch": ("a whole number from 0 on", lambda value: _whole(value, 0)),
}


def _array(place, tensor):
    """Return a tensor of the file as an array; it has to be of floats that NumPy has."""
    if tensor["dtype"] not in FLOATS:
        raise GpunetError(f"{place}: expected {', '.join(FLOATS)}, got {tensor['dtype']}")
    return np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]]).reshape(tensor["shape"])
