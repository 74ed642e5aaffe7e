"""Averages of the weights over updates, which are then evaluated, predicted with and saved in place of the weights."""

from dataclasses import dataclass, fields
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from gpunet.errors import GpunetError
from gpunet.optim.optimizer import Count, misfit


@dataclass(eq=False)
class Average:
    """What is kept beside the weights, in slot "average", after each update."""

    def __post_init__(self):
        for f in fields(self):
            if fault := misfit(getattr(self, f.name), f.type):
                raise GpunetError(f"{type(self).__name__}: {f.name}: {fault}")

    def launch(self, t, start, stop, decay, first, every):
        """Trace the launch for weights `start` to `stop`."""
        weights, average = (t.arena(a).slice(start, stop) for a in ("weights", "average"))
        t.launch("average_update", weights, average, t.arena("state"), decay, first, every, stop - start)


@dataclass(eq=False)
class EMA(Average):
    """average += (1 - d) * (w - average) after each update t, d = min(decay, (t + 1) / (t + 10)).

    The rise of d, as in TensorFlow, lets a young average forget where the weights came from.
    """

    decay: Annotated[float, Gt(0), Lt(1)] = 0.999

    def trace(self, t, start, stop):
        """Trace the average, one launch for all tensors."""
        self.launch(t, start, stop, self.decay, 0, 0)


@dataclass(eq=False)
class SWA(Average):
    """average = the mean of the weights at every `every`-th update after update `start`, and the weights before.

    Stochastic weight averaging, at a rate that stays high: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407.
    """

    start: Annotated[int, Ge(0)]
    every: Count = 1

    def trace(self, t, start, stop):
        """Trace the average, one launch for all tensors."""
        self.launch(t, start, stop, 0.0, int(self.start), int(self.every))
