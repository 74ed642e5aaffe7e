"""Definitions of kernels/order.cu: in which order an epoch visits the images."""

import numpy as np

from gpunet.core.random import balanced, permutation, replacement


def order_draw(order, state, seed, n):
    """order = the permutation of 0 .. n-1 that belongs to seed and state.epoch."""
    order.reshape(n)[:] = permutation(seed, int(state["epoch"]), n)


def order_replacement(order, state, seed, n):
    """order = n independent draws from 0 .. n-1 that belong to seed and state.epoch."""
    order.reshape(n)[:] = replacement(seed, int(state["epoch"]), n)


def order_balanced(members, starts, order, state, seed, n, k):
    """order = images of each of k classes equally often, in turn within a class, for seed and state.epoch."""
    order.reshape(n)[:] = balanced(seed, int(state["epoch"]), members.reshape(n), starts.reshape(k + 1))


def order_stored(order, n):
    """order = 0 .. n-1."""
    order.reshape(n)[:] = np.arange(n)
