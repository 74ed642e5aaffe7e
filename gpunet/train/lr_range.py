"""The learning-rate range test (Smith 2015): a short training whose rate grows until the loss explodes.

    found = range_test(load_config("quickstart"), 1e-4, 10, updates=300)
    print(found)
    found.save("lr-range")

A loop over the public Step, which writes State's lr_scale before each update; no run is left.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole
from gpunet.train.plots import plot_range
from gpunet.train.trainer import Trainer

FEWEST = 10  # updates
LAST = 5  # losses whose mean decides whether to go on
EXPLODED = 4.0  # times its lowest value: the test ends
EXPLODING = 1.5  # times the lowest smoothed loss, behind it: the rate is too high
WIDTH = 1 / 30  # of the test: the standard deviation of the smoothing


@dataclass
class RangeTest:
    """Rate and loss of each update, the losses smoothed, and the rates they tell (None: there is none).

    steepest: where the smoothed loss falls fastest by the logarithm of the rate. exploding: the first rate behind the
    lowest smoothed loss where it is half as high again, or where the test ended with a loss that is not finite.
    factor: by what train.lr_rule multiplies optimizer.lr.
    """

    title: str
    rates: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    factor: float = 1.0

    def __post_init__(self):
        self.smoothed = smooth(self.losses)
        lowest = int(self.smoothed.argmin())
        slopes = np.gradient(self.smoothed, np.log(self.rates))[: lowest + 1]
        high = np.flatnonzero(self.smoothed[lowest:] > EXPLODING * self.smoothed[lowest])
        self.steepest = float(self.rates[slopes.argmin()]) if slopes.min() < 0 else None
        high = lowest + high[0] if len(high) else -1
        self.exploding = float(self.rates[high]) if high > 0 or not np.isfinite(self.losses[-1]) else None

    @property
    def suggested(self):
        """The rate to try first: the steepest descent, or a tenth of where the loss explodes if that is lower."""
        if self.steepest is None or self.exploding is None:
            return self.steepest
        return min(self.steepest, self.exploding / 10)

    def __str__(self):
        rates = self.rates
        first = f"{self.title}: {len(rates)} updates, learning rate {rates[0]:.3g} to {rates[-1]:.3g}"
        told = [("steepest descent of the loss at", self.steepest), ("it explodes from", self.exploding)]
        told += [("a tenth of that is", self.exploding and self.exploding / 10)]
        lines = [first, *(f"{what} {rate:.3g}" for what, rate in told if rate)]
        if self.exploding is None:
            lines.append("it does not explode: a larger --to would show where")
        if self.suggested is None:
            return "\n".join([*lines, "nothing to suggest: the loss never fell; try a lower --from or more --updates"])
        rule = f"  # times {self.factor:.4g} by train.lr_rule" if self.factor != 1 else ""
        return "\n".join([*lines, f"to begin with: --set optimizer.lr={self.suggested / self.factor:.2g}{rule}"])

    def save(self, folder):
        """Write lr-range.png and lr-range.json into a folder; return their paths."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GpunetError(f"{folder}: cannot be made: {error.strerror}; choose another place with --out") from None
        numbers = {"title": self.title, "steepest": self.steepest, "exploding": self.exploding}
        numbers |= {"suggested": self.suggested, "lr_rule": self.factor}
        columns = {"rates": self.rates, "losses": self.losses, "smoothed": self.smoothed}
        numbers |= {name: [v if np.isfinite(v) else None for v in array.tolist()] for name, array in columns.items()}
        plot_range(folder / "lr-range.png", self)
        write_whole(folder / "lr-range.json", (json.dumps(numbers) + "\n").encode())
        return folder / "lr-range.png", folder / "lr-range.json"


def range_test(config, low=1e-5, high=10.0, updates=200, *, linear=False, graph=None, data=None, show=False):
    """Return the RangeTest of a Config: up to `updates` updates, the rate growing from low to high by equal factors.

    linear: by equal steps. It ends where the mean of the last losses is EXPLODED times its lowest, or not finite.
    graph, data: as the Trainer takes them. Raises GpunetError for rates and numbers that make no test.
    """
    if not 0 < low < high < np.inf:
        raise GpunetError(f"lr-range: expected rates 0 < from < to, got from {low:g} to {high:g}")
    if updates < FEWEST:
        raise GpunetError(f"lr-range: updates: expected at least {FEWEST}, got {updates}")
    factor, config = config.rate / config.optimizer.lr, config.model_copy(deep=True)
    config.optimizer.lr, config.train.lr_rule, config.schedule = high, "none", {"name": "const"}
    config.train.patience, config.train.watch, config.run.tensorboard = None, [], False
    trainer = Trainer(config, graph=graph, data=data, show=False)
    rates = (np.linspace if linear else np.geomspace)(low, high, updates)
    try:
        accumulate = config.train.batches_an_update(trainer.step.batches)
        losses = _train(trainer.step, accumulate, rates, show)
    finally:
        trainer.step.close()
    return RangeTest(f"{config.model.name} on {trainer.data.name}", rates[: len(losses)], np.array(losses), factor)


def _train(step, accumulate, rates, show):
    """Return the loss of each update, the rates in turn; fewer than rates where they explode."""
    losses, lowest = [], np.inf
    for rate in tqdm(rates, "learning rates", unit="update", leave=False, disable=None if show else True):
        while step.state["update"] == len(losses) and not step.halted:  # again where half precision skipped one
            state = step.state
            state["lr_scale"] = rate / rates[-1]
            step.state = state
            step(accumulate)
            step.wait()
        if step.halted:
            losses.append(np.inf)
            break
        losses.append(float(step.metrics(len(losses))[0, 0]))
        mean = np.mean(losses[-LAST:])
        lowest = min(lowest, mean)
        if not mean <= EXPLODED * lowest:
            break
    if len(losses) < FEWEST:
        raise GpunetError(
            f"lr-range: the loss explodes within {len(losses)} updates, at {rates[len(losses) - 1]:.3g}; "
            "try a lower --from"
        )
    return losses


def smooth(losses):
    """Return losses averaged over their neighbours by a normal curve; explosions are cut first, infinite ones too."""
    known = np.where(np.isfinite(losses), losses, np.inf)
    known = np.minimum(known, max(EXPLODED * known.min(), known[: known.argmin() + 1].max()))
    n = len(known)
    distance = (np.arange(n)[:, None] - np.arange(n)) / max(WIDTH * n, 1)
    weights = np.exp(-(distance**2) / 2)
    return weights @ known / weights.sum(axis=1)
