"""Definitions of kernels/batchnorm.cu (Ioffe and Szegedy 2015): a channel is normalised over all pixels.

Moments are triples count, mean, M2 (the sum of squared deviations), which combine without cancellation.
"""

import numpy as np

from gpunet.backends.numpy.values import put, wide


def batchnorm_moments(x, moments, rows, c, parts):
    """moments[p] = count, mean, sum of (x - mean)**2 of rows p*rows//parts .. (p+1)*rows//parts."""
    for p in range(parts):
        part = x.reshape(rows, c)[p * rows // parts : (p + 1) * rows // parts].astype(np.float64)
        count = len(part)
        mean = part.sum(axis=0) / max(count, 1)
        moments.reshape(parts, 3, c)[p] = np.full(c, count), mean, np.square(part - mean).sum(axis=0)


def batchnorm_combine(moments, total, parts, c):
    """total = the moments of all parts together, by the formula of Chan, Golub and LeVeque (1979)."""
    count, mean, m2 = np.zeros((3, c), moments.dtype)
    for part_count, part_mean, part_m2 in moments.reshape(parts, 3, c):
        delta = part_mean - mean
        share = part_count / np.maximum(count + part_count, 1)
        m2 = m2 + part_m2 + delta * delta * count * share
        mean = mean + delta * share
        count = count + part_count
    total.reshape(3, c)[:] = count, mean, m2


def batchnorm_statistics(total, mean, inverse, batch_mean, batch_variance, eps, accumulate, c):
    """inverse = 1 / sqrt(M2/count + eps), batch_mean (+)= mean, batch_variance (+)= M2/max(count - 1, 1)."""
    count, average, m2 = total.reshape(3, c)
    mean.reshape(c)[:] = average
    inverse.reshape(c)[:] = 1 / np.sqrt(m2 / count + eps)
    put(batch_mean.reshape(c), average, accumulate)
    put(batch_variance.reshape(c), m2 / np.maximum(count - 1, 1), accumulate)


def batchnorm_inverse(variance, inverse, eps, c):
    """inverse = 1 / sqrt(variance + eps)."""
    inverse.reshape(c)[:] = 1 / np.sqrt(variance.reshape(c) + eps)


def batchnorm_forward(x, mean, inverse, gamma, beta, y, rows, c):
    """y = gamma * xhat + beta with xhat = (x - mean) * inverse."""
    y.reshape(rows, c)[:] = _affine(x, mean, inverse, gamma, beta, rows, c)


def batchnorm_backward_sums(dy, x, mean, inverse, sums, rows, c, parts):
    """sums[p] = sum dy, sum dy * xhat over the rows p*rows//parts .. (p+1)*rows//parts."""
    dy = wide(dy.reshape(rows, c))
    weighted = dy * _normalised(x, mean, inverse, rows, c)
    for p in range(parts):
        part = slice(p * rows // parts, (p + 1) * rows // parts)
        sums.reshape(parts, 2, c)[p] = [v[part].sum(axis=0, dtype=np.float64) for v in (dy, weighted)]


def batchnorm_gradient(sums, dgamma, dbeta, accumulate, c):
    """dgamma (+)= sum dy * xhat, dbeta (+)= sum dy."""
    put(dbeta.reshape(c), sums.reshape(2, c)[0], accumulate)
    put(dgamma.reshape(c), sums.reshape(2, c)[1], accumulate)


def batchnorm_backward(dy, x, mean, inverse, gamma, sums, dx, total, rows, c):
    """dx = gamma * inverse * (dy - sums[0]/total - xhat * sums[1]/total), total rows in all replicas."""
    sum_dy, sum_weighted = sums.reshape(2, c) / total
    xhat = _normalised(x, mean, inverse, rows, c)
    dx.reshape(rows, c)[:] = gamma * inverse * (wide(dy.reshape(rows, c)) - sum_dy - xhat * sum_weighted)


def batchnorm_relu_forward(x, mean, inverse, gamma, beta, y, rows, c):
    """y = max(gamma * xhat + beta, 0); a NaN stays one."""
    y.reshape(rows, c)[:] = np.maximum(_affine(x, mean, inverse, gamma, beta, rows, c), 0)


def batchnorm_add_relu_forward(x, mean, inverse, gamma, beta, residual, y, rows, c):
    """y = max(gamma * xhat + beta + residual, 0); a NaN stays one."""
    z = _affine(x, mean, inverse, gamma, beta, rows, c)
    y.reshape(rows, c)[:] = np.maximum(z + wide(residual.reshape(rows, c)), 0)


def batchnorm_relu_backward_sums(dy, x, mean, inverse, gamma, beta, sums, rows, c, parts):
    """batchnorm_backward_sums of dy where gamma * xhat + beta > 0, else 0."""
    passed = _passed(dy, x, mean, inverse, gamma, beta, rows, c)
    batchnorm_backward_sums(passed, x, mean, inverse, sums, rows, c, parts)


def batchnorm_relu_backward(dy, x, mean, inverse, gamma, beta, sums, dx, total, rows, c):
    """batchnorm_backward of dy where gamma * xhat + beta > 0, else 0."""
    passed = _passed(dy, x, mean, inverse, gamma, beta, rows, c)
    batchnorm_backward(passed, x, mean, inverse, gamma, sums, dx, total, rows, c)


def _normalised(x, mean, inverse, rows, c):
    return (wide(x.reshape(rows, c)) - mean) * inverse


def _affine(x, mean, inverse, gamma, beta, rows, c):
    return _normalised(x, mean, inverse, rows, c) * gamma + beta


def _passed(dy, x, mean, inverse, gamma, beta, rows, c):
    """Return what ReLU lets back of dy."""
    return np.where(_affine(x, mean, inverse, gamma, beta, rows, c) > 0, wide(dy.reshape(rows, c)), 0)
