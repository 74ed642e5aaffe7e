"""Dropout: of single values, or of whole channels; scaled in training, or in inference."""

from gpunet.nn.checks import one_of, share
from gpunet.nn.graph import Layer, spatial

LANES = 65536  # a place is kept where its draw of 16 bits is at least rate * LANES


def threshold_of(rate):
    """Return the draw from which a place is kept; the rate is met to 1/131072, and some places always stay."""
    return min(round(rate * LANES), LANES - 1)


class Dropout(Layer):
    """y = x / (1 - rate) where a draw keeps it, else 0; y = x in inference (Srivastava et al. 2014).

    That is form "inverted". Form "plain", the paper's first: y = x where kept, else 0; y = x * (1 - rate) in inference.
    The mask is drawn again in backward from the same counters, so that nothing is stored.
    """

    def __init__(self, rate=0.5, form="inverted", name=None):
        super().__init__(name)
        self.rate = share(rate, f"{type(self).__name__}: rate")
        self.form = one_of(form, f"{type(self).__name__}: form", "inverted", "plain")
        self.threshold = threshold_of(self.rate)

    @property
    def keep(self):
        """The share of places that stay."""
        return (LANES - self.threshold) / LANES

    def setup(self, shape):
        """The input's shape."""
        return shape

    def forward(self, t, x):
        """Trace the mask, or in inference what the form leaves to do."""
        if not self.threshold or (self.form == "inverted" and not t.training):
            return x, None
        if t.training:
            return self._apply(t, x), t.site
        y = t.over(x)
        t.launch("dropout_scale", x, y, self.keep, x.size)
        return y, None

    def backward(self, t, dy, saved):
        """Trace the same mask on dy."""
        return dy if saved is None else self._apply(t, dy)

    def _apply(self, t, x):
        y = t.over(x)
        self._launch(t, x, y, t.arena("state"), t.seed, t.site, self.threshold, self._scale)
        return y

    @property
    def _scale(self):
        return 1 / self.keep if self.form == "inverted" else 1.0

    def _launch(self, t, x, y, *draw):
        first = x.size // t.share.size * t.share.first
        t.launch("dropout_apply", x, y, *draw, first, x.size)


class Dropout2d(Dropout):
    """Dropout of whole channels of an image, for neighbouring pixels tell the same (Tompson et al. 2015).

    y = x / (1 - rate) in the channels that a draw keeps, else 0; the forms are Dropout's. Keras' SpatialDropout2D.
    """

    def setup(self, shape):
        """The input's shape, an image's."""
        return spatial(shape)

    def _launch(self, t, x, y, *draw):
        n, h, w, c = x.shape
        t.launch("dropout_channels", x, y, *draw, t.share.first, n, h * w, c)
