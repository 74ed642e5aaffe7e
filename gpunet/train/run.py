"""The run directory: resolved config, metrics, checkpoints, curves, report. Knows names, not the training."""

import json
from datetime import datetime
from itertools import count
from pathlib import Path

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import Checkpoint, write_whole
from gpunet.train.config import load_config, nearest, to_toml


class Run:
    """One directory. `create` makes a new one that nobody else uses; `open` finds an old one."""

    def __init__(self, path):
        self.path = Path(path)
        self._metrics = None

    @classmethod
    def create(cls, config):
        """Make directory/name-date, numbered if it is there, and write the resolved config into it."""
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

    def log(self, rows):
        """Append dicts to metrics.jsonl, one line each."""
        try:
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - see close
            self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
            self._metrics.flush()
        except OSError as error:
            raise GpunetError(f"{self.path / 'metrics.jsonl'}: cannot be written: {error.strerror}") from None

    def metrics(self):
        """Return the rows that were logged."""
        with open(self.path / "metrics.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def close(self):
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
