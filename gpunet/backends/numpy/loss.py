"""Definitions of kernels/loss.cu. Targets are dense, losses are per row, gradients are of their sum.

The update divides by the count of rows, which leaves out padding (hit -1).
"""

import numpy as np

from gpunet.backends.numpy.values import put, wide


def softmax_cross_entropy(logits, targets, dlogits, losses, hits, state, n, k):
    """loss = -sum of t * log softmax; dlogits = (softmax * sum(t) - t) * state.loss_scale.

    hit = 1 where logits and targets have their first maximum at the same place, else 0.
    A row whose targets are all zero is padding: loss 0, gradient 0, hit -1.
    """
    x, t = wide(logits.reshape(n, k)), wide(targets.reshape(n, k))
    with np.errstate(over="ignore", invalid="ignore"):  # training diverged: the loss becomes NaN
        shifted = x - x.max(axis=1, keepdims=True)
        power = np.exp(shifted)
        total = power.sum(axis=1, keepdims=True)
        loss = np.where(t != 0, -t * (shifted - np.log(total)), 0).sum(axis=1)
        gradient = (power / total * t.sum(axis=1, keepdims=True) - t) * float(state["loss_scale"])
    real = (t != 0).any(axis=1)
    losses.reshape(n)[:] = np.where(real, loss, 0)
    dlogits.reshape(n, k)[:] = np.where(real[:, None], gradient, 0)
    hits.reshape(n)[:] = np.where(real, x.argmax(axis=1) == t.argmax(axis=1), -1)


def mean_squared_error(prediction, targets, dprediction, losses, hits, state, n, k):
    """loss = mean over k of (p - t)**2; dprediction = 2 (p - t) / k * state.loss_scale.

    hit = 1 where k > 1 and both have their first maximum at the same place, else 0.
    A row whose targets are NaN is padding: loss 0, gradient 0, hit -1.
    """
    p, t = wide(prediction.reshape(n, k)), wide(targets.reshape(n, k))
    real = ~np.isnan(t).all(axis=1)
    difference = np.where(real[:, None], p - t, 0)
    losses.reshape(n)[:] = np.square(difference).sum(axis=1) / k
    dprediction.reshape(n, k)[:] = 2 * difference / k * float(state["loss_scale"])
    agree = (p.argmax(axis=1) == t.argmax(axis=1)) & (k > 1)
    hits.reshape(n)[:] = np.where(real, agree, -1)


def metrics_sum(losses, hits, sums, accumulate, n):
    """sums (+)= sum of losses, rows with hit 1, rows with hit >= 0, 1 (one more gradient); in double."""
    hits = hits.reshape(n)
    put(sums.reshape(4), [losses.sum(dtype=np.float64), (hits == 1).sum(), (hits >= 0).sum(), 1], accumulate)
