"""The softmax over channels, as a layer."""

from gpunet.nn.graph import Layer


class Softmax(Layer):
    """exp(x) / the sum of exp(x) over the channels, of every pixel. A classifier's last softmax is in its loss."""

    def setup(self, shape):
        """The input's shape."""
        return shape

    def forward(self, t, x):
        """Trace the softmax of every row."""
        y, c = t.over(x), x.shape[-1]
        t.launch("softmax_forward", x, y, x.size // c, c)
        return y, y

    def backward(self, t, dy, saved):
        """Trace dx = y * (dy - sum of dy * y)."""
        dx, c = t.over(dy), dy.shape[-1]
        t.launch("softmax_backward", dy, saved, dx, dy.size // c, c)
        return dx
