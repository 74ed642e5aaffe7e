"""Definitions of kernels/groupnorm.cu (Wu and He 2018): groups of an image's channels, over all pixels."""

import numpy as np

from gpunet.backends.numpy.values import wide


def groupnorm_forward(x, gamma, beta, y, mean, inverse, eps, n, pixels, c, groups, width):
    """y = xhat * gamma + beta; mean and inverse = 1 / sqrt(variance + eps) of each image's groups, summed in double."""
    v = _grouped(x, n, pixels, c, groups).astype(np.float64)
    mean.reshape(n, groups)[:] = v.mean(axis=(1, 3))
    inverse.reshape(n, groups)[:] = 1 / np.sqrt(v.var(axis=(1, 3)) + eps)
    xhat = _normalised(x, mean, inverse, n, pixels, c, groups)
    y.reshape(n, pixels, c)[:] = xhat.reshape(n, pixels, c) * gamma + beta


def groupnorm_backward(dy, x, mean, inverse, gamma, dx, n, pixels, c, groups, width):
    """dx = inverse * (g - mean of g - xhat * mean of g * xhat) with g = dy * gamma, means over the group."""
    xhat = _normalised(x, mean, inverse, n, pixels, c, groups)
    g = _grouped(wide(dy.reshape(n, pixels, c)) * gamma, n, pixels, c, groups)
    plain, weighted = (v.mean(axis=(1, 3), keepdims=True, dtype=np.float64).astype(v.dtype) for v in (g, g * xhat))
    spread = inverse.reshape(n, 1, groups, 1)
    dx.reshape(n, pixels, c)[:] = (spread * (g - plain - xhat * weighted)).reshape(n, pixels, c)


def groupnorm_backward_sums(dy, x, mean, inverse, dgamma, dbeta, n, pixels, c, groups, parts):
    """dgamma[p], dbeta[p] = sum of dy * xhat, of dy over the rows p*rows//parts .. (p+1)*rows//parts of all pixels."""
    rows = n * pixels
    d = wide(dy.reshape(rows, c))
    weighted = d * _normalised(x, mean, inverse, n, pixels, c, groups).reshape(rows, c)
    for p in range(parts):
        part = slice(p * rows // parts, (p + 1) * rows // parts)
        dgamma.reshape(parts, c)[p] = weighted[part].sum(axis=0, dtype=np.float64)
        dbeta.reshape(parts, c)[p] = d[part].sum(axis=0, dtype=np.float64)


def _grouped(x, n, pixels, c, groups):
    return x.reshape(n, pixels, groups, c // groups)


def _normalised(x, mean, inverse, n, pixels, c, groups):
    mean, inverse = (v.reshape(n, 1, groups, 1) for v in (mean, inverse))
    return (wide(_grouped(x, n, pixels, c, groups)) - mean) * inverse
