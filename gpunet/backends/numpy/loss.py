"""Definitions of kernels/loss.cu. Targets are dense, losses are per row, gradients are of their sum.

The update divides by the count of rows, which leaves out padding (hit -1).
"""

import numpy as np

from gpunet.backends.numpy.values import put, wide


def softmax_cross_entropy(logits, targets, dlogits, losses, hits, state, n, k):
    """loss = -sum of t * log softmax; dlogits = (softmax * sum(t) - t) * state.loss_scale.

    hit = 1 where logits and targets have their first maximum at the same place, else 0.
    A row whose targets are all zero or NaN is padding: loss 0, gradient 0, hit -1.
    """
    x, t = wide(logits.reshape(n, k)), wide(targets.reshape(n, k))
    with np.errstate(over="ignore", invalid="ignore"):  # training diverged: the loss becomes NaN
        shifted = x - x.max(axis=1, keepdims=True)
        power = np.exp(shifted)
        total = power.sum(axis=1, keepdims=True)
        loss = np.where(t != 0, -t * (shifted - np.log(total)), 0).sum(axis=1)
        gradient = (power / total * t.sum(axis=1, keepdims=True) - t) * float(state["loss_scale"])
    real = _has_class(t)
    losses.reshape(n)[:] = np.where(real, loss, 0)
    dlogits.reshape(n, k)[:] = np.where(real[:, None], gradient, 0)
    hits.reshape(n)[:] = np.where(real, x.argmax(axis=1) == t.argmax(axis=1), -1)


def mean_squared_error(prediction, targets, dprediction, losses, hits, state, n, k):
    """loss = mean over k of (p - t)**2; dprediction = 2 (p - t) / k * state.loss_scale.

    hit = 1 where k > 1 and both have their first maximum at the same place, else 0.
    A row whose targets are all NaN is padding: loss 0, gradient 0, hit -1. A single NaN makes the row's loss NaN, and
    its own gradient; it counts as the largest target.
    """
    p, t = wide(prediction.reshape(n, k)), wide(targets.reshape(n, k))
    real = ~np.isnan(t).all(axis=1)
    difference = np.where(real[:, None], p - t, 0)
    losses.reshape(n)[:] = np.square(difference).sum(axis=1) / k
    dprediction.reshape(n, k)[:] = 2 * difference / k * float(state["loss_scale"])
    agree = (p.argmax(axis=1) == t.argmax(axis=1)) & (k > 1)
    hits.reshape(n)[:] = np.where(real, agree, -1)


def sigmoid_cross_entropy(logits, targets, dlogits, losses, hits, state, positive, negative, gamma, n, k):
    """loss = sum of positive t (1-p)**gamma (-log p) + negative (1-t) p**gamma (-log(1-p)), p = 1 / (1 + exp(-z)).

    hit = 1 where the first largest z stands on one of the largest t; with k = 1, where z > 0 as t > 1/2; where no t is
    above 0, if no z is; else 0. A row whose targets are all NaN is padding: loss 0, gradient 0, hit -1. A single NaN
    makes the row's loss NaN, and its own gradient; the row is no hit.
    """
    z, t = wide(logits.reshape(n, k)), wide(targets.reshape(n, k))
    real = ~np.isnan(t).all(axis=1)
    up, down = np.logaddexp(0, z), np.logaddexp(0, -z)  # -log(1 - p), -log(p)
    here, away = positive * t * np.exp(-gamma * up), negative * (1 - t) * np.exp(-gamma * down)
    slope = away * (np.exp(-down) + gamma * np.exp(-up) * up) - here * (np.exp(-up) + gamma * np.exp(-down) * down)
    losses.reshape(n)[:] = np.where(real, (here * down + away * up).sum(axis=1), 0)
    dlogits.reshape(n, k)[:] = np.where(real[:, None], slope * float(state["loss_scale"]), 0)
    top, most = z.argmax(axis=1), t.max(axis=1)
    agree = t[np.arange(n), top] == most if k > 1 else (z[:, 0] > 0) == (most > 0.5)
    hits.reshape(n)[:] = np.where(real, np.where(most <= 0, z.max(axis=1) <= 0, agree), -1)


def multiclass_hinge(scores, targets, dscores, losses, hits, state, margin, squared, single, n, k):
    """loss = sum over j != y of v, or v**2 if squared, v = max(0, z[j] - z[y] + margin), y: the largest target.

    single: only of the largest z[j], the first of several. hit = 1 where z has its first maximum at y, else 0.
    A row whose targets are all zero or NaN is padding: loss 0, gradient 0, hit -1.
    """
    z, t = wide(scores.reshape(n, k)), wide(targets.reshape(n, k))
    real, every = _has_class(t), np.arange(n)
    label = t.argmax(axis=1)
    v = np.maximum(z - z[every, label][:, None] + z.dtype.type(margin), 0)
    v[every, label] = 0
    if single:
        others = z.copy()
        others[every, label] = -np.inf
        v = np.where(np.arange(k) == others.argmax(axis=1)[:, None], v, 0)
    slope = np.where(v <= 0, 0, 2 * v if squared else 1)
    slope[every, label] = -slope.sum(axis=1)
    losses.reshape(n)[:] = np.where(real, (v**2 if squared else v).sum(axis=1), 0)
    dscores.reshape(n, k)[:] = np.where(real[:, None], slope * float(state["loss_scale"]), 0)
    hits.reshape(n)[:] = np.where(real, z.argmax(axis=1) == label, -1)


def metrics_sum(losses, hits, sums, accumulate, n):
    """sums (+)= sum of losses, rows with hit 1, rows with hit >= 0, 1 (one more gradient); in double."""
    hits = hits.reshape(n)
    put(sums.reshape(4), [losses.sum(dtype=np.float64), (hits == 1).sum(), (hits >= 0).sum(), 1], accumulate)


def _has_class(targets):
    """Return which rows are no padding: those with an entry that is neither zero nor NaN."""
    return ((targets < 0) | (targets > 0)).any(axis=1)
