"""The run directory: resolved config, metrics, checkpoints, curves, report. Knows names, not the training.

Nothing in it is code: TOML, JSON lines, safetensors, Markdown, PNG.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import MALFORMED, Checkpoint, open_own, write_all, write_whole
from gpunet.train.config import load_config, nearest, to_toml

# Rows of these splits have the numbers that are drawn; others, of single layers, have anything.
SPLITS = frozenset(("train", "validation", "test"))
NUMBERS = ("epoch", "loss", "accuracy")
LAST = re.compile(r"last(?:-(\d{1,9}))?\.safetensors")


class Run:
    """One directory. `create` makes a new one that nobody else uses; `open` finds an old one."""

    def __init__(self, path):
        self.path = Path(path)
        self._metrics = self._lock = None
        self.board = None  # a tensorboard.Board, which then gets the rows too

    @classmethod
    def create(cls, config):
        """Make directory/name-date, numbered if it is there, lock it and write the resolved config into it."""
        parent = Path(config.run.directory)
        stem = f"{config.run.name or config.model.name}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                path = parent / (stem if number == 1 else f"{stem}-{number}")
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
        except OSError as error:
            raise GpunetError(
                f"run directory '{parent / stem}': cannot be made: {error.strerror}; choose another place with --out"
            ) from None
        run = cls(path)
        run.lock()
        write_whole(run.path / "config.toml", to_toml(config).encode())
        return run

    @classmethod
    def open(cls, path):
        """Return an existing run: its directory, or its name in runs/."""
        for place in (Path(path), Path("runs") / path):
            if (place / "config.toml").is_file():
                return cls(place)
        known = sorted(p.parent.name for p in Path("runs").glob("*/config.toml"))
        raise GpunetError(
            f"run '{path}': expected a directory with a config.toml; {nearest(path, known)}"
            f"in runs/: {', '.join(known[-5:]) or 'none'}"
        )

    def config(self, overrides=()):
        """Return the resolved config of the run."""
        return load_config(self.path / "config.toml", overrides)

    def checkpoint(self, which=None):
        """Return checkpoint "best" or "last"; unless told, the best if there is one."""
        files = {name: self.path / f"{name}.safetensors" for name in ("best", "last")}
        name = which or ("best" if files["best"].is_file() else "last")
        if name not in files:
            raise GpunetError(f"checkpoint: expected best or last, got '{which}'")
        return Checkpoint.load(files[name])

    def lock(self):
        """Keep other trainings out until `close`, or the end of this process however it ends."""
        try:
            file = open_own(self.path / ".lock", "a+b")
        except OSError as error:
            raise GpunetError(f"run '{self.path}': cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            file.close()
            raise GpunetError(f"run '{self.path}': {holder} trains it; wait for that or end it first") from None
        except OSError:
            pass  # a file system without locks
        self._lock = file
        with suppress(OSError):  # on a full disk the lock holds, too
            file.truncate(0)
            write_all(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def newest(self):
        """Return (Checkpoint, {path: what is wrong with that newer one}): the newest that is whole, None without any.

        Raises GpunetError where there are some, all damaged.
        """
        found = [(int(m[1] or 0), p) for p in self.path.iterdir() if (m := re.fullmatch(LAST, p.name))]
        damaged = {}
        for _, path in sorted(found):
            try:
                return Checkpoint.load(path), damaged
            except GpunetError as error:
                damaged[path] = str(error)
        if damaged:
            raise GpunetError(
                f"run '{self.path}': no checkpoint to go on from: {'; '.join(damaged.values())}; "
                f"train it anew: gpunet train {self.path / 'config.toml'}"
            )
        return None, {}

    def save(self, checkpoint, name, keep=1):
        """Write checkpoint "best" or "last"; the rows that were logged before are on the disk then, too."""
        if self._metrics is not None:
            with suppress(OSError):  # what the disk has no room for is told by the write below
                os.fsync(self._metrics)
        checkpoint.save(self.path / f"{name}.safetensors", keep)

    def log(self, rows):
        """Append dicts to metrics.jsonl, one line each; if they do not fit, none of them stays there."""
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        place = self.path / "metrics.jsonl"
        try:
            if self._metrics is None:
                self._metrics = open_own(place, "ab")
            before = self.logged
            try:
                write_all(self._metrics, content)
            except OSError:
                with suppress(OSError):
                    self._metrics.truncate(before)
                raise
        except OSError as error:
            raise GpunetError(f"{place}: cannot be written ({len(content):,} bytes): {error.strerror}") from None
        if self.board is not None:
            self.board.add(rows)

    @property
    def logged(self):
        """Bytes of metrics.jsonl."""
        place = self.path / "metrics.jsonl"
        return place.stat().st_size if place.exists() else 0

    def rewind(self, logged):
        """Cut metrics.jsonl to its first bytes, and return their rows: later updates are going to be done again."""
        place = self.path / "metrics.jsonl"
        try:
            with open_own(place, "a+b") as file:
                file.seek(0)
                content = file.readall()[:logged]
                if len(content) < logged or (content and not content.endswith(b"\n")):
                    raise ValueError(f"{logged:,} bytes of whole lines, found {len(content):,}")
                rows = [read_row(line, ("update", "batch", "norm")) for line in content.splitlines()]
                file.truncate(logged)
        except OSError as error:
            raise GpunetError(f"{place}: cannot be written: {error.strerror}") from None
        except MALFORMED as error:
            raise GpunetError(f"{place}: expected the rows of the training until its checkpoint: {error}") from None
        return rows

    def metrics(self):
        """Return the rows that were logged."""
        with open(self.path / "metrics.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def close(self):
        """Close metrics.jsonl and let others in."""
        for file in (self.board, self._metrics, self._lock):
            if file is not None:
                file.close()
        self.board = self._metrics = self._lock = None


def read_row(line, more=()):
    """Return a row of metrics.jsonl; raises one of MALFORMED where it is none, or a number is missing.

    Those are the ones that are drawn, and of a row of training `more`.
    """
    row = json.loads(line)
    if row["split"] in SPLITS:
        for key in (*NUMBERS, *(("rate", *more) if row["split"] == "train" else ())):
            if isinstance(row[key], bool) or not isinstance(row[key], int | float):
                raise TypeError(f"{key}: expected a number, got {row[key]!r}")
            float(row[key])  # not too large for one
    return row


def check_space(path, nbytes, keep):
    """Check that the disk of a folder has room for the checkpoints of a training, each of `nbytes`."""
    needed = (keep + 2) * nbytes  # the best one, and one that is being written
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    own = sum(file.stat().st_blocks * 512 for file in path.glob("*.safetensors"))  # they are replaced
    free = shutil.disk_usage(there).free + own
    if free < needed:
        raise GpunetError(
            f"run directory '{path}': expected {needed:,} bytes free for checkpoints ({keep} + best + one being "
            f"written, each {nbytes:,}), got {free:,}; make room, choose another place with --out or a lower run.keep"
        )
