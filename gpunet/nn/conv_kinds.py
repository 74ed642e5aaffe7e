"""Convolutions of other kinds: filters a channel, transposed, unshared weights; their sizes are a Geometry, too."""

import numpy as np

from gpunet.core.params import Parameter
from gpunet.errors import GpunetError
from gpunet.nn.conv import Conv2d, Geometry, engine
from gpunet.nn.graph import Layer, LayerError, spatial
from gpunet.nn.linear import bias_gradient, weight_and_bias
from gpunet.nn.pool import pair


class DepthwiseConv2d(Conv2d):
    """y[n,oy,ox,o] = sum over the patch of channel o // multiplier at (oy, ox) of x . weight[..., o] + bias[o].

    Each channel has `multiplier` filters of its own. weight (kh, kw, 1, in * multiplier), as Conv2d's with as many
    groups as channels, by which it can be replaced; sizes as there. Kernels of its own, no matrix product.
    """

    def __init__(
        self,
        size,
        multiplier=1,
        stride=1,
        padding="same",
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
        _check_count(multiplier, "DepthwiseConv2d: multiplier")
        self.multiplier = multiplier
        super().__init__(
            multiplier, size, stride, padding, 1, dilation, bias, weight_init, bias_init, weight_rate, weight_decay,
            bias_rate, bias_decay, name,
        )  # fmt: skip

    def setup(self, shape):
        """(oh, ow, channels * multiplier)."""
        if not self.parameters:
            self.groups = spatial(shape)[2]
            self.outputs = self.groups * self.multiplier
        return super().setup(shape)

    def forward(self, t, x):
        """Trace the sums over the windows, and the bias."""
        g = self.geometry(x.shape[0], x.shape[1:])
        y = t.empty((g.n, g.oh, g.ow, g.outputs))
        t.launch("depthwise_forward", x, t.weight(self.parameters["weight"]), y, *g.sizes[:-1], self.multiplier)
        if self.bias:
            t.launch("bias_forward", t.weight(self.parameters["bias"]), y, g.rows, g.outputs)
        return y, (x, g)

    def backward(self, t, dy, saved):
        """Trace dW as sums of parts, db and dx."""
        x, g = saved
        sizes, taps = (*g.sizes[:-1], self.multiplier), g.kh * g.kw * g.outputs
        parts = t.parts(g.n * g.oh, taps)
        partial = t.empty((parts, taps), t.wide)
        t.launch("depthwise_weight", x, dy, partial, *sizes, parts)
        gradient, accumulate = t.gradient(self.parameters["weight"])
        t.launch("sum_parts", partial, gradient, accumulate, parts, taps)
        if self.bias:
            bias_gradient(t, dy, self.parameters["bias"])
        dx = t.empty(x.shape)
        t.launch("depthwise_backward", dy, t.weight(self.parameters["weight"]), dx, *sizes)
        return dx


class ConvTranspose2d(Layer):
    """y = the gradient by its input of a convolution whose output is x, + bias: a learned upsampling (Zeiler 2010).

    Output size is (h - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1, as PyTorch's; the last
    `output_padding` rows and columns, fewer than the stride, are those that the convolution's windows do not reach.
    weight (kh, kw, out / groups, in): that convolution's.
    """

    def __init__(
        self,
        outputs,
        size,
        stride=1,
        padding=0,
        output_padding=0,
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
        self.outputs, self.groups, self.bias = outputs, groups, bias
        names = "size", "stride", "padding", "output_padding", "dilation"
        given = size, stride, padding, output_padding, dilation
        self.size, self.stride, self.padding, self.output_padding, self.dilation = (
            pair(value, f"ConvTranspose2d: {what}") for value, what in zip(given, names, strict=True)
        )
        _check_count(outputs, "ConvTranspose2d: outputs")
        _check_count(groups, "ConvTranspose2d: groups")
        if min(*self.size, *self.stride, *self.dilation) < 1 or outputs % groups:
            raise GpunetError(
                f"ConvTranspose2d: expected size, stride, dilation of at least 1, outputs that groups divide, "
                f"got {self.size}, {self.stride}, {self.dilation}, {outputs} and {groups}"
            )
        if any(extra >= s for extra, s in zip(self.output_padding, self.stride, strict=True)):
            raise GpunetError(
                f"ConvTranspose2d: output_padding: expected less than the stride {self.stride}, "
                f"got {self.output_padding}"
            )
        self._given = weight_and_bias(weight_init, bias_init, weight_rate, weight_decay, bias_rate, bias_decay)

    def setup(self, shape):
        """(oh, ow, outputs) by the rule above."""
        h, w, c = spatial(shape)
        if c % self.groups:
            raise LayerError(f"expected channels that {self.groups} groups divide, got {c}")
        if not self.parameters:
            weight, bias = self._given
            shape = (*self.size, self.outputs // self.groups, c)
            self.parameters["weight"] = Parameter(shape, **weight | {"initial": self._turned})
            if self.bias:
                self.parameters["bias"] = Parameter((self.outputs,), **bias)
        expected = self.parameters["weight"].shape[3]
        if c != expected:
            raise LayerError(f"expected {expected} input channels, as at its first call, got x of shape {shape}")
        rules = zip((h, w), self.size, self.stride, self.padding, self.output_padding, self.dilation, strict=True)
        out = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, k, s, p, extra, d in rules]
        return (*out, self.outputs)

    def _turned(self, rng, shape):
        """Draw as for a convolution from in to out, whose fan-in is this layer's at stride 1."""
        kh, kw, out, c = shape
        drawn = self._given[0]["initial"](rng, (kh, kw, c // self.groups, self.outputs))
        return drawn.reshape(kh, kw, -1, self.groups, out).transpose(0, 1, 4, 3, 2).reshape(shape)

    def geometry(self, n, shape):
        """Return the sizes of the convolution from y to x, for n images of x's shape."""
        h, w, c = shape
        return Geometry(
            n, *self.setup(shape), h, w, *self.size, *self.stride, *self.padding, *self.dilation, self.groups, c
        )

    def forward(self, t, x):
        """Trace y as that convolution's gradient by its input, and the bias."""
        g = self.geometry(x.shape[0], x.shape[1:])
        y = t.empty((g.n, g.h, g.w, g.c))
        engine(t, g).backward_input(t, g, x, t.operand(self.parameters["weight"]), y)
        if self.bias:
            t.launch("bias_forward", t.weight(self.parameters["bias"]), y, y.size // g.c, g.c)
        return y, (x, g)

    def backward(self, t, dy, saved):
        """Trace dW, db, and dx as that convolution of dy."""
        x, g = saved
        gradient, accumulate = t.gradient(self.parameters["weight"])
        engine(t, g).backward_weight(t, g, dy, None, x, gradient, accumulate)
        if self.bias:
            bias_gradient(t, dy, self.parameters["bias"])
        dx = t.empty(x.shape)
        engine(t, g).forward(t, g, dy, t.operand(self.parameters["weight"]), None, dx)
        return dx

    def flops(self, shapes, output):
        """A multiplication and an addition a product."""
        return self.geometry(1, shapes[0]).flops


class LocallyConnected2d(Conv2d):
    """y[n,oy,ox] = sum over the patch at (oy, ox) of x . weight[oy,ox] + bias[oy,ox]: a Conv2d that shares no weights.

    weight (oh, ow, kh, kw, in, out), bias (oh * ow * out,); sizes as Conv2d's. So the image's size is fixed (DeepFace,
    Taigman et al. 2014; cuda-convnet's local layers).
    """

    def __init__(
        self,
        outputs,
        size,
        stride=1,
        padding="same",
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
        super().__init__(
            outputs, size, stride, padding, 1, dilation, bias, weight_init, bias_init, weight_rate, weight_decay,
            bias_rate, bias_decay, name,
        )  # fmt: skip

    def setup(self, shape):
        """(oh, ow, outputs)."""
        h, w, c = spatial(shape)
        oh, ow = self._windows(h, w)
        if not self.parameters:
            weight, bias = self._given
            shape = (oh, ow, *self.size, c, self.outputs)
            self.parameters["weight"] = Parameter(shape, **weight | {"initial": self._places})
            if self.bias:
                self.parameters["bias"] = Parameter((oh * ow * self.outputs,), **bias)
        *places, _, _, channels, _ = self.parameters["weight"].shape
        if [oh, ow, c] != [*places, channels]:
            raise LayerError(
                f"expected {channels} input channels and windows at {places[0]} x {places[1]} places, as at its first "
                f"call, got x of shape {shape}"
            )
        return oh, ow, self.outputs

    def _places(self, rng, shape):
        """Draw the weights of each place as a convolution's."""
        return np.stack([self._given[0]["initial"](rng, shape[2:]) for _ in range(shape[0] * shape[1])]).reshape(shape)

    def forward(self, t, x):
        """Trace the patches, and a product at each place."""
        g = self.geometry(x.shape[0], x.shape[1:])
        y = t.empty((g.n, g.oh, g.ow, g.outputs))
        t.matmul(_by_place(self._columns(t, g, x), g), self._weights(t, g), _by_place(y, g))
        if self.bias:
            t.launch("bias_forward", t.weight(self.parameters["bias"]), y, g.n, y.size // g.n)
        return y, (x, g)

    def backward(self, t, dy, saved):
        """Trace dW and dx by products at each place, and db."""
        x, g = saved
        gradient, accumulate = t.gradient(self.parameters["weight"])
        columns = _transposed(_by_place(self._columns(t, g, x), g))
        t.matmul(columns, _by_place(dy, g), gradient.reshape(g.oh * g.ow, g.depth, g.outputs), accumulate)
        if self.bias:
            bias_gradient(t, dy.reshape(g.n, dy.size // g.n), self.parameters["bias"])
        columns, dx = t.empty((g.rows, g.depth)), t.empty(x.shape)
        t.matmul(_by_place(dy, g), _transposed(self._weights(t, g)), _by_place(columns, g))
        t.launch("fold", columns, dx, *g.sizes)
        return dx

    def _columns(self, t, g, x):
        columns = t.empty((g.rows, g.depth))
        t.launch("unfold", x, columns, *g.sizes)
        return columns

    def _weights(self, t, g):
        return t.operand(self.parameters["weight"]).reshape(g.oh * g.ow, g.depth, g.outputs)


def _by_place(rows, g):
    """View a row a pixel of n images as (places, n, width)."""
    places = g.oh * g.ow
    width = rows.size // g.rows
    return rows.strided((places, g.n, width), (width, places * width, 1))


def _transposed(batch):
    (batches, rows, columns), (step, down, along) = batch.shape, batch.element_strides
    return batch.strided((batches, columns, rows), (step, along, down))


def _check_count(value, what):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GpunetError(f"{what}: expected a whole number of at least 1, got {value!r}")
