"""The draws of gpunet.core.random compiled by numba: the same bits, made where they are used."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpunet.backends.numpy.jit import jit
from gpunet.core.random import LANES

ROUNDS = 10
# Philox4x64 (Salmon et al. 2011): the factors, and what is added to the key after each round
FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


@intrinsic
def _multiply(_, a, b):
    """Return (high, low): the product of two 64-bit numbers."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(v, wide) for v in arguments))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))
        return context.make_tuple(builder, signature.return_type, [high, builder.trunc(product, ir.IntType(64))])

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


@jit
def lanes(out, key, site, time, first):
    """Fill uint16s with the lanes from place `first` on, a multiple of 16; their number is one too."""
    words = out.view(np.uint64)  # low bits first, as on every processor that numba compiles for
    for block in range(out.size // LANES):
        a, b, c, d = _word(first // LANES + block + 1), _word(site), _word(time), _word(0)
        k, l = _word(key), _word(0)  # noqa: E741
        for _ in range(ROUNDS):
            high, low = _multiply(_word(FACTORS[0]), a)
            other, rest = _multiply(_word(FACTORS[1]), c)
            a, b, c, d = other ^ b ^ k, rest, high ^ d ^ l, low
            k, l = k + _word(STEPS[0]), l + _word(STEPS[1])  # noqa: E741
        part = words[block * 4 : (block + 1) * 4]
        part[0], part[1], part[2], part[3] = a, b, c, d


@intrinsic
def _word(_, number):
    """Return an integer as 64 unsigned bits."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], number, types.uint64)

    return types.uint64(number), generate
