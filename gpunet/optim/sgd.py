"""Stochastic gradient descent: in the two forms in use, averaged, and by sign alone."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from gpunet.optim.optimizer import Natural, Optimizer, Positive, Share


@dataclass(eq=False)
class SGD(Optimizer):
    """v = momentum * v + d, w -= lr * v (nesterov: lr * (d + momentum * v)), d = gradient + weight_decay * w.

    That is form "pytorch"; form "caffe": v = momentum * v + lr * d, w -= v (nesterov: (1 + momentum) * v - momentum *
    v_before). They differ where the rate changes. One image a batch is on-line learning, train.accumulate = "epoch"
    descent by the gradient of the whole set. Momentum after Polyak 1964, Nesterov's after Sutskever et al. 2013.
    """

    momentum: Share = 0.9
    weight_decay: Natural = 0.0
    nesterov: bool = False
    form: Literal["pytorch", "caffe"] = "pytorch"

    slots = ("velocity",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        caffe = int(self.form == "caffe")
        self.launch(t, start, stop, "sgd_update", self.momentum, int(self.nesterov), caffe)


@dataclass(eq=False)
class SignSGD(Optimizer):
    """v = momentum * v + (1 - momentum) * d, w -= lr * sign(v): every weight moves by the rate.

    Bernstein et al. 2018, https://arxiv.org/abs/1802.04434 (Signum; without momentum it is signSGD).
    """

    lr: Natural = 1e-3
    _: KW_ONLY
    momentum: Share = 0.9
    weight_decay: Natural = 0.0

    slots = ("velocity",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "sign_update", self.momentum)


@dataclass(eq=False)
class ASGD(Optimizer):
    """w -= eta * (d + lambd * w), eta = lr / (1 + lambd * lr * t)^alpha; the average of w after update t0 is kept.

    Polyak and Juditsky 1992, as Bottou's averaged SGD and PyTorch's ASGD have it. Slot "average" is the mean of the
    weights since update t0, the weights themselves until then.
    """

    lr: Natural = 0.1
    _: KW_ONLY
    lambd: Natural = 1e-4
    alpha: Natural = 0.75
    t0: Natural = 1e6
    weight_decay: Natural = 0.0

    slots = ("average",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "asgd_update", self.lambd, self.alpha, self.t0)


@dataclass(eq=False)
class Rprop(Optimizer):
    """w -= sign(d) * step, step *= 1.2 where d keeps its sign, 0.5 where it turns, within step_min .. step_max.

    Only for the gradient of the whole set (train.accumulate = "epoch"). lr is the first step; a schedule has no say
    after that. Where d turns its weight stays and the next step counts as a first one, as in PyTorch. Riedmiller and
    Braun 1993.
    """

    lr: Natural = 0.01
    _: KW_ONLY
    up: Positive = 1.2
    down: Share = 0.5
    step_min: Positive = 1e-6
    step_max: Positive = 50.0
    weight_decay: Natural = 0.0

    slots = ("step", "before")

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "rprop_update", self.up, self.down, self.step_min, self.step_max)
