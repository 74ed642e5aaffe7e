"""Pooling over windows and over whole images."""

from gpunet.errors import GpunetError
from gpunet.nn.graph import Layer, LayerError, spatial


def pair(value, what):
    """Return (y, x) of one number or two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) and v >= 0 for v in values):
        raise GpunetError(f"{what}: expected one or two whole numbers, got {value!r}")
    return values


class _Pool(Layer):
    """Windows of `size` every `stride` (default: size) pixels over the image padded by `padding`.

    ceil: the last window may hang over the edge (Caffe's rule: output = ceil((h + 2p - k) / stride) + 1, a window that
    would start in the far padding is dropped); else output = floor(...) + 1.
    """

    def __init__(self, size, stride=None, padding=0, ceil=False, name=None):
        super().__init__(name)
        self.size, self.padding = pair(size, "pool: size"), pair(padding, "pool: padding")
        self.stride = pair(stride if stride is not None else size, "pool: stride")
        self.ceil = ceil
        if min(*self.size, *self.stride) < 1 or any(2 * p > k for p, k in zip(self.padding, self.size, strict=True)):
            raise GpunetError(
                f"pool: expected size and stride of at least 1 and padding of at most half the size, "
                f"got size {self.size}, stride {self.stride}, padding {self.padding}"
            )

    def setup(self, shape):
        """Output height and width by the rule above."""
        h, w, c = spatial(shape)
        return (*(self._out(n, i) for i, n in enumerate((h, w))), c)

    def _out(self, n, axis):
        k, stride, pad = self.size[axis], self.stride[axis], self.padding[axis]
        room = n + 2 * pad - k
        if room < 0 and not self.ceil:
            raise LayerError(f"expected an input of at least {k - 2 * pad} pixels, got {n}")
        out = (-(-max(room, 0) // stride) if self.ceil else room // stride) + 1
        if self.ceil and (out - 1) * stride >= n + pad:
            out -= 1
        return out

    def _sizes(self, x, y):
        return (*x, *y[1:3], *self.size, *self.stride, *self.padding)

    def _output(self, t, x):
        return t.empty((x.shape[0], *self.setup(x.shape[1:])))


class MaxPool(_Pool):
    """The largest value of each window; its gradient goes to the first of equals."""

    def forward(self, t, x):
        """Trace the maxima and which place in the window each came from."""
        y = self._output(t, x)
        index = t.empty(y.shape, "u1")
        t.launch("maxpool_forward", x, y, index, *self._sizes(x.shape, y.shape))
        return y, (index, x.shape)

    def backward(self, t, dy, saved):
        """Trace dx: dy at the place of the maximum."""
        index, shape = saved
        dx = t.empty(shape)
        t.launch("maxpool_backward", dy, index, dx, *self._sizes(shape, dy.shape))
        return dx


class AvgPool(_Pool):
    """The mean of each window. include_pad: the divisor counts padded pixels, though never those beyond the padding."""

    def __init__(self, size, stride=None, padding=0, ceil=False, include_pad=True, name=None):
        super().__init__(size, stride, padding, ceil, name)
        self.include_pad = int(include_pad)

    def forward(self, t, x):
        """Trace the means."""
        y = self._output(t, x)
        t.launch("avgpool_forward", x, y, *self._sizes(x.shape, y.shape), self.include_pad)
        return y, x.shape

    def backward(self, t, dy, saved):
        """Trace dx: dy over the divisor, summed over the windows that hold the pixel."""
        dx = t.empty(saved)
        t.launch("avgpool_backward", dy, dx, *self._sizes(saved, dy.shape), self.include_pad)
        return dx


class GlobalAvgPool(Layer):
    """The mean over all pixels, (h, w, c) -> (c,)."""

    def setup(self, shape):
        """(channels,)."""
        return spatial(shape)[2:]

    def forward(self, t, x):
        """Trace the means."""
        n, h, w, c = x.shape
        y = t.empty((n, c))
        t.launch("global_average_forward", x, y, n, h * w, c)
        return y, x.shape

    def backward(self, t, dy, saved):
        """Trace dx = dy / pixels."""
        n, h, w, c = saved
        dx = t.empty(saved)
        t.launch("global_average_backward", dy, dx, n, h * w, c)
        return dx
