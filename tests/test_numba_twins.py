"""Twins that numba compiles: which are bound, in place, what is not finite, windows of every kind, the draws' bits.

test_fast_twins holds them to their definitions case by case.
"""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fast_twins import CASES, FAST, LARGE, aligned, definition, hold, kernel_of

from gpunet.backends.numpy import Backend, batchnorm, pool
from gpunet.backends.numpy.scratch import Scratch
from gpunet.core import random, sources
from gpunet.testing.cases import SIZES
from gpunet.testing.tolerance import assert_close

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed: its twins are not tried")
TWINS = sorted(name for name in FAST if name.startswith("numba:"))
ELEMENTWISE = ("numba_activation", "numba_batchnorm", "numba_dropout", "numba_elementwise")
OVER = {"x": "y", "residual": "y", "dy": "dx"}  # inputs that a layer may write its output over


def test_without_numba_nothing_of_it_is_imported():
    """Neither by gpunet nor by a backend that is told to do without, through a whole step."""
    code = """
import sys
import gpunet
assert "numba" not in sys.modules, "gpunet"
import numpy as np
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.nn import BatchNorm, Conv2d, Flatten, Graph, Input, MaxPool, MeanSquaredError, ReLU
from gpunet.optim import SGD
from contextlib import closing
x = Input((6, 6, 3))
y = Flatten()(MaxPool(2)(ReLU()(BatchNorm()(Conv2d(8, 3)(x)))))
backend = Backend(numba=False)
with closing(Step(Graph(x, y), MeanSquaredError(), SGD(0.1), batch=2, backend=backend)) as step:
    step.gradient(np.zeros((2, 6, 6, 3), np.float32), np.zeros((2, 72), np.float32))
    step.update()
assert "numba" not in sys.modules and "llvmlite" not in sys.modules, "a step"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@needs_numba
def test_the_backend_asks_numba_first():
    kernel, x = sources.kernels()["relu_forward"], np.float32([-1, 2])
    named = {}
    for fast, numba in ((True, True), (True, False), (False, True)):
        y = np.empty_like(x)
        call = Backend(fast=fast, numba=numba).bind_launch(kernel, (x, y, 2), Scratch())
        call()
        assert y.tolist() == [0, 2]
        named[fast, numba] = getattr(call, "func", call).__module__.rsplit(".", 1)[1]
    assert named == {(True, True): "numba_activation", (True, False): "fast_activation", (False, True): "activation"}
    half = np.float16([-1, 2])
    call = Backend(numba=True).bind_launch(kernel, (half, half.copy(), 2), Scratch())
    assert call.func.__module__ == "gpunet.backends.numpy.activation", "16-bit floats are left to the definition"


@needs_numba
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in TWINS if FAST[name].__module__.endswith(ELEMENTWISE)])
def test_an_output_may_be_an_input(name, dtype):
    function, kernel = LARGE[kernel_of(name)]
    for arguments in function(np.random.default_rng(1), np.dtype(dtype), kernel):
        for source, target in OVER.items():
            if source in arguments and target in arguments and arguments[source].shape == arguments[target].shape:
                expected, got = ({k: aligned(v) for k, v in arguments.items()} for _ in range(2))
                got[target] = got[source]
                definition(name)(**expected)
                FAST[name](**got, scratch=Scratch())()
                assert_close(f"{name}: {target}", got[target], expected[target], dtype)


@needs_numba
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [name for name in TWINS if not name.endswith(("batchnorm_moments", "_update"))])
def test_what_is_not_finite_is_as_in_the_definition(name, value):
    """One such value in each array of numbers by itself; no update is made with a gradient that has one."""
    for size in range(SIZES):
        made = CASES[kernel_of(name)](np.random.default_rng(size), size, np.dtype("f4"), np.dtype("f4"))
        for key in ("x", "y", "dy", "d", "residual", "g"):
            if isinstance(made.get(key), np.ndarray) and np.isfinite(made[key]).all():
                arguments = {k: aligned(v) for k, v in made.items()}
                arguments[key].reshape(-1)[arguments[key].size // 2] = value
                with np.errstate(all="ignore"):
                    assert hold(name, arguments) or kernel_of(name) == "penalty_sum"  # of several parts


@needs_numba
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 20_000, 39_999])
def test_moments_of_what_is_not_finite_are_not(value, place):
    x, moments = np.ones((40_000, 16), np.float32), np.zeros((1, 3, 16), np.float32)
    x[place, 3] = value
    FAST["numba:batchnorm_moments"](x, moments, 40_000, 16, 1, scratch=Scratch())()
    assert not np.isfinite(moments[0, 1:, 3]).any() and np.isfinite(np.delete(moments, 3, 2)).all()


sizes = st.integers(1, 9)


@needs_numba
@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(1, 3), sizes, sizes, st.sampled_from([1, 2, 3, 8, 17, 64])]),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.booleans(),
)
def test_pooling_by_any_window(shape, window, edges, include_pad):
    """Padding, and how far the last window hangs over, less than the window."""
    (n, h, w, c), (kh, kw, stride_y, stride_x), (pad_y, pad_x, more_y, more_x) = shape, window, edges
    assume(pad_y < kh and pad_x < kw)
    outs = []
    for size, k, stride, pad, more in ((h, kh, stride_y, pad_y, more_y), (w, kw, stride_x, pad_x, more_x)):
        out = max(1, (size + 2 * pad - k) // stride + 1 + (more % 2))
        assume((out - 1) * stride - pad < size)  # each window touches the image
        outs.append(out)
    rng, place = np.random.default_rng(0), (n, h, w, c, *outs, kh, kw, stride_y, stride_x, pad_y, pad_x)
    names = ("n", "h", "w", "c", "oh", "ow", "kh", "kw", "stride_y", "stride_x", "pad_y", "pad_x")
    given_sizes = dict(zip(names, place, strict=True))
    x = rng.integers(-2, 3, (n, h, w, c)).astype(np.float32)  # ties
    x[x == -2] = -np.inf
    y, index = np.empty((n, *outs, c), np.float32), np.zeros((n, *outs, c), np.uint8)
    pool.maxpool_forward(x, y, index, *place)
    dy = rng.normal(size=y.shape).astype(np.float32)
    blank = {"x": np.full_like(x, np.nan), "y": np.full_like(y, np.nan), "index": np.full_like(index, 99)}
    assert hold("numba:maxpool_forward", {"x": x, "y": blank["y"], "index": blank["index"], **given_sizes})
    assert hold("numba:maxpool_backward", {"dy": dy, "index": index, "dx": blank["x"], **given_sizes})
    x[np.isinf(x)] = 2
    more = given_sizes | {"include_pad": int(include_pad)}
    assert hold("numba:avgpool_forward", {"x": x, "y": blank["y"], **more})
    assert hold("numba:avgpool_backward", {"dy": dy, "dx": blank["x"], **more})


@needs_numba
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40000), st.integers(1, 600), st.integers(1, 5), st.floats(-1e4, 1e4), st.booleans())
def test_moments_of_any_shape_and_mean(rows, c, parts, mean, jumps):
    """float32 knows x to 6e-8 of itself; where it jumps, the second half has another mean."""
    assume(rows * c <= 300_000)
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (rows, c)).astype(np.float32)
    if jumps:
        x[rows // 2 :] -= np.float32(3 * mean)
    got, exact = np.full((parts, 3, c), np.nan, np.float32), np.empty((parts, 3, c))
    FAST["numba:batchnorm_moments"](x, got, rows, c, parts, scratch=Scratch())()
    batchnorm.batchnorm_moments(x.astype(np.float64), exact, rows, c, parts)
    assert (got[:, 0] == exact[:, 0]).all()
    np.testing.assert_allclose(got[:, 1], exact[:, 1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[:, 2], exact[:, 2], rtol=2e-5, atol=1e-5)


@needs_numba
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_draws_have_the_same_bits(seed, site, time, block):
    from gpunet.backends.numpy.numba_random import lanes

    drawn = np.empty(48, np.uint16)
    lanes(drawn, np.uint64(seed), site, time, block * random.LANES)
    assert (drawn == random.lanes(seed, site, time, block * random.LANES, 48)).all()
