"""Batch normalisation (Ioffe & Szegedy 2015): the moments cross the batch, so here replicas meet."""

from gpunet.core.params import Parameter
from gpunet.nn import init
from gpunet.nn.graph import Layer

NO_SHARE = 2**62  # rows: a batch has no share in frozen statistics, as if it were one of so many


class BatchNorm(Layer):
    """y = gamma * (x - mean) / sqrt(variance + eps) + beta, mean and variance a channel over images and pixels.

    In inference the running mean and variance are used; they follow the batch's by `momentum` (unbiased variance, as
    PyTorch). `scale` and `shift` tell whether gamma and beta train; otherwise they stay 1 and 0. Where the running
    statistics are frozen, training uses them as inference does.
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
        """Trace the statistics and the normalisation."""
        given, y = self._given(t, x), t.over(x)
        t.launch("batchnorm_forward", *given, y, *matrix_size(x))
        return y, given

    def backward(self, t, dy, saved):
        """Trace dgamma, dbeta (this replica's images) and dx (which needs everybody's sums)."""
        x, mean, inverse, gamma, _ = saved
        sums = self._sums(t, "batchnorm_backward_sums", dy, x, mean, inverse)
        return self._dx(t, "batchnorm_backward", dy, x, mean, inverse, gamma, sums)

    def _given(self, t, x):
        """Trace moments and their combination over replicas; return (x, mean, inverse, gamma, beta)."""
        p, (rows, c) = self.parameters, matrix_size(x)
        inverse = t.empty((c,), t.wide)
        if t.training and not t.frozen(p["mean"]):
            parts = t.parts(rows, c)
            moments = t.empty((parts, 3, c), t.wide)
            t.launch("batchnorm_moments", x, moments, rows, c, parts)
            moments = t.gather(moments)
            total, mean = t.empty((3, c), t.wide), t.empty((c,), t.wide)
            t.launch("batchnorm_combine", moments, total, parts * t.share.count, c)
            batch_mean, accumulate = t.batch_statistic(p["mean"])
            batch_variance, _ = t.batch_statistic(p["variance"])
            t.launch("batchnorm_statistics", total, mean, inverse, batch_mean, batch_variance, self.eps, accumulate, c)
        else:
            mean = t.weight(p["mean"])
            t.launch("batchnorm_inverse", t.weight(p["variance"]), inverse, self.eps, c)
        return x, mean, inverse, t.weight(p["gamma"]), t.weight(p["beta"])

    def _sums(self, t, kernel, dy, *given):
        """Trace the sums of dy and dy * xhat by this kernel, dgamma and dbeta; return the sums of all replicas."""
        p, (rows, c) = self.parameters, matrix_size(dy)
        parts = t.parts(rows, c)
        partial, sums = t.empty((parts, 2, c), t.wide), t.empty((2, c), t.wide)
        t.launch(kernel, dy, *given, partial, rows, c, parts)
        t.launch("sum_parts", partial, sums, 0, parts, 2 * c)
        if self.scale or self.shift:
            dgamma, again = t.gradient(p["gamma"]) if self.scale else (t.empty((c,), t.wide), 0)
            dbeta, also = t.gradient(p["beta"]) if self.shift else (t.empty((c,), t.wide), 0)
            t.launch("batchnorm_gradient", sums, dgamma, dbeta, max(again, also), c)
        return t.reduce(sums)

    def _dx(self, t, kernel, dy, *given):
        """Trace dx by this kernel; `given` ends with the sums."""
        rows, c = matrix_size(dy)
        dx = t.over(dy)
        total = rows // t.share.size * t.share.batch
        if t.frozen(self.parameters["mean"]):
            total = NO_SHARE
        t.launch(kernel, dy, *given, dx, total, rows, c)
        return dx

    def flops(self, shapes, output):
        """One multiplication and one addition an element."""
        return 2 * output[0] * (output[1] * output[2] if len(output) == 3 else 1)


def matrix_size(x):
    """Return (rows, c): x as the matrix that the kernels see, a row a pixel."""
    c = x.shape[-1]
    return x.size // c, c
