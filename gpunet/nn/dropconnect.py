"""The fully connected layer that drops weights."""

from gpunet.nn.checks import one_of, share
from gpunet.nn.dropout import LANES, threshold_of
from gpunet.nn.linear import Linear, bias_gradient


class DropConnect(Linear):
    """y = f(x @ (weight where a draw keeps it, else 0) + bias), weight (in, out) (Wan et al. 2013).

    rate: of weights that a draw drops. mask: "example", a mask for each, as in the paper, or "batch", one for all,
    which is as fast as Linear. activation: f, "relu" or None. It belongs to the layer because inference needs it: there
    the sum of what is kept is taken as normal, u ~ N(keep * x @ weight + bias, keep * (1 - keep) * x^2 @ weight^2) with
    keep = 1 - rate, and y = E[f(u)]: of "relu" in closed form, of None the mean. The bias is never dropped. Other
    arguments are Linear's. Masks are drawn again in backward, so that nothing is stored.
    """

    def __init__(
        self,
        outputs,
        rate=0.5,
        mask="example",
        activation="relu",
        bias=True,
        weight_init=None,
        bias_init=None,
        weight_rate=1.0,
        weight_decay=1.0,
        bias_rate=1.0,
        bias_decay=1.0,
        name=None,
    ):
        super().__init__(outputs, bias, weight_init, bias_init, weight_rate, weight_decay, bias_rate, bias_decay, name)
        self.rate = share(rate, "DropConnect: rate")
        self.mask = one_of(mask, "DropConnect: mask", "example", "batch")
        self.activation = one_of(activation, "DropConnect: activation", "relu", None)
        self.threshold = threshold_of(self.rate)

    @property
    def keep(self):
        """The share of weights that stay."""
        return (LANES - self.threshold) / LANES

    def forward(self, t, x):
        """Trace the masked product, the bias and f; or in inference the mean of that over masks."""
        rows, y = x.reshape(x.shape[0], -1), t.empty((x.shape[0], self.outputs))
        if not t.training:
            return self._expected(t, rows, y), None
        if self.mask == "batch":
            t.matmul(rows, self._masked(t), y)
        else:
            t.launch("dropconnect_forward", rows, self._weight(t), y, *self._draw(t), *self._sizes(t, rows))
        self._add_bias(t, y)
        if self.activation:
            z, y = y, t.over(y)
            t.launch("relu_forward", z, y, y.size)
        return y, (x, y)

    def backward(self, t, dy, saved):
        """Trace dW, db and dx, all by the forward's masks."""
        x, y = saved
        rows = x.reshape(x.shape[0], -1)
        if self.activation:
            d, dy = dy, t.over(dy)
            t.launch("relu_backward", d, y, dy, dy.size)
        gradient, accumulate = t.gradient(self.parameters["weight"])
        dx = t.empty(rows.shape)
        draw, sizes = self._draw(t), self._sizes(t, rows)
        if self.mask == "batch":
            full = t.empty(gradient.shape, t.wide)
            t.matmul(rows.T, dy, full)
            t.launch("dropconnect_gradient", full, gradient, *draw, accumulate, *gradient.shape)
            t.matmul(dy, self._masked(t).T, dx)
        else:
            first, *rest = sizes
            t.launch("dropconnect_backward_weight", rows, dy, gradient, *draw, first, accumulate, *rest)
            t.launch("dropconnect_backward_input", dy, self._weight(t), dx, *draw, *sizes)
        if self.bias:
            bias_gradient(t, dy, self.parameters["bias"])
        return dx.reshape(*x.shape)

    def _expected(self, t, rows, y):
        """Trace E[f(u)]."""
        t.matmul(rows, t.operand(self.parameters["weight"]), y)
        mean = t.over(y)
        t.launch("dropout_scale", y, mean, self.keep, y.size)
        self._add_bias(t, mean)
        if not self.activation:
            return mean
        y = t.over(mean)
        t.launch("dropconnect_relu", rows, self._weight(t), mean, y, self.keep, rows.shape[0], *self._shape)
        return y

    def _add_bias(self, t, y):
        if self.bias:
            t.launch("bias_forward", t.weight(self.parameters["bias"]), y, y.shape[0], self.outputs)

    def _masked(self, t):
        """Trace the weights that this batch keeps."""
        masked = t.empty(self._shape)
        t.launch("dropconnect_weights", self._weight(t), masked, *self._draw(t), *self._shape)
        return masked

    def _weight(self, t):
        return t.weight(self.parameters["weight"])

    @property
    def _shape(self):
        return self.parameters["weight"].shape

    def _draw(self, t):
        return t.arena("state"), t.seed, t.site, self.threshold

    def _sizes(self, t, rows):
        return t.share.first, rows.shape[0], *self._shape
