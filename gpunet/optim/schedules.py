"""Learning-rate schedules: each returns a run's rates, one an update, the float64 table that a step reads.

Lengths (`size`, `milestones`, `warmup`) are in epochs, which may be fractions, or in updates (unit="steps").
Over the first `warmup` the rate climbs from warmup_from * lr in a straight line; cosine and linear begin
their fall after it, step and multistep count from the start of the run; to onecycle it is the climb itself.
Arguments by name only are what a config may set; their annotations are its limits.
"""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

Unit = Literal["epochs", "steps"]
Positive = Annotated[float, Gt(0)]
Length = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


def const(steps, per_epoch, lr, *, unit: Unit = "epochs", warmup: Length = 0, warmup_from: Share = 0.1):
    """rate = lr."""
    return lr * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def step(
    steps,
    per_epoch,
    lr,
    *,
    size: Positive,
    gamma: Positive = 0.1,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * gamma ** floor(update / size)."""
    drops = np.arange(steps) // max(_updates(size, unit, per_epoch), 1)
    return lr * float(gamma) ** drops * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def multistep(
    steps,
    per_epoch,
    lr,
    *,
    milestones: list[Positive],
    gamma: Positive = 0.1,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * gamma ** (how many milestones have been reached)."""
    reached = sorted(_updates(m, unit, per_epoch) for m in milestones)
    drops = np.searchsorted(reached, np.arange(steps), side="right")
    return lr * float(gamma) ** drops * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def cosine(
    steps,
    per_epoch,
    lr,
    *,
    final: Share = 0.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * (final + (1 - final) * (1 + cos(pi * t)) / 2), t from 0 after the warm-up to 1."""
    rise = _updates(warmup, unit, per_epoch)
    fall = (1 + np.cos(np.pi * _progress(steps, rise))) / 2
    return lr * (final + (1 - final) * fall) * _climb(steps, rise, warmup_from)


def linear(
    steps,
    per_epoch,
    lr,
    *,
    final: Share = 0.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * (1 - (1 - final) * t), t from 0 after the warm-up to 1."""
    rise = _updates(warmup, unit, per_epoch)
    return lr * (1 - (1 - final) * _progress(steps, rise)) * _climb(steps, rise, warmup_from)


def onecycle(
    steps,
    per_epoch,
    lr,
    *,
    warmup: Length | None = None,
    warmup_from: Share = 0.04,
    final: Share = 4e-6,
    shape: Literal["cosine", "linear"] = "cosine",
    unit: Unit = "epochs",
):
    """Up from warmup_from * lr to lr over the warm-up (default: 30 % of the run), then down to final * lr.

    Smith and Topin, https://arxiv.org/abs/1708.07120; without the momentum that cycles against the rate.
    """
    peak = (0.3 * steps if warmup is None else _updates(warmup, unit, per_epoch)) - 1
    update = np.arange(steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(update <= peak, update / peak, (update - peak) / (steps - 1 - peak))
    t = np.clip(np.nan_to_num(t, nan=1.0), 0, 1)
    t = (1 - np.cos(np.pi * t)) / 2 if shape == "cosine" else t
    start, end = np.where(update <= peak, warmup_from, 1.0), np.where(update <= peak, 1.0, final)
    return lr * (start + (end - start) * t)


SCHEDULES = {f.__name__: f for f in (const, step, multistep, cosine, linear, onecycle)}


def _updates(length, unit, per_epoch):
    """Return a length as a whole number of updates."""
    return round(length * (per_epoch if unit == "epochs" else 1))


def _climb(steps, rise, start):
    """Return a factor an update: from `start` in a straight line to 1 at update `rise`."""
    return start + (1 - start) * np.minimum(np.arange(steps) / rise, 1) if rise else np.ones(steps)


def _progress(steps, rise):
    """Return 0 through the first `rise` updates, then a straight line that would be 1 at update `steps`."""
    return np.maximum(np.arange(steps) - rise, 0) / max(steps - rise, 1)
