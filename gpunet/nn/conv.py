"""Two-dimensional convolution. What computes it is an engine, chosen before the trace: forward, dW and dX together."""

from dataclasses import dataclass

from gpunet.core.params import Parameter
from gpunet.errors import GpunetError
from gpunet.nn.graph import Layer, LayerError, spatial, width
from gpunet.nn.linear import bias_gradient, weight_and_bias
from gpunet.nn.pool import pair


@dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution of n images, in the order in which kernels take them."""

    n: int
    h: int
    w: int
    c: int
    oh: int
    ow: int
    kh: int
    kw: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int
    groups: int
    outputs: int

    @property
    def sizes(self):
        """The arguments of `unfold` and `fold`."""
        return tuple(vars(self).values())[:-1]

    @property
    def rows(self):
        """Output pixels of the batch: rows of the GEMM."""
        return self.n * self.oh * self.ow

    @property
    def depth(self):
        """Products an output sums: kh * kw * c / groups."""
        return self.kh * self.kw * (self.c // self.groups)

    @property
    def flops(self):
        """Multiplications and additions of one pass."""
        return 2 * self.rows * self.depth * self.outputs

    @property
    def pointwise(self):
        """Whether every output pixel reads one input pixel, in order: a plain GEMM."""
        return self.kh == self.kw == self.stride_y == self.stride_x == 1 and self.pad_y == self.pad_x == 0


class Conv2d(Layer):
    """y[n,oy,ox] = sum over the kh x kw patch at (oy, ox) of x . weight + bias.

    weight (kh, kw, in / groups, out); padding "same" keeps the size at stride 1. Output size is
    floor((h + 2 * padding - dilation * (k - 1) - 1) / stride) + 1. weight_rate, weight_decay, bias_rate and bias_decay
    multiply the optimizer's learning rate and weight decay.
    """

    def __init__(
        self,
        outputs,
        size,
        stride=1,
        padding="same",
        groups=1,
        dilation=1,
        bias=True,
        weight_init=None,
        bias_init=None,
        weight_rate=1.0,
        weight_decay=1.0,
        bias_rate=1.0,
        bias_decay=1.0,
        name=None,
    ):
        super().__init__(name)
        kind = type(self).__name__
        self.outputs, self.groups = width(outputs, f"{kind}: outputs"), width(groups, f"{kind}: groups")
        self.bias = bias
        self.size, self.stride, self.dilation = (
            pair(v, f"{kind}: {what}") for v, what in ((size, "size"), (stride, "stride"), (dilation, "dilation"))
        )
        if padding == "same":
            if any(d * (k - 1) % 2 for d, k in zip(self.dilation, self.size, strict=True)):
                raise GpunetError(f"{kind}: padding 'same' needs an odd size, got {self.size}")
            padding = tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.size, strict=True))
        self.padding = pair(padding, f"{kind}: padding")
        if min(outputs, groups, *self.size, *self.stride, *self.dilation) < 1 or outputs % groups:
            raise GpunetError(
                f"{kind}: expected outputs, size, stride, dilation, groups of at least 1, outputs that groups divide, "
                f"got {outputs}, {self.size}, {self.stride}, {self.dilation}, {groups}"
            )
        self._given = weight_and_bias(weight_init, bias_init, weight_rate, weight_decay, bias_rate, bias_decay)

    def setup(self, shape):
        """(oh, ow, outputs); the weight's shape follows from the input's channels."""
        h, w, c = spatial(shape)
        if c % self.groups:
            raise LayerError(f"expected channels that {self.groups} groups divide, got {c}")
        if not self.parameters:
            weight, bias = self._given
            self.parameters["weight"] = Parameter((*self.size, c // self.groups, self.outputs), **weight)
            if self.bias:
                self.parameters["bias"] = Parameter((self.outputs,), **bias)
        expected = self.parameters["weight"].shape[2] * self.groups
        if c != expected:
            raise LayerError(f"expected {expected} input channels, as at its first call, got x of shape {shape}")
        return (*self._windows(h, w), self.outputs)

    def _windows(self, h, w):
        """Return (oh, ow), how many windows fit an image of h x w, or raise LayerError."""
        out = []
        for n, k, s, p, d in zip((h, w), self.size, self.stride, self.padding, self.dilation, strict=True):
            if n + 2 * p < d * (k - 1) + 1:
                raise LayerError(f"expected an input of at least {d * (k - 1) + 1 - 2 * p} pixels, got {n}")
            out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
        return out

    def geometry(self, n, shape):
        """Return the sizes for n images of a shape."""
        oh, ow, _ = self.setup(shape)
        return Geometry(
            n, *shape, oh, ow, *self.size, *self.stride, *self.padding, *self.dilation, self.groups, self.outputs
        )

    def forward(self, t, x):
        """Trace y by the engine."""
        g = self.geometry(x.shape[0], x.shape[1:])
        y = t.empty((g.n, g.oh, g.ow, g.outputs))
        weight = t.operand(self.parameters["weight"])
        bias = t.weight(self.parameters["bias"]) if self.bias else None
        kept = engine(t, g).forward(t, g, x, weight, bias, y)
        return y, (x, kept, g)

    def backward(self, t, dy, saved):
        """Trace dW, db and dx by the same engine."""
        x, kept, g = saved
        gradient, accumulate = t.gradient(self.parameters["weight"])
        engine(t, g).backward_weight(t, g, x, kept, dy, gradient, accumulate)
        if self.bias:
            bias_gradient(t, dy, self.parameters["bias"])
        dx = t.empty(x.shape)
        engine(t, g).backward_input(t, g, dy, t.operand(self.parameters["weight"]), dx)
        return dx

    def flops(self, shapes, output):
        """A multiplication and an addition a product."""
        return self.geometry(1, shapes[0]).flops


class Unfold:
    """The portable engine: `unfold` writes every patch as a row, and one GEMM a pass does the rest."""

    @staticmethod
    def _columns(t, g, x):
        if g.pointwise and g.groups == 1:
            return x.reshape(1, g.rows, g.c)
        columns = t.empty((g.groups, g.rows, g.depth))
        t.launch("unfold", x, columns, *g.sizes)
        return columns

    @staticmethod
    def _by_group(g, rows):
        """View (rows, groups * width) as (groups, rows, width)."""
        m, width = rows.size // g.outputs, g.outputs // g.groups
        if g.groups == 1:
            return rows.reshape(1, m, g.outputs)
        return rows.reshape(m, g.outputs).strided((g.groups, m, width), (width, g.outputs, 1))

    @staticmethod
    def _transposed(batch):
        s = batch.element_strides
        return batch.strided((batch.shape[0], batch.shape[2], batch.shape[1]), (s[0], s[2], s[1]))

    def forward(self, t, g, x, weight, bias, y):
        """y = columns @ W + b; return what backward_weight wants kept, here nothing."""
        t.matmul(self._columns(t, g, x), self._by_group(g, weight), self._by_group(g, y))
        if bias is not None:
            t.launch("bias_forward", bias, y, g.rows, g.outputs)

    def backward_weight(self, t, g, x, kept, dy, gradient, accumulate):
        """dW = columns^T @ dy."""
        columns = self._transposed(self._columns(t, g, x))
        t.matmul(columns, self._by_group(g, dy), self._by_group(g, gradient), accumulate)

    def backward_input(self, t, g, dy, weight, dx):
        """dx = fold(dy @ W^T)."""
        pointwise = g.pointwise and g.groups == 1
        columns = dx.reshape(1, g.rows, g.c) if pointwise else t.empty((g.groups, g.rows, g.depth))
        t.matmul(self._by_group(g, dy), self._transposed(self._by_group(g, weight)), columns)
        if not pointwise:
            t.launch("fold", columns, dx, *g.sizes)


class Native:
    """An engine of the backend's own: its three passes are functions `<name>_forward`, ... of the backend."""

    def __init__(self, name):
        self.name = name

    def forward(self, t, g, x, weight, bias, y):
        """y = the convolution of x, + b."""
        extra = () if bias is None else (bias,)
        t.call(f"{self.name}_forward", (x, weight, *extra), (y,), g.flops, geometry=g)

    def backward_weight(self, t, g, x, kept, dy, gradient, accumulate):
        """dW."""
        t.call(f"{self.name}_backward_weight", (x, dy), (gradient,), g.flops, geometry=g, accumulate=accumulate)

    def backward_input(self, t, g, dy, weight, dx):
        """dx; workspace for the weights turned by 180 degrees, which make it a convolution of dy at stride 1."""
        turned = t.empty((g.kh, g.kw, g.outputs, g.c))
        t.call(f"{self.name}_backward_input", (dy, weight), (dx, turned), g.flops, geometry=g)


class Winograd(Native):
    """A native engine whose passes have as workspace the weights as polynomials' values at (size + 3)^2 places."""

    GAP = 16  # numbers between two planes, which would else be a power of two apart and share lines of the cache

    def _values(self, t, g):
        return t.empty(((g.kh + 3) * (g.kw + 3), g.c * g.outputs + self.GAP))

    def forward(self, t, g, x, weight, bias, y):
        """y = the convolution of x, + b."""
        reads = (x, weight) if bias is None else (x, weight, bias)
        t.call(f"{self.name}_forward", reads, (y, self._values(t, g)), g.flops, geometry=g)

    def backward_weight(self, t, g, x, kept, dy, gradient, accumulate):
        """dW. The images are transformed again: keeping that would take 2.25 times their memory."""
        writes = gradient, self._values(t, g)
        t.call(f"{self.name}_backward_weight", (x, dy), writes, g.flops, geometry=g, accumulate=accumulate)

    def backward_input(self, t, g, dy, weight, dx):
        """dx."""
        writes = dx, t.empty((g.kh, g.kw, g.outputs, g.c)), self._values(t, g)
        t.call(f"{self.name}_backward_input", (dy, weight), writes, g.flops, geometry=g)


ENGINES = {
    "unfold": Unfold(),
    "blocked": Native("blocked"),
    "winograd": Winograd("winograd"),
    "direct": Native("direct"),
}


def engine(t, g):
    """Return the engine that the trace names for a geometry; grouped convolutions go by the portable one."""
    if g.groups > 1:
        return ENGINES["unfold"]
    return ENGINES[t.engine if isinstance(t.engine, str) else t.engine(g)]
