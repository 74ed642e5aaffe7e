"""ELU, Softplus, Hardswish, PReLU, Maxout, Softmax: PyTorch's values, central differences, and their edges."""

from contextlib import closing
from itertools import product

import numpy as np
import pytest
from golden.make_golden import graph_of, images_of, targets_of
from golden.make_more import CASES, FOLDER
from test_layers import TOLERANCE, hold, step_of

from gpunet.backends import backend, problem
from gpunet.core import sources
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import (
    ELU,
    Conv2d,
    Flatten,
    Graph,
    Hardswish,
    Input,
    Linear,
    Maxout,
    MeanSquaredError,
    PReLU,
    Sequential,
    Softmax,
    Softplus,
)  # fmt: skip
from gpunet.optim.sgd import SGD
from gpunet.testing import check_gradients
from gpunet.testing.parity import on_device
from gpunet.train import parse_config
from gpunet.train.build import build_graph

KINDS = ("elu", "softplus", "hardswish", "softmax", "prelu", "maxout")
emulated = pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "more.npz") as found:
        return dict(found)


def hold_golden(name, golden, dtype, replicas):
    """Hold training to the golden values, and inference, which is the same function here, to the same output."""
    graph = graph_of(CASES[name])
    x, targets = images_of(name, graph.input_shape), targets_of(name, graph.output_shape[0])
    where = f"{name} {dtype} replicas={replicas}"
    with closing(step_of(graph, MeanSquaredError(), dtype=dtype, replicas=replicas, engine="unfold")) as step:
        hold(step, name, x, targets, golden, dtype, where)
        expected = golden[f"{name}/output"]
        error = np.abs(step.predict(x) - expected).max()
        assert error <= TOLERANCE[dtype] * np.abs(expected).max(), f"{where}: inference"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(KINDS)])
def test_golden(name, golden):
    for dtype, replicas in product(("float64", "float32", "float16", "bfloat16"), (1, 2)):
        hold_golden(name, golden, dtype, replicas)


LAYERS = {
    "elu": ELU(),
    "elu, alpha": ELU(0.3),
    "softplus": Softplus(),
    "hardswish": Hardswish(),
    "softmax": Softmax(),
    "prelu": PReLU(),
    "prelu, negative": PReLU(-0.4),
    "prelu, shared": PReLU(shared=True),
    "maxout": Maxout(2),
    "maxout, one": Maxout(1),
    "chain": Sequential(Conv2d(6, 3), Maxout(3), PReLU(), Linear(4), ELU(), Softmax()),
}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_against_differences(name, replicas):
    assert check_gradients(LAYERS[name], (5, 7, 4), samples=10, replicas=replicas) < 1e-6


def test_a_slope_that_two_calls_share_gets_both_gradients():
    layer = PReLU(name="layer")
    assert check_gradients(Sequential(layer, Conv2d(4, 1), layer), (3, 5, 4), samples=8) < 1e-6


def launched(run_on, kernel, *arguments):
    """Return the arguments of a kernel, by name, after it ran."""
    with np.errstate(all="ignore"):
        declared = sources.kernels()[kernel]
        given = dict(zip((a.name for a in declared.arguments), arguments, strict=True))
        views = on_device(run_on, given)
        run_on.bind_launch(declared, views, run_on.workspace())()
        return {
            name: run_on.download(view) if isinstance(value, np.ndarray) else value
            for (name, value), view in zip(given.items(), views, strict=True)
        }


@pytest.mark.parametrize("run_on", ["numpy", pytest.param("emulator", marks=emulated)])
def test_extremes(run_on):
    """What is not finite stays what it should be, and nothing else becomes so."""
    run_on = backend(run_on)
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0], np.float32)
    y = np.empty_like(x)
    for kernel, extra, expected in (
        ("elu_forward", (2.0,), [np.nan, np.inf, -2, 1e30, -2, 0, 0]),
        ("softplus_forward", (), [np.nan, np.inf, 0, 1e30, 0, np.log(2), np.log(2)]),
        ("hardswish_forward", (), [np.nan, np.inf, 0, 1e30, 0, 0, 0]),
    ):
        got = launched(run_on, kernel, x, y, *extra, x.size)["y"]
        np.testing.assert_allclose(got, np.float32(expected), rtol=1e-6, err_msg=kernel)
    one = np.ones(7, np.float32)
    got = launched(run_on, "hardswish_backward", one, x, y, 7)["dx"]
    np.testing.assert_allclose(got, [np.nan, 1, 0, 1, 0, 0.5, 0.5], rtol=1e-6)
    rows = np.array([[np.inf, 0], [-np.inf, -np.inf], [np.nan, 1], [-np.inf, 1], [1e30, -1e30]], np.float32)
    got = launched(run_on, "softmax_forward", rows, np.empty_like(rows), 5, 2)["y"]
    np.testing.assert_array_equal(got, [[np.nan] * 2, [np.nan] * 2, [np.nan] * 2, [0, 1], [1, 0]])


def test_maxout_of_equals_and_of_nan():
    """The first of equals gets the gradient; NaN wins, the first one."""
    image = Input((1, 1, 9))
    graph = Graph(image, Flatten()(Maxout(3)(image)))
    with closing(Step(graph, MeanSquaredError(), batch=1, dtype="float64", replicas=1,
                      keep=("input:gradient",))) as step:  # fmt: skip
        x = np.array([1, 2, 2, -1, -1, -1, 0, np.nan, np.nan]).reshape(1, 1, 1, 9)
        np.testing.assert_array_equal(step.predict(x), [[2, -1, np.nan]])
        step.gradient(x, np.full((1, 3), 5.0))
        gradient = step.read("input:gradient").reshape(9)
        np.testing.assert_allclose(gradient[:6], [0, -2, 0, -4, 0, 0])
        assert np.flatnonzero(np.isnan(gradient)).tolist() == [7]


def test_slopes_learn_and_do_not_decay():
    """One step by hand: slope - rate * sum of dy * x where x <= 0, whatever the decay."""
    image = Input((1, 1, 2))
    graph = Graph(image, Flatten()(PReLU(0.5, name="act")(image)))
    x, targets = np.array([[-2.0, 4.0], [1.0, -3.0]]).reshape(2, 1, 1, 2), np.zeros((2, 2))
    with closing(Step(graph, MeanSquaredError(), SGD(0.1, weight_decay=0.7), batch=2, dtype="float64",
                      replicas=1)) as step:  # fmt: skip
        step.gradient(x, targets)
        step.update()
        # the loss of an image is the mean of two squares: dy = y; the update's gradient is the mean over two images
        np.testing.assert_allclose(step.weights["act.slope"], [0.5 - 0.1 * (-1 * -2) / 2, 0.5 - 0.1 * (-1.5 * -3) / 2])


def test_the_rate_of_biases_is_not_that_of_slopes(monkeypatch):
    config = parse_config(
        {"model": {"name": "lenet"}, "data": {"name": "shapes"}, "optimizer": {"lr": 0.1, "bias_rate": 64.0}}
    )
    image = Input((8, 8, 1))
    graph = Graph(image, Linear(2)(PReLU(name="act")(image)))
    monkeypatch.setattr("gpunet.models.build", lambda *arguments, **options: graph)
    rates = {p.name: p.rate for p in build_graph(config, (8, 8, 1), 2).parameters()}
    assert rates == {"act.slope": 1, "linear1.weight": 1, "linear1.bias": 64}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELU(-1), "ELU: alpha: expected a finite number of at least 0, got -1"),
        (lambda: ELU(np.nan), "ELU: alpha: expected a finite number of at least 0, got nan"),
        (lambda: ELU("x"), "ELU: alpha: expected a finite number of at least 0, got 'x'"),
        (lambda: PReLU(np.inf), "PReLU: slope: expected a finite number, got inf"),
        (lambda: PReLU([0.1]), r"PReLU: slope: expected a finite number, got \[0.1\]"),
        (lambda: Maxout(0), "Maxout: pieces: expected a whole number from 1 to 256, got 0"),
        (lambda: Maxout(257), "Maxout: pieces: expected a whole number from 1 to 256, got 257"),
        (lambda: Maxout(2.0), "Maxout: pieces: expected a whole number from 1 to 256, got 2.0"),
        (lambda: Maxout(True), "Maxout: pieces: expected a whole number from 1 to 256, got True"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(GpunetError, match=f"^{message}$"):
        make()


def test_shapes_that_do_not_fit():
    image = Input((2, 2, 5))
    with pytest.raises(
        GpunetError, match=r"^maxout1: expected channels that 2 pieces divide, got x of shape \(2, 2, 5\)"
    ):
        Graph(image, Maxout(2)(image))
    layer = PReLU(name="act")
    with pytest.raises(
        GpunetError, match=r"^act@2: expected 5 channels, as at its first call, got x of shape \(2, 2, 3"
    ):
        Graph(image, layer(Conv2d(3, 1)(layer(image))))
