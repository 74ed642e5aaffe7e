"""The largest of several linear pieces."""

from gpunet.nn.checks import whole
from gpunet.nn.graph import Layer, LayerError

MOST = 256  # pieces: which one was largest is kept in a byte


class Maxout(Layer):
    """y[c] = the largest of the channels x[c*pieces] to x[c*pieces + pieces - 1] (Goodfellow et al. 2013).

    It stands behind a Linear or Conv2d of `pieces` times as many outputs. The gradient goes to the first of equals; NaN
    wins.
    """

    def __init__(self, pieces=2, name=None):
        super().__init__(name)
        self.pieces = whole(pieces, "Maxout: pieces", 1, MOST)

    def setup(self, shape):
        """The input's shape with channels / pieces channels."""
        if shape[-1] % self.pieces:
            raise LayerError(f"expected channels that {self.pieces} pieces divide, got x of shape {shape}")
        return (*shape[:-1], shape[-1] // self.pieces)

    def forward(self, t, x):
        """Trace the maxima, and which piece each came from."""
        y = t.empty((*x.shape[:-1], x.shape[-1] // self.pieces))
        index = t.empty(y.shape, "u1")
        t.launch("maxout_forward", x, y, index, y.size, self.pieces)
        return y, index

    def backward(self, t, dy, saved):
        """Trace dx: dy at the piece of the maximum, else 0."""
        dx = t.empty((*dy.shape[:-1], dy.shape[-1] * self.pieces))
        t.launch("maxout_backward", dy, saved, dx, dy.size, self.pieces)
        return dx
