"""The fully connected layer."""

import math

from gpunet.core.params import Parameter
from gpunet.errors import GpunetError
from gpunet.nn import init
from gpunet.nn.graph import Layer, LayerError, width


class Linear(Layer):
    """y = x @ weight + bias, weight (in, out); an image of several axes is flattened first.

    weight_rate, weight_decay, bias_rate, bias_decay multiply the optimizer's learning rate and weight decay.
    """

    def __init__(
        self,
        outputs,
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
        self.outputs = width(outputs, "Linear: outputs")
        self.bias = bias
        self._given = weight_and_bias(weight_init, bias_init, weight_rate, weight_decay, bias_rate, bias_decay)

    def setup(self, shape):
        """(outputs,); the weight's shape follows from the input."""
        size = math.prod(shape)
        if not self.parameters:
            weight, bias = self._given
            self.parameters["weight"] = Parameter((size, self.outputs), **weight)
            if self.bias:
                self.parameters["bias"] = Parameter((self.outputs,), **bias)
        expected = self.parameters["weight"].shape[0]
        if size != expected:
            raise LayerError(f"expected {expected} inputs, as at its first call, got {size}")
        return (self.outputs,)

    def forward(self, t, x):
        """Trace one matmul and the bias."""
        rows = x.reshape(x.shape[0], -1)
        y = t.empty((x.shape[0], self.outputs))
        t.matmul(rows, t.operand(self.parameters["weight"]), y)
        if self.bias:
            t.launch("bias_forward", t.weight(self.parameters["bias"]), y, y.shape[0], self.outputs)
        return y, x

    def backward(self, t, dy, saved):
        """Trace dW = x^T dy, db = column sums of dy, dx = dy W^T."""
        rows = saved.reshape(saved.shape[0], -1)
        weight, accumulate = t.gradient(self.parameters["weight"])
        t.matmul(rows.T, dy, weight, accumulate)
        if self.bias:
            bias_gradient(t, dy, self.parameters["bias"])
        dx = t.empty(rows.shape)
        t.matmul(dy, t.operand(self.parameters["weight"]).T, dx)
        return dx.reshape(*saved.shape)

    def flops(self, shapes, output):
        """A multiplication and an addition a weight."""
        return 2 * self.parameters["weight"].size


def weight_and_bias(weight_init, bias_init, weight_rate, weight_decay, bias_rate, bias_decay):
    """Return what a layer makes its weight of and its bias of: arguments of a Parameter beside the shape."""
    return (
        {"initial": init.named(weight_init or "he"), **multipliers(weight_rate=weight_rate, weight_decay=weight_decay)},
        {"initial": init.named(bias_init or "zeros"), **multipliers(bias_rate=bias_rate, bias_decay=bias_decay)},
    )


def multipliers(**values):
    """Return {"rate": ..., "decay": ...}, what a weight multiplies the optimizer's by, of weight_rate=... and so on."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise GpunetError(f"{name}: expected 0 or more, got {value}")
    return {name.rpartition("_")[2]: value for name, value in values.items()}


def bias_gradient(t, dy, bias):
    """Trace the gradient of a bias: dy summed over all but its last axis."""
    c = dy.shape[-1]
    rows = dy.size // c
    parts = t.parts(rows, c)
    partial = t.empty((parts, c), t.wide)
    t.launch("column_sum", dy, partial, rows, c, parts)
    gradient, accumulate = t.gradient(bias)
    t.launch("sum_parts", partial, gradient, accumulate, parts, c)
