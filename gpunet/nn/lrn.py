"""Local response normalisation, as networks had it before batch normalisation."""

from gpunet.errors import GpunetError
from gpunet.nn.graph import Layer, spatial

REGIONS = {"across": "lrn_across", "within": "lrn_within"}  # whose kernels


class LRN(Layer):
    """x / (k + alpha * mean of x^2 around it)^beta (Krizhevsky et al. 2012).

    region "across": the mean over the `size` channels around, at the same pixel; PyTorch's LocalResponseNorm.
    "within": over the size x size pixels around, in the same channel; Caffe's WITHIN_CHANNEL, whose k is 1. Places
    beyond the first and last channel, or outside of the image, count as zeros. Krizhevsky's alpha, of a sum and not a
    mean, is this one over size.
    """

    def __init__(self, size=5, alpha=1e-4, beta=0.75, k=1.0, region="across", name=None):
        super().__init__(name)
        if not isinstance(region, str) or region not in REGIONS:
            raise GpunetError(f"LRN: region: expected 'across' or 'within', got {region!r}")
        if type(size) is not int or size < 1 or size % 2 == 0:
            raise GpunetError(f"LRN: size: expected an odd whole number, got {size!r}")
        for what, value in (("beta", beta), ("k", k)):
            if not 0 < value < float("inf"):
                raise GpunetError(f"LRN: {what}: expected a number above 0, got {value}")
        if not 0 <= alpha < float("inf"):
            raise GpunetError(f"LRN: alpha: expected 0 or more, got {alpha}")
        self.size, self.alpha, self.beta, self.k, self.region = size, alpha, beta, k, region
        self.share = alpha / (size if region == "across" else size * size)

    def setup(self, shape):
        """The input's shape; "within" needs an image."""
        if self.region == "within":
            spatial(shape)
        return shape

    def _sizes(self, x):
        """What the kernels take for a tensor: its rows and channels, or all its axes."""
        axes = (x.size // x.shape[-1], x.shape[-1]) if self.region == "across" else x.shape
        return (*axes, self.size)

    def forward(self, t, x):
        """Trace scale and y; both are kept, so that backward raises nothing to a power but once an element."""
        y, scale = t.empty(x.shape), t.empty(x.shape, t.wide)
        t.launch(f"{REGIONS[self.region]}_forward", x, y, scale, self.share, self.beta, self.k, *self._sizes(x))
        return y, (x, y, scale)

    def backward(self, t, dy, saved):
        """Trace dx: dy scaled, less what each value does to its neighbours' scale."""
        dx = t.empty(dy.shape)
        t.launch(f"{REGIONS[self.region]}_backward", dy, *saved, dx, self.share, self.beta, *self._sizes(dy))
        return dx
