"""The engines of a convolution: the NumPy engine's blocks against plain sums, and engines against each other."""

import tracemalloc
from contextlib import closing
from importlib import import_module

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpunet.backends.numpy import Backend
from gpunet.backends.numpy import engine_blocked as engines
from gpunet.backends.numpy.scratch import Scratch
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, Flatten, Graph, Input, MeanSquaredError


def straight(g, x, weight, bias, dy):
    """Return (y, dW, dx) tap by tap."""
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in (
        (g.oh, g.stride_y, g.dilation_y, g.kh), (g.ow, g.stride_x, g.dilation_x, g.kw)
    )]  # fmt: skip
    padded = np.zeros((g.n, max(reach[0], g.h + 2 * g.pad_y), max(reach[1], g.w + 2 * g.pad_x), g.c))
    gradient, y, dw = np.zeros_like(padded), np.zeros(dy.shape) + bias, np.zeros_like(weight)
    inner = slice(None), slice(g.pad_y, g.pad_y + g.h), slice(g.pad_x, g.pad_x + g.w)
    padded[inner] = x
    for ky in range(g.kh):
        for kx in range(g.kw):
            tap = slice(None), slice(ky * g.dilation_y, None, g.stride_y), slice(kx * g.dilation_x, None, g.stride_x)
            part = padded[tap][:, : g.oh, : g.ow]
            y += part @ weight[ky, kx]
            dw[ky, kx] = np.einsum("nhwc,nhwo->co", part, dy)
            gradient[tap][:, : g.oh, : g.ow] += dy @ weight[ky, kx].T
    return y, dw, gradient[inner]


class Poisoned(Scratch):
    """Scratch that can be filled with NaN."""

    def spoil(self):
        self._buffer[:] = 0xFF


def workspaces(engine, g, dtype):
    """Return what an engine's forward, dW and dx write beside their results, as gpunet.nn.conv traces it."""
    turned = np.full((g.kh, g.kw, g.outputs, g.c), np.nan, dtype)
    if not engine.__name__.endswith("winograd"):
        return (), (), (turned,)
    values = np.full(((g.kh + 3) * (g.kw + 3), g.c * g.outputs + 16), np.nan, dtype)
    return (values,), (values,), (turned, values)


def check(g, dtype=np.float64, accumulate=0, engine=engines):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(g.n, g.h, g.w, g.c)), rng.normal(size=(g.n, g.oh, g.ow, g.outputs))
    weight, bias = rng.normal(size=(g.kh, g.kw, g.c, g.outputs)), rng.normal(size=g.outputs)
    before = rng.normal(size=weight.shape)
    y, dw, dx = straight(g, x, weight, bias, dy)
    x, dy, weight, bias = (a.astype(dtype) for a in (x, dy, weight, bias))
    extra = workspaces(engine, g, dtype)
    got = np.full(y.shape, np.nan, dtype), before.astype(dtype), np.full(x.shape, np.nan, dtype)
    scratch = Poisoned()
    passes = [
        lambda: engine.forward(x, weight, bias, got[0], *extra[0], geometry=g, scratch=scratch),
        lambda: engine.backward_weight(x, dy, got[1], *extra[1], geometry=g, accumulate=accumulate, scratch=scratch),
        lambda: engine.backward_input(dy, weight, got[2], *extra[2], geometry=g, scratch=scratch),
    ]
    for bind in passes:
        scratch.reset()
        call = bind()
        for _ in range(2):
            scratch.spoil()
            call()
    expected = y, before + 2 * dw if accumulate else dw, dx
    tolerance = {np.float64: 1e-11, np.float32: 1e-4}[dtype]
    for name, a, b in zip(("y", "dW", "dx"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=f"{name} of {g}")


def geometry(n, shape, outputs, size, stride=1, padding="same", dilation=1):
    return Conv2d(outputs, size, stride, padding, dilation=dilation).geometry(n, shape)


small = st.integers(1, 3)
pairs = st.tuples(small, small)


@given(
    st.integers(1, 5), st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)), st.integers(1, 5),
    st.tuples(st.integers(1, 4), st.integers(1, 4)), pairs, st.tuples(st.integers(0, 4), st.integers(0, 4)), pairs,
    st.sampled_from([256, 2048, 1 << 20]), st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=150)
def test_blocks_of_any_geometry(n, shape, outputs, size, stride, padding, dilation, block, accumulate):
    """Blocks so small that images are cut into bands, and the gradient into pieces."""
    try:
        g = geometry(n, shape, outputs, size, stride, padding, dilation)
    except GpunetError:
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "DEEP_COLUMNS", "PRODUCT"):
            patch.setattr(engines, name, block)
        patch.setattr(engines, "TILE", 16)
        check(g, accumulate=accumulate)


WIDE = {  # what asks for more scratch, or other blocks, than small images do
    "112 pixels, stride 2": (2, (112, 112, 64), 16, 3, 2),
    "224 pixels, stem": (1, (224, 224, 3), 16, 7, 2),
    "32 pixels, 128 channels": (3, (32, 32, 128), 32, 3, 1),
    "stride above the window": (3, (65, 65, 32), 8, 3, 5),
    "1x1, stride 2": (4, (56, 56, 64), 16, 1, 2),
    "1x1": (4, (56, 56, 64), 16, 1, 1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", WIDE)
def test_large_images(name, dtype):
    n, shape, outputs, size, stride = WIDE[name]
    check(geometry(n, shape, outputs, size, stride, size // 2), dtype)


@pytest.mark.parametrize("engine", ["engine_blocked", "engine_winograd", "numba_direct", "numba_winograd"])
def test_a_replay_allocates_nothing_large(engine):
    if engine in ("numba_direct", "numba_winograd"):
        pytest.importorskip("numba")
    engine = import_module(f"gpunet.backends.numpy.{engine}")
    dtype = np.float64 if engine is engines else np.float32
    calls, keep = [], []
    for stride in (1,) if engine.__name__.endswith("winograd") else (1, 2):
        g = geometry(8, (32, 32, 32), 32, 3, stride)
        x, dy = np.ones((g.n, g.h, g.w, g.c), dtype), np.ones((g.n, g.oh, g.ow, g.outputs), dtype)
        weight, bias = np.ones((3, 3, 32, 32), dtype), np.ones(32, dtype)
        scratches, extra = [Scratch() for _ in range(3)], workspaces(engine, g, dtype)
        keep.append((x, dy, weight, bias))
        calls += [
            engine.forward(x, weight, bias, np.ones_like(dy), *extra[0], geometry=g, scratch=scratches[0]),
            engine.backward_weight(
                x, dy, np.ones_like(weight), *extra[1], geometry=g, accumulate=1, scratch=scratches[1]
            ),
            engine.backward_input(dy, weight, np.ones_like(x), *extra[2], geometry=g, scratch=scratches[2]),
        ]
    for call in calls:
        call()  # what is compiled, is now
    tracemalloc.start()
    try:
        for call in calls:
            call()
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            call()
            assert tracemalloc.get_traced_memory()[1] - before < 256 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("replicas", [1, 2])
def test_engines_agree_also_where_gradients_accumulate(groups, replicas):
    image = Input((9, 7, 4))
    graph = Graph(image, Flatten()(Conv2d(6, 3, 2, groups=groups, name="conv")(image)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 9, 7, 4)), rng.normal(size=(5, 120))
    results = []
    for engine in ("blocked", "unfold"):
        step = Step(graph, MeanSquaredError(), batch=5, dtype="float64", engine=engine, replicas=replicas,
                    keep=("conv:output", "input:gradient"))  # fmt: skip
        with closing(step):
            step.gradient(x, y)
            step.gradient(x[:3], y[:3], accumulate=True)
            names = ("conv:output", "input:gradient", "conv.weight:gradient", "conv.bias:gradient")
            results.append([step.read(name) for name in names])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [(5, 9, 3), (4, 4, 1)])
@pytest.mark.parametrize("fast", [True, False])
def test_an_accumulating_product_runs_in_row_blocks(case, fast):
    m, k, n = case
    rng = np.random.default_rng(0)
    a, b, out = rng.normal(size=(2, m, k)), rng.normal(size=(2, k, n)), rng.normal(size=(2, m, n))
    expected = out + a @ b
    for nbytes in (8 << 20, 128):
        got = out.copy()
        Backend(fast).bind_matmul(a, b, got, 1, "float32", Scratch(nbytes))()
        np.testing.assert_allclose(got, expected, rtol=1e-12)
