"""The engines that numba compiles against plain sums: every pass, strides, dilations, tiles that overhang."""

import random
from contextlib import closing

import numpy as np
import pytest
from test_conv_engines import Poisoned, geometry, straight

pytest.importorskip("numba", reason="the engines that numba compiles: there is no numba")

from gpunet import models
from gpunet.backends.numpy import Backend, numba_direct, numba_winograd
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import SoftmaxCrossEntropy

RANDOM = 40


def some_geometries():
    """Geometries of every stride, dilation and padding that the direct engine takes."""
    draw, found = random.Random(0), []

    def pair(low, high):
        return draw.randint(low, high), draw.randint(low, high)

    while len(found) < RANDOM:
        shape = (*pair(1, 9), draw.choice([1, 3, 8, 16, 24]))
        outputs = draw.choice([8, 16, 24])
        try:
            g = geometry(draw.randint(1, 3), shape, outputs, pair(1, 5), pair(1, 3), pair(0, 4), pair(1, 3))
        except GpunetError:
            continue
        if numba_direct.covers(g):
            found.append(g)
    return found


FILTERED = [  # n, shape, outputs, kernel, padding
    (5, (8, 8, 32), 32, 3, 1),
    (3, (7, 9, 16), 48, 3, 1),
    (2, (6, 10, 32), 64, 5, 2),
    (3, (9, 31, 64), 16, 5, 2),
    (2, (4, 4, 64), 32, 3, 1),
    (2, (11, 5, 16), 16, 3, 0),
    (2, (3, 8, 16), 16, 5, 4),
    (40, (5, 5, 256), 128, 3, 1),  # several chunks
]


def check(engine, g, accumulate, tolerance):
    """All passes twice, scratch and workspaces full of NaN before each."""
    rng, real = np.random.default_rng(0), np.float32
    x, dy = rng.normal(size=(g.n, g.h, g.w, g.c)), rng.normal(size=(g.n, g.oh, g.ow, g.outputs))
    weight, bias = rng.normal(size=(g.kh, g.kw, g.c, g.outputs)), rng.normal(size=g.outputs)
    before = rng.normal(size=weight.shape)
    y, dw, dx = straight(g, x, weight, bias, dy)
    x, dy, weight, bias = (a.astype(real) for a in (x, dy, weight, bias))
    got = np.full(y.shape, np.nan, real), before.astype(real), np.full(x.shape, np.nan, real)
    turned = np.full((g.kh, g.kw, g.outputs, g.c), np.nan, real)
    room = [np.full((36, g.c, g.outputs), np.nan, real)] if engine is numba_winograd else []
    options = {"geometry": g, "scratch": Poisoned()}
    for bind in (
        lambda: engine.forward(x, weight, bias, got[0], *room, **options),
        lambda: engine.backward_weight(x, dy, got[1], *room, accumulate=accumulate, **options),
        lambda: engine.backward_input(dy, weight, got[2], turned, *room, **options),
    ):
        options["scratch"].reset()
        call = bind()
        for _ in range(2):
            options["scratch"].spoil()
            turned.fill(np.nan)
            for tensor in room:
                tensor.fill(np.nan)
            call()
    for name, a, b in zip(("y", "dW", "dx"), got, (y, before + 2 * dw if accumulate else dw, dx), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=f"{name} of {g}")


@pytest.mark.parametrize("number", range(RANDOM))
def test_direct(number):
    check(numba_direct, some_geometries()[number], number % 2, 1e-5)


@pytest.mark.parametrize("case", FILTERED, ids=str)
def test_winograd(case):
    n, shape, outputs, size, padding = case
    g = geometry(n, shape, outputs, size, 1, padding)
    assert numba_winograd.covers(g)
    check(numba_winograd, g, n % 2, 5e-5)


def test_winograd_leaves_what_it_cannot_compute():
    for arguments in ((2, (8, 8, 32), 32, 3, 2), (2, (8, 8, 32), 32, 1), (2, (8, 8, 3), 32, 3), (2, (8, 8, 32), 36, 3)):
        assert not numba_winograd.covers(geometry(*arguments))
    assert not numba_winograd.covers(geometry(2, (9, 9, 32), 32, 3, 1, 1, 2))
    assert not numba_direct.covers(geometry(2, (9, 9, 12), 32, 3))


@pytest.mark.parametrize("name", ["cifar10_quick", "resnet20"])
def test_a_networks_gradient_is_as_good_as_the_blocked_engines(name):
    """What float32 leaves of the gradient in float64: no more than three times the other engine's error."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 32, 32, 3)), rng.integers(0, 10, 32)  # with fewer, chance decides which ReLU turns

    def gradients(numba, dtype):
        graph, backend = models.build(name), Backend(numba=numba)
        with closing(Step(graph, SoftmaxCrossEntropy(), batch=32, dtype=dtype, backend=backend, replicas=2)) as step:
            step.gradient(x, y)
            kinds = set(step.engines().values())
            return np.concatenate([step.read(f"{p}:gradient").ravel() for p in step.weights]), kinds

    exact, _ = gradients(False, "float64")
    blocked, kinds = gradients(False, "float32")
    assert kinds == {"blocked"}
    compiled, kinds = gradients(True, "float32")
    assert kinds == {"direct", "winograd"}
    errors = [np.linalg.norm(got - exact) / np.linalg.norm(exact) for got in (blocked, compiled)]
    print(f"{name}: relative error of the gradient: blocked {errors[0]:.1e}, compiled {errors[1]:.1e}")
    assert errors[1] < 3 * errors[0]
