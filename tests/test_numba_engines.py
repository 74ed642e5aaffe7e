"""The direct engine against plain sums: strides, dilations, remainders; and what compiled engines make of a network."""

import random
from contextlib import closing

import numpy as np
import pytest
from test_conv_engines import Poisoned, geometry, straight

pytest.importorskip("numba", reason="the engines that numba compiles: there is no numba")

from gpunet import models
from gpunet.backends.numpy import Backend, numba_direct
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


def check(g, accumulate):
    """All passes twice, scratch and workspaces full of NaN before each."""
    rng, real = np.random.default_rng(0), np.float32
    x, dy = rng.normal(size=(g.n, g.h, g.w, g.c)), rng.normal(size=(g.n, g.oh, g.ow, g.outputs))
    weight, bias = rng.normal(size=(g.kh, g.kw, g.c, g.outputs)), rng.normal(size=g.outputs)
    before = rng.normal(size=weight.shape)
    y, dw, dx = straight(g, x, weight, bias, dy)
    x, dy, weight, bias = (a.astype(real) for a in (x, dy, weight, bias))
    got = np.full(y.shape, np.nan, real), before.astype(real), np.full(x.shape, np.nan, real)
    turned = np.full((g.kh, g.kw, g.outputs, g.c), np.nan, real)
    options = {"geometry": g, "scratch": Poisoned()}
    for bind in (
        lambda: numba_direct.forward(x, weight, bias, got[0], **options),
        lambda: numba_direct.backward_weight(x, dy, got[1], accumulate=accumulate, **options),
        lambda: numba_direct.backward_input(dy, weight, got[2], turned, **options),
    ):
        options["scratch"].reset()
        call = bind()
        for _ in range(2):
            options["scratch"].spoil()
            turned.fill(np.nan)
            call()
    for name, a, b in zip(("y", "dW", "dx"), got, (y, before + 2 * dw if accumulate else dw, dx), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=f"{name} of {g}")


@pytest.mark.parametrize("number", range(RANDOM))
def test_direct(number):
    check(some_geometries()[number], number % 2)


@pytest.mark.parametrize("name", ["cifar10_quick", "resnet20"])
def test_a_networks_gradient_is_as_good_as_the_blocked_engines(name):
    """What float32 leaves of the gradient in float64: no more than three times the other engine's error."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 32, 32, 3)), rng.integers(0, 10, 32)  # with fewer, chance decides which ReLU turns

    def gradients(numba, dtype):
        graph, backend = models.build(name), Backend(numba=numba)
        options = {"batch": 32, "dtype": dtype, "replicas": 2, "engine": None if numba else "blocked"}
        with closing(Step(graph, SoftmaxCrossEntropy(), backend=backend, **options)) as step:
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
