"""What a training does about its validation: a rate that falls where that gets no better, and an early end.

Knows values and settings, not the training; what it counts is part of a checkpoint.
"""

import math

from gpunet.errors import GpunetError
from gpunet.train.config import Natural, Section


class Waited(Section):
    """The best value so far, and the evaluations in a row that were no better."""

    best: float | None = None
    evaluations: Natural = 0

    def see(self, value, sign, least):
        """Count an evaluation. sign: 1 where larger is better, -1 where smaller is; `least`: by more than that."""
        if math.isfinite(value) and (self.best is None or sign * (value - self.best) > least):
            self.best, self.evaluations = value, 0
        else:
            self.evaluations += 1


class Plateau(Waited):
    """The state of the schedule `plateau` (see there): `scale` is what it multiplies the rate by."""

    scale: float = 1.0
    rest: Natural = 0  # evaluations that are not counted any more

    def fall(self, value, settings):
        """Count an evaluation; return whether the rate falls after it."""
        sign = 1 if settings.monitor == "accuracy" else -1
        self.see(value, sign, settings.threshold * abs(self.best or 0))
        if self.rest:
            self.rest, self.evaluations = self.rest - 1, 0
        if self.evaluations <= settings.patience:
            return False
        before, self.scale = self.scale, max(self.scale * settings.factor, settings.minimum)
        self.rest, self.evaluations = settings.cooldown, 0
        return self.scale < before


def check(config, data):
    """Raise GpunetError where a config wants validation to be watched, and the data set has none or not that."""
    if config.schedule.name == "plateau":
        if config.schedule.monitor == "accuracy" and data.train.labels is None:
            raise GpunetError(
                f'schedule.monitor = "accuracy": expected a set with labels, got values of {data.name}; known: "loss"'
            )
        _check_split('schedule.name = "plateau"', data)
    if config.train.patience is not None:
        _check_split(f"train.patience = {config.train.patience}", data)


def _check_split(setting, data):
    if "validation" not in data.splits:
        raise GpunetError(
            f"{setting}: expected a validation split to look at, got {data.name} with {' and '.join(data.splits)}; "
            "hold some images out: data.validation = 0.1"
        )
