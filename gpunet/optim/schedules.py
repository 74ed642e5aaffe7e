"""Learning-rate schedules: each returns a run's rates, one an update, the float64 table that a step reads.

Lengths (`size`, `milestones`, `warmup`) are in epochs, which may be fractions, or in updates (unit="steps").
Over the first `warmup` the rate climbs from warmup_from * lr in a straight line; those that fall to the end of the run,
and cosine_restarts, begin after it, the others count from the start of the run; to onecycle it is the climb itself.
`n` counts updates or epochs, as `unit` says: epochs in fractions, so that a rate falls at every update.
Arguments by name only are what a config may set; their annotations are its limits.
"""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

Unit = Literal["epochs", "steps"]
Positive = Annotated[float, Gt(0)]
Length = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Natural = Annotated[int, Ge(0)]


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


def exp(
    steps,
    per_epoch,
    lr,
    *,
    gamma: Positive,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * gamma ** n."""
    fall = float(gamma) ** _places(steps, unit, per_epoch)
    return lr * fall * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def inverse(
    steps,
    per_epoch,
    lr,
    *,
    gamma: Positive,
    power: Positive = 1.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * (1 + gamma * n) ** -power; Caffe's inv."""
    fall = (1 + gamma * _places(steps, unit, per_epoch)) ** -float(power)
    return lr * fall * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def c_over_t(
    steps,
    per_epoch,
    lr,
    *,
    c: Positive = 1.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * min(1, c / t), t = 1 at the first update: lr until t = c, then in inverse proportion to time.

    With unit="steps" and c = 1 it is lr / t. sum rate = inf and sum rate^2 < inf, by which the noise of the gradients
    averages out (Robbins and Monro 1951); in practice it is soon too slow.
    """
    t = np.arange(1, steps + 1)
    fall = np.minimum(max(_updates(c, unit, per_epoch), 1) / t, 1)
    return lr * fall * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def poly(
    steps,
    per_epoch,
    lr,
    *,
    power: Positive = 1.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * (1 - t) ** power, t from 0 after the warm-up to 1: (1 - n / N) ** power in a run of N."""
    rise = _updates(warmup, unit, per_epoch)
    return lr * (1 - _progress(steps, rise)) ** float(power) * _climb(steps, rise, warmup_from)


def sigmoid(
    steps,
    per_epoch,
    lr,
    *,
    gamma: float,
    size: Positive,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr / (1 + exp(-gamma * (n - size))): half of lr at n = size; it falls where gamma is negative, as Caffe's.

    gamma is per epoch, or per update with unit="steps".
    """
    with np.errstate(over="ignore"):  # of exp: the rate is 0 there
        share = 1 / (1 + np.exp(-gamma * (_places(steps, unit, per_epoch) - size)))
    return lr * share * _climb(steps, _updates(warmup, unit, per_epoch), warmup_from)


def cosine_restarts(
    steps,
    per_epoch,
    lr,
    *,
    period: Positive,
    multiplier: Annotated[float, Ge(1)] = 1.0,
    final: Share = 0.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr * (final + (1 - final) * (1 + cos(pi * t)) / 2), t from 0 to 1 in each period, and again from 0.

    A period is `multiplier` times as long as the one before. SGDR, Loshchilov and Hutter 2017.
    """
    rise = _updates(warmup, unit, per_epoch)
    starts, length = [0.0], float(max(_updates(period, unit, per_epoch), 1))
    while starts[-1] < steps:
        starts.append(starts[-1] + length)
        length *= multiplier
    update = np.maximum(np.arange(steps) - rise, 0)
    place = np.searchsorted(starts, update, side="right") - 1
    t = (update - np.take(starts, place)) / np.take(np.diff(starts), place)
    return lr * (final + (1 - final) * (1 + np.cos(np.pi * t)) / 2) * _climb(steps, rise, warmup_from)


def plateau(
    steps,
    per_epoch,
    lr,
    *,
    monitor: Literal["loss", "accuracy"] = "loss",
    factor: Annotated[float, Gt(0), Lt(1)] = 0.1,
    patience: Natural = 10,
    threshold: Length = 1e-4,
    cooldown: Natural = 0,
    minimum: Share = 0.0,
    unit: Unit = "epochs",
    warmup: Length = 0,
    warmup_from: Share = 0.1,
):
    """rate = lr, times `factor` whenever validation was no better in more than `patience` evaluations in a row.

    Better is by more than `threshold` times the best loss (accuracy) so far; after a fall, `cooldown` evaluations are
    not counted; the rate stays at least `minimum` * lr. As PyTorch's ReduceLROnPlateau. The table has the warm-up only:
    the Trainer does the rest (gpunet.train.monitor), by State's lr_scale.
    """
    return const(steps, per_epoch, lr, unit=unit, warmup=warmup, warmup_from=warmup_from)


SCHEDULES = {
    f.__name__: f
    for f in (
        *(const, step, multistep, exp, inverse, c_over_t, poly, sigmoid),
        *(cosine, cosine_restarts, linear, onecycle, plateau),
    )
}


def _places(steps, unit, per_epoch):
    """Return n of each update: the updates, or the epochs in fractions, before it."""
    return np.arange(steps) / (per_epoch if unit == "epochs" else 1)


def _updates(length, unit, per_epoch):
    """Return a length as a whole number of updates."""
    return round(length * (per_epoch if unit == "epochs" else 1))


def _climb(steps, rise, start):
    """Return a factor an update: from `start` in a straight line to 1 at update `rise`."""
    return start + (1 - start) * np.minimum(np.arange(steps) / rise, 1) if rise else np.ones(steps)


def _progress(steps, rise):
    """Return 0 through the first `rise` updates, then a straight line that would be 1 at update `steps`."""
    return np.maximum(np.arange(steps) - rise, 0) / max(steps - rise, 1)
