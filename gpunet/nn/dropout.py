"""Dropout, in the form that scales at training time."""

from gpunet.errors import GpunetError
from gpunet.nn.graph import Layer


class Dropout(Layer):
    """y = x / (1 - rate) where a draw keeps it, else 0; y = x in inference (Srivastava et al. 2014, inverted form).

    The mask is drawn again in backward from the same counters, so that nothing is stored.
    """

    def __init__(self, rate=0.5, name=None):
        super().__init__(name)
        if not 0 <= rate < 1:
            raise GpunetError(f"Dropout: rate: expected 0 <= rate < 1, got {rate}")
        self.rate = rate

    def setup(self, shape):
        """The input's shape."""
        return shape

    def forward(self, t, x):
        """Trace the masked scaling."""
        if not t.training or not self.rate:
            return x, None
        return self._apply(t, x), t.site

    def backward(self, t, dy, saved):
        """Trace the same masked scaling of dy."""
        return dy if saved is None else self._apply(t, dy)

    def _apply(self, t, x):
        y = t.over(x)
        first = x.size // t.share.size * t.share.first
        threshold = round(self.rate * 65536)
        t.launch(
            "dropout_apply",
            x,
            y,
            t.arena("state"),
            t.seed,
            t.site,
            threshold,
            65536 / (65536 - threshold),
            first,
            x.size,
        )
        return y
