"""Definitions of kernels/order.cu: in which order an epoch visits the images."""

import numpy as np

from gpunet.core.random import permutation


def order_draw(order, state, seed, n):
    """order = the permutation of 0 .. n-1 that belongs to seed and state.epoch."""
    order.reshape(n)[:] = permutation(seed, int(state["epoch"]), n)


def order_stored(order, n):
    """order = 0 .. n-1."""
    order.reshape(n)[:] = np.arange(n)
