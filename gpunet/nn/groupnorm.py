"""Normalisation within each image, which no other image of the batch changes: group and layer normalisation."""

import math

from gpunet.core.params import Parameter
from gpunet.nn import init
from gpunet.nn.checks import number, one_of, whole
from gpunet.nn.graph import Layer, LayerError

LONG = 4096  # values of a group from which a block normalises it in place of a warp


class _Norm(Layer):
    """y = gamma * xhat + beta over groups within an image; subclasses give `view`. The same in training and inference.

    `scale` and `shift` tell whether gamma and beta train; otherwise they stay 1 and 0.
    """

    def __init__(self, eps, scale, shift, name):
        super().__init__(name)
        self.eps, self.scale, self.shift = number(eps, f"{type(self).__name__}: eps", 0), scale, shift

    def view(self, shape):
        """Return (images, pixels, channels, groups) that a kernel sees of one image of this shape."""
        raise NotImplementedError

    def setup(self, shape):
        """The input's shape; a gamma and a beta for each channel that the kernels see."""
        c = self.view(shape)[2]
        if not self.parameters:
            self.parameters = {
                "gamma": Parameter((c,), init.constant(1), trainable=self.scale),
                "beta": Parameter((c,), init.constant(0), trainable=self.shift),
            }
        if c != (expected := self.parameters["gamma"].size):
            raise LayerError(f"expected {expected} values to scale, as at its first call, got x of shape {shape}")
        return shape

    def _sizes(self, x):
        """Return n, pixels, c, groups."""
        images, *sizes = self.view(x.shape[1:])
        return x.shape[0] * images, *sizes

    def _threads(self, x):
        _, pixels, c, groups = self._sizes(x)
        return 32 if pixels * c // groups < LONG else 256

    def forward(self, t, x):
        """Trace moments and y in one launch."""
        p, sizes, y = self.parameters, self._sizes(x), t.over(x)
        mean, inverse = (t.empty((sizes[0], sizes[-1]), t.wide) for _ in range(2))
        given = x, t.weight(p["gamma"]), t.weight(p["beta"])
        t.launch("groupnorm_forward", *given, y, mean, inverse, self.eps, *sizes, self._threads(x))
        return y, (x, mean, inverse)

    def backward(self, t, dy, saved):
        """Trace dgamma, dbeta and dx."""
        p, sizes = self.parameters, self._sizes(dy)
        if self.scale or self.shift:
            self._gradients(t, dy, *saved)
        dx = t.over(dy)
        t.launch("groupnorm_backward", dy, *saved, t.weight(p["gamma"]), dx, *sizes, self._threads(dy))
        return dx

    def _gradients(self, t, dy, *saved):
        n, pixels, c, groups = self._sizes(dy)
        parts = t.parts(n * pixels, c)
        sums = {name: t.empty((parts, c), t.wide) for name in ("gamma", "beta")}
        t.launch("groupnorm_backward_sums", dy, *saved, *sums.values(), n, pixels, c, groups, parts)
        for name, partial in sums.items():
            if self.parameters[name].trainable:
                gradient, accumulate = t.gradient(self.parameters[name])
                t.launch("sum_parts", partial, gradient, accumulate, parts, c)

    def flops(self, shapes, output):
        """One multiplication and one addition an element."""
        return 2 * math.prod(output)


class GroupNorm(_Norm):
    """y = gamma * (x - mean) / sqrt(variance + eps) + beta over a group of channels of an image (Wu & He 2018).

    gamma and beta: one a channel. groups = channels is instance normalisation (Ulyanov et al. 2016).
    """

    def __init__(self, groups=32, eps=1e-5, scale=True, shift=True, name=None):
        super().__init__(eps, scale, shift, name)
        self.groups = whole(groups, "GroupNorm: groups")

    def view(self, shape):
        """An image, its pixels, its channels."""
        if shape[-1] % self.groups:
            raise LayerError(f"expected channels that {self.groups} groups divide, got x of shape {shape}")
        return 1, math.prod(shape[:-1]), shape[-1], self.groups


class LayerNorm(_Norm):
    """y = gamma * (x - mean) / sqrt(variance + eps) + beta over the features of one sample (Ba et al. 2016).

    over: "channels", of every pixel by itself, as Keras does and PyTorch's LayerNorm(channels) on images with channels
    last; gamma and beta one a channel. Or "image", all its height * width * channels values, as PyTorch's
    LayerNorm((channels, height, width)); gamma and beta one a value. Of a row of values both are the same.
    """

    def __init__(self, over="channels", eps=1e-5, scale=True, shift=True, name=None):
        super().__init__(eps, scale, shift, name)
        self.over = one_of(over, "LayerNorm: over", "channels", "image")

    def view(self, shape):
        """Pixels as images of one pixel, or an image as one pixel of very many channels."""
        values = math.prod(shape)
        c = shape[-1] if self.over == "channels" else values
        return values // c, 1, c, 1
