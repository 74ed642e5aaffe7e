"""Batch normalisation (Ioffe & Szegedy 2015): the moments cross the batch, so here replicas meet."""

from gpunet.core.params import Parameter
from gpunet.nn import init
from gpunet.nn.graph import Layer


class BatchNorm(Layer):
    """y = gamma * (x - mean) / sqrt(variance + eps) + beta, mean and variance a channel over images and pixels.

    In inference the running mean and variance are used; they follow the batch's by `momentum` (unbiased variance, as
    PyTorch). `scale` and `shift` tell whether gamma and beta train; otherwise they stay 1 and 0.
    """

    def __init__(self, momentum=0.1, eps=1e-5, scale=True, shift=True, name=None):
        super().__init__(name)
        self.momentum, self.eps, self.scale, self.shift = momentum, eps, scale, shift

    def setup(self, shape):
        """The input's shape; parameters of its channels."""
        c = shape[-1:]
        if not self.parameters:
            self.parameters = {
                "gamma": Parameter(c, init.constant(1), trainable=self.scale),
                "beta": Parameter(c, init.constant(0), trainable=self.shift),
                "mean": Parameter(c, init.constant(0), rate=self.momentum, trainable=False),
                "variance": Parameter(c, init.constant(1), rate=self.momentum, trainable=False),
            }
        return shape

    def forward(self, t, x):
        """Trace moments, their combination over replicas, and the normalisation."""
        p, c = self.parameters, x.shape[-1]
        rows = x.size // c
        inverse = t.empty((c,), t.wide)
        if t.training:
            moments = t.empty((t.parts, 3, c), t.wide)
            t.launch("batchnorm_moments", x, moments, rows, c, t.parts)
            moments, parts = t.gather(moments), t.parts * t.share.count
            total, mean = t.empty((3, c), t.wide), t.empty((c,), t.wide)
            t.launch("batchnorm_combine", moments, total, parts, c)
            batch_mean, accumulate = t.batch_statistic(p["mean"])
            batch_variance, _ = t.batch_statistic(p["variance"])
            t.launch("batchnorm_statistics", total, mean, inverse, batch_mean, batch_variance, self.eps, accumulate, c)
        else:
            mean = t.weight(p["mean"])
            t.launch("batchnorm_inverse", t.weight(p["variance"]), inverse, self.eps, c)
        y = t.over(x)
        t.launch("batchnorm_forward", x, mean, inverse, t.weight(p["gamma"]), t.weight(p["beta"]), y, rows, c)
        return y, (x, mean, inverse)

    def backward(self, t, dy, saved):
        """Trace dgamma, dbeta (this replica's images) and dx (which needs everybody's sums)."""
        x, mean, inverse = saved
        p, c = self.parameters, x.shape[-1]
        rows = x.size // c
        parts, sums = t.empty((t.parts, 2, c), t.wide), t.empty((2, c), t.wide)
        t.launch("batchnorm_backward_sums", dy, x, mean, inverse, parts, rows, c, t.parts)
        t.launch("sum_parts", parts, sums, 0, t.parts, 2 * c)
        if self.scale or self.shift:
            dgamma, again = t.gradient(p["gamma"]) if self.scale else (t.empty((c,), t.wide), 0)
            dbeta, also = t.gradient(p["beta"]) if self.shift else (t.empty((c,), t.wide), 0)
            t.launch("batchnorm_gradient", sums, dgamma, dbeta, max(again, also), c)
        sums = t.reduce(sums)
        dx = t.over(dy)
        total = rows // t.share.size * t.share.batch
        t.launch("batchnorm_backward", dy, x, mean, inverse, t.weight(p["gamma"]), sums, dx, total, rows, c)
        return dx

    def flops(self, shapes, output):
        """One multiplication and one addition an element."""
        return 2 * output[0] * (output[1] * output[2] if len(output) == 3 else 1)
