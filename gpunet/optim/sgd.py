"""Stochastic gradient descent, in the two forms in use."""

from gpunet.core.params import BLOCK
from gpunet.errors import GpunetError


class SGD:
    """d = gradient / count + weight_decay * w, then with velocity v:

    form "pytorch": v = momentum * v + d, w -= lr * v (Nesterov: lr * (d + momentum * v));
    form "caffe": v = momentum * v + lr * d, w -= v (Nesterov: (1 + momentum) * v - momentum * v_before).
    They differ where the rate changes. clip: the largest norm of the whole gradient, 0 for none.
    Momentum after Polyak 1964, Nesterov's after Sutskever et al. 2013.
    """

    slots = ("velocity",)

    def __init__(self, lr, momentum=0.0, weight_decay=0.0, nesterov=False, form="pytorch", clip=0.0):
        if form not in ("pytorch", "caffe"):
            raise GpunetError(f"SGD: form: expected 'pytorch' or 'caffe', got {form!r}")
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("clip", clip)):
            if value < 0:
                raise GpunetError(f"SGD: {name}: expected 0 or more, got {value}")
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.form, self.clip = form, clip

    def trace(self, t, start, stop):
        """Trace the update of weights `start` to `stop` of the arena, one launch for all tensors."""
        weights, gradient, velocity = (t.arena(a).slice(start, stop) for a in ("weights", "gradient", "velocity"))
        columns = [t.arena(f"weights.{c}") for c in ("rate", "decay", "group")]
        rates = t.arena("rates")
        t.launch(
            "sgd_update",
            weights,
            gradient,
            velocity,
            t.arena("weights.table").slice(start // BLOCK, stop // BLOCK),
            *columns,
            rates,
            t.arena("state"),
            self.momentum,
            int(self.nesterov),
            int(self.form == "caffe"),
            columns[0].size,
            rates.size,
            stop - start,
        )
