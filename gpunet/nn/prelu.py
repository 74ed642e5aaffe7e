"""The rectifier whose slope is learned."""

from gpunet.core.params import Parameter
from gpunet.nn import init
from gpunet.nn.checks import number
from gpunet.nn.graph import Layer, LayerError


class PReLU(Layer):
    """x where x > 0, else slope * x, where the slope is learned (He et al. 2015).

    One slope a channel, or one in all where `shared`; each begins at `slope`. They do not decay: that would draw them
    to ReLU's 0.
    """

    def __init__(self, slope=0.25, shared=False, name=None):
        super().__init__(name)
        self.slope, self.shared = number(slope, "PReLU: slope"), shared

    def setup(self, shape):
        """The input's shape; a slope for each of its channels, or one."""
        c = 1 if self.shared else shape[-1]
        if not self.parameters:
            self.parameters["slope"] = Parameter((c,), init.constant(self.slope), decay=0.0)
        if c != (expected := self.parameters["slope"].size):
            raise LayerError(f"expected {expected} channels, as at its first call, got x of shape {shape}")
        return shape

    def forward(self, t, x):
        """Trace y; backward reads x, for a slope may become negative."""
        slope, y = self.parameters["slope"], t.empty(x.shape)
        t.launch("prelu_forward", x, t.weight(slope), y, x.size // slope.size, slope.size)
        return y, x

    def backward(self, t, dy, saved):
        """Trace dslope = sum of dy * x where x <= 0, and dx."""
        slope = self.parameters["slope"]
        rows, c = dy.size // slope.size, slope.size
        parts = t.parts(rows, c)
        sums = t.empty((parts, c), t.wide)
        t.launch("prelu_backward_sums", dy, saved, sums, rows, c, parts)
        gradient, accumulate = t.gradient(slope)
        t.launch("sum_parts", sums, gradient, accumulate, parts, c)
        dx = t.over(dy)
        t.launch("prelu_backward", dy, saved, t.weight(slope), dx, rows, c)
        return dx
