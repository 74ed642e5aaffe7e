"""Rules that scale the rate of each weight by the gradients that it has seen."""

from dataclasses import KW_ONLY, dataclass

from gpunet.optim.optimizer import Count, Natural, Optimizer, Positive, Share, corrections


@dataclass(eq=False)
class Adagrad(Optimizer):
    """s += d^2, w -= lr * d / (sqrt(s) + eps).

    Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html; eps keeps a weight without any gradient where it is.
    """

    lr: Natural = 0.01
    _: KW_ONLY
    eps: Positive = 1e-10
    weight_decay: Natural = 0.0

    slots = ("square",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "adagrad_update", self.eps)


@dataclass(eq=False)
class WindowedAdagrad(Optimizer):
    """w -= lr * d / (sqrt(s) + eps), s the sum of d^2 over the last `window` updates.

    Where the lecture says AdaDelta with a sliding window, this is meant. It keeps as many arenas as the window has
    updates; rmsprop with inside = true needs one.
    """

    lr: Natural = 0.003
    _: KW_ONLY
    window: Count = 10
    eps: Positive = 1e-8
    weight_decay: Natural = 0.0

    @property
    def slots(self):
        """One arena for each update that is remembered."""
        return tuple(f"square{place}" for place in range(int(self.window)))

    def update(self, t, start, stop):
        """Trace one launch an arena and one for the weights."""
        total = t.empty((stop - start,), t.wide)
        w, g, table = (self.part(t, a, start, stop) for a in ("weights", "gradient", "weights.table"))
        decay, state = t.arena("weights.decay"), t.arena("state")
        for place, slot in enumerate(self.slots):
            square, sizes = self.part(t, slot, start, stop), (decay.size, stop - start)
            settings = (place, int(self.window), int(place > 0), int(self.decoupled))
            t.launch("window_square", w, g, square, total, table, decay, state, *settings, *sizes)
        self.launch(t, start, stop, "window_update", self.eps, slots=(total,))


@dataclass(eq=False)
class Adadelta(Optimizer):
    """s follows d^2, u = d * sqrt(a + eps) / sqrt(s + eps), a follows u^2, w -= lr * u; both at 1 - rho.

    Zeiler 2012, https://arxiv.org/abs/1212.5701. What the lecture prints under this name lacks a: that is rmsprop.
    """

    lr: Natural = 1.0
    _: KW_ONLY
    rho: Share = 0.9
    eps: Positive = 1e-6
    weight_decay: Natural = 0.0

    slots = ("square", "change")

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "adadelta_update", self.rho, self.eps)


@dataclass(eq=False)
class RMSProp(Optimizer):
    """s = alpha * s + (1 - alpha) * d^2, v = momentum * v + d / (sqrt(s) + eps), w -= lr * v.

    centered: s less the squared mean of d, which follows at 1 - alpha. inside: d / sqrt(s + eps), the formula that the
    lecture prints as AdaDelta (with alpha for its rho). Tieleman and Hinton 2012; centered after Graves 2013.
    """

    lr: Natural = 1e-3
    _: KW_ONLY
    alpha: Share = 0.99
    eps: Positive = 1e-8
    momentum: Share = 0.0
    centered: bool = False
    inside: bool = False
    weight_decay: Natural = 0.0

    slots = ("square", "velocity", "mean")

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        settings = (self.alpha, self.eps, self.momentum, int(self.centered), int(self.inside))
        self.launch(t, start, stop, "rmsprop_update", *settings)


@dataclass(eq=False)
class Adam(Optimizer):
    """m follows d, s follows d^2, w -= lr * m' / (sqrt(s') + eps), m' = m / (1 - beta1^t), s' = s / (1 - beta2^t).

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980.
    """

    lr: Natural = 1e-3
    _: KW_ONLY
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Positive = 1e-8
    weight_decay: Natural = 0.0

    slots = ("mean", "square")

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors behind the one that counts."""
        reads = (corrections(t, self.beta1, self.beta2),)
        self.launch(t, start, stop, "adam_update", self.beta1, self.beta2, self.eps, reads=reads)


@dataclass(eq=False, kw_only=True)
class AdamW(Adam):
    """As adam, and w *= 1 - lr * weight_decay: decay is no part of the gradient, and is not scaled as that is.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    weight_decay: Natural = 0.01
    decoupled: bool = True


@dataclass(eq=False)
class Lion(Optimizer):
    """w -= lr * sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g; decay is decoupled.

    Chen et al. 2023, https://arxiv.org/abs/2302.06675: a third to a tenth of AdamW's rate.
    """

    lr: Natural = 3e-4
    _: KW_ONLY
    beta1: Share = 0.9
    beta2: Share = 0.99
    weight_decay: Natural = 0.01
    decoupled: bool = True

    slots = ("mean",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors."""
        self.launch(t, start, stop, "lion_update", self.beta1, self.beta2)


@dataclass(eq=False)
class NaturalGradient(Optimizer):
    """w -= lr * d / (F' + damping), F follows count * d^2 at 1 - rho, F' = F / (1 - rho^t).

    F is the diagonal of the empirical Fisher information of one image, estimated from batches of `count`: the mean of
    their gradients has a count-th of an image's variance. Amari 1998, with the diagonal of LeCun et al. 1998; without
    the square root of Adam, so that damping decides how long the steps of weights without gradient are.
    """

    lr: Natural = 1e-3
    _: KW_ONLY
    rho: Share = 0.95
    damping: Positive = 1e-3
    weight_decay: Natural = 0.0

    slots = ("fisher",)

    def update(self, t, start, stop):
        """Trace the rule, one launch for all tensors behind the one that counts."""
        reads = (corrections(t, self.rho),)
        self.launch(t, start, stop, "fisher_update", self.rho, self.damping, reads=reads)
