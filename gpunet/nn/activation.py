"""Activations: y = f(x) element by element. Those that can take their derivative from y run in place."""

from gpunet.errors import GpunetError
from gpunet.nn.checks import number
from gpunet.nn.graph import Layer


class _Activation(Layer):
    """f(x), its kernels named `op`_forward and `op`_backward; `saves` is what backward reads."""

    op, saves, scalars = "", "y", ()

    def setup(self, shape):
        """The input's shape."""
        return shape

    def forward(self, t, x):
        """Trace y = f(x)."""
        y = t.over(x) if self.saves == "y" else t.empty(x.shape)
        t.launch(f"{self.op}_forward", x, y, *self.scalars, x.size)
        return y, y if self.saves == "y" else x

    def backward(self, t, dy, saved):
        """Trace dx = dy * f'(x)."""
        dx = t.over(dy)
        t.launch(f"{self.op}_backward", dy, saved, dx, *self.scalars, dy.size)
        return dx


class ReLU(_Activation):
    """max(x, 0)."""

    op = "relu"


class LeakyReLU(_Activation):
    """x where x > 0, else slope * x (Maas et al. 2013)."""

    op = "leaky_relu"

    def __init__(self, slope=0.01, name=None):
        if slope < 0:
            raise GpunetError(f"LeakyReLU: slope: expected 0 or more, got {slope}")
        super().__init__(name)
        self.scalars = (slope,)


class Sigmoid(_Activation):
    """1 / (1 + exp(-x))."""

    op = "sigmoid"


class Tanh(_Activation):
    """tanh(x)."""

    op = "tanh"


class GELU(_Activation):
    """x * P(X <= x) for a standard normal X, by the error function (Hendrycks & Gimpel 2016)."""

    op, saves = "gelu", "x"


class SiLU(_Activation):
    """x * sigmoid(x) (Elfwing et al. 2018)."""

    op, saves = "silu", "x"


class ELU(_Activation):
    """x where x > 0, else alpha * (exp(x) - 1) (Clevert et al. 2016)."""

    op = "elu"

    def __init__(self, alpha=1.0, name=None):
        super().__init__(name)
        self.scalars = (number(alpha, "ELU: alpha", 0),)


class Softplus(_Activation):
    """log(1 + exp(x)), without overflow (Dugas et al. 2001)."""

    op = "softplus"


class Hardswish(_Activation):
    """x * min(max(x + 3, 0), 6) / 6 (Howard et al. 2019)."""

    op, saves = "hardswish", "x"
