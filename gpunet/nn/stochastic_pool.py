"""Stochastic pooling: a value of the window, drawn by its size."""

import math

from gpunet.errors import GpunetError
from gpunet.nn.pool import _Pool

MOST = 255  # places of a window: which one was drawn is kept in a byte, 255 for none


class StochasticPool(_Pool):
    """y = a value of the window, drawn with probability a / sum of a (Zeiler & Fergus 2013); in inference its mean.

    a = max(x, 0): what is negative, and the padding, is never drawn, and a window without anything above 0 gives 0 and
    no gradient. In inference y = sum of p * a = sum of a * a / sum of a. The gradient goes to the place drawn. Size,
    stride, padding and ceil are MaxPool's.
    """

    def __init__(self, size, stride=None, padding=0, ceil=False, name=None):
        super().__init__(size, stride, padding, ceil, name)
        if math.prod(self.size) > MOST:
            raise GpunetError(f"StochasticPool: size: expected a window of at most {MOST} pixels, got {self.size}")

    def forward(self, t, x):
        """Trace the draws, or in inference the means."""
        y = self._output(t, x)
        sizes = self._sizes(x.shape, y.shape)
        if not t.training:
            t.launch("stochastic_pool_expected", x, y, *sizes)
            return y, None
        index = t.empty(y.shape, "u1")
        t.launch("stochastic_pool_forward", x, y, index, t.arena("state"), t.seed, t.site, t.share.first, *sizes)
        return y, (index, x.shape)

    def backward(self, t, dy, saved):
        """Trace dx: dy at the place that was drawn."""
        index, shape = saved
        dx = t.empty(shape)
        t.launch("maxpool_backward", dy, index, dx, *self._sizes(shape, dy.shape))
        return dx
