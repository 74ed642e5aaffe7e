"""Layers that join, scale or reshape: Add, Concat, Scale, Flatten."""

import math

from gpunet.errors import GpunetError
from gpunet.nn.graph import Layer, LayerError


class Add(Layer):
    """x1 + x2 + ..., of one shape: the residual sum."""

    def setup(self, *shapes):
        """The inputs' common shape."""
        if len(shapes) < 2 or len(set(shapes)) > 1:
            raise LayerError(f"expected two or more inputs of one shape, got {', '.join(map(str, shapes))}")
        return shapes[0]

    def forward(self, t, x, *others):
        """Trace the sum."""
        for other in others:
            y = t.over(x)
            t.launch("add_forward", x, other, y, y.size)
            x = y
        return x, len(others) + 1

    def backward(self, t, dy, saved):
        """Every input gets dy."""
        return (dy,) * saved


class Concat(Layer):
    """The inputs' channels side by side; they share every other size."""

    def setup(self, *shapes):
        """The common shape with the channels' sum."""
        if len({s[:-1] for s in shapes}) > 1:
            raise LayerError(f"expected inputs that differ in channels only, got {', '.join(map(str, shapes))}")
        return (*shapes[0][:-1], sum(s[-1] for s in shapes))

    def forward(self, t, *xs):
        """Trace one copy an input."""
        y = t.empty((*xs[0].shape[:-1], sum(x.shape[-1] for x in xs)))
        offset, width = 0, y.shape[-1]
        for x in xs:
            c = x.shape[-1]
            t.launch("concat_forward", x, y, x.size // c, c, width, offset)
            offset += c
        return y, [x.shape for x in xs]

    def backward(self, t, dy, saved):
        """Trace one copy out of dy an input."""
        dxs, offset, width = [], 0, dy.shape[-1]
        for shape in saved:
            dx, c = t.empty(shape), shape[-1]
            t.launch("concat_backward", dy, dx, dx.size // c, c, width, offset)
            dxs.append(dx)
            offset += c
        return tuple(dxs)


class Scale(Layer):
    """factor * x, for a fixed factor."""

    def __init__(self, factor, name=None):
        if not 0 < abs(factor) < math.inf:
            raise GpunetError(f"Scale: factor: expected a finite number other than 0, got {factor}")
        super().__init__(name)
        self.factor = factor

    def setup(self, shape):
        """The input's shape."""
        return shape

    def forward(self, t, x):
        """Trace the product."""
        y = t.over(x)
        t.launch("scale_forward", x, y, self.factor, x.size)
        return y, None

    def backward(self, t, dy, saved):
        """Trace factor * dy."""
        return self.forward(t, dy)[0]


class Flatten(Layer):
    """The image's values in one row, in (height, width, channel) order; no copy."""

    def setup(self, shape):
        """(values,)."""
        return (math.prod(shape),)

    def forward(self, t, x):
        """A view."""
        return x.reshape(x.shape[0], -1), x.shape

    def backward(self, t, dy, saved):
        """The view back."""
        return dy.reshape(*saved)
