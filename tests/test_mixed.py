"""16-bit storage: weights stay wide, products take casts of them, and float16's loss scale finds its own size."""

from contextlib import closing

import ml_dtypes
import numpy as np
import pytest

from gpunet.backends.numpy import Backend
from gpunet.core.backend import Types
from gpunet.core.source import Source
from gpunet.core.state import LOSS_SCALE
from gpunet.core.step import METRICS, Step
from gpunet.core.trace import Share, Trace
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.nn import BatchNorm, Conv2d, Dropout, Graph, Input, Linear, MaxPool, ReLU, Sequential, SoftmaxCrossEntropy
from gpunet.optim.sgd import SGD

SIXTEEN = ("float16", "bfloat16")
N, SHAPE, CLASSES = 32, (8, 8, 3), 4


def network():
    image = Input(SHAPE)
    first = (Conv2d(8, 3, bias=False, name="conv"), BatchNorm(), ReLU(), MaxPool(2))
    rest = (Conv2d(8, 3, 2, groups=2), ReLU(), Dropout(0.1), Linear(CLASSES, name="fc"))
    return Graph(image, Sequential(*first, *rest, name="net")(image))


def step_of(dtype, optimizer=None, **options):
    options = {"batch": N, "replicas": 1} | options
    return Step(network(), SoftmaxCrossEntropy(), optimizer or SGD(0.05, 0.9), dtype=dtype, **options)


def batch():
    """Noise with a brighter pair of columns, whose place is the class."""
    rng, labels = np.random.default_rng(0), np.arange(N) % CLASSES
    x = rng.normal(size=(N, *SHAPE))
    for offset in (0, 1):
        x[np.arange(N), :, 2 * labels + offset] += 1
    return x, labels


def take(step, x, y):
    step.gradient(x, y)
    step.update()
    step.advance()


def change(step, **fields):
    state = step.state
    for name, value in fields.items():
        state[name] = value
    step.state = state


def everything(step):
    slots = step.optimizer_state["velocity"]
    return {f"{i} {name}": v for i, d in enumerate((step.weights, step.statistics, slots)) for name, v in d.items()}


def epsilon(dtype):
    return float(ml_dtypes.finfo(Types.of(dtype).real).eps)


# Types


@pytest.mark.parametrize(
    ("name", "real", "wide"),
    [
        ("float32", "float32", "float32"),
        ("tf32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("float16", "float16", "float32"),
        ("bfloat16", ml_dtypes.bfloat16, "float32"),
    ],
)
def test_types(name, real, wide):
    types = Types.of(name)
    assert (types.real, types.wide, types.compute) == (np.dtype(real), np.dtype(wide), name)
    assert types.scaled is (name == "float16")
    assert (Backend().engine(types) == "unfold") == (name in SIXTEEN)


@pytest.mark.parametrize("name", ["half", "fp16", "float", "", "float8"])
def test_a_type_has_one_name(name):
    with pytest.raises(GpunetError) as caught:
        Types.of(name)
    assert str(caught.value) == f"dtype: expected one of float32, tf32, float64, float16, bfloat16, got {name!r}"


# Programs


def lists(step):
    """Return [(path, name) of each entry] of every program of a step with a source."""
    step.memory()
    keys = [("gradient", N, False, True), ("gradient", N, True, False), ("evaluate", "train"), ("predict",)]
    keys += [("update",), ("advance", "train"), ("order", "train")]
    return {key: [(e.path, e.name) for e in step._replay.program(key)[0].plan.entries] for key in keys}


def test_a_program_casts_its_weights_in_one_launch():
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (N, *SHAPE), np.uint8), rng.integers(0, CLASSES, N, np.int32))
    portable = Backend()
    portable.engine = lambda types: "unfold"
    traced = {}
    for dtype in ("float32", *SIXTEEN):
        with closing(step_of(dtype, source=Source(split, classes=CLASSES), backend=portable)) as step:
            traced[dtype] = lists(step)
    cast = ("operands", "cast_forward")
    for key, plain in traced["float32"].items():
        assert cast not in plain
        for dtype in SIXTEEN:
            mine = traced[dtype][key]
            assert mine.count(cast) == (key[0] in ("gradient", "evaluate", "predict")), (dtype, key)
            assert [entry for entry in mine if entry != cast] == plain, (dtype, key)


def test_products_read_the_cast_and_write_wide_gradients():
    with closing(step_of("float16")) as step:
        program = step._replay.program(("gradient", N, False, True))[0]
        products = [e for e in program.plan.entries if e.kind == "matmul"]
        outputs = {str(e.writes[0].dtype) for e in products if e.writes[0].base.arena == "gradient"}
        assert outputs == {"float32"}
        assert {str(t.dtype) for e in products for t in e.reads} == {"float16"}
        assert not any(t.base.arena for e in products for t in e.reads if t.base.arena != "input")
        arenas, views = step._arenas.sizes(), {name: step._arenas[name][1] for name in ("weights", "gradient")}
        assert set(views.values()) == {np.dtype("float32")}
        assert arenas["input"] == N * np.prod(SHAPE) * 2


@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
def test_products_are_those_that_cublas_has(dtype):
    types = Types.of(dtype)
    real, wide = types.real, types.wide
    t = Trace(types, Share(2, 0, 2), {}, {}, training=True, engine="unfold")
    t.path = "stage1.conv"
    kinds = dict.fromkeys([(real, real), (real, wide), (wide, wide)])
    for operand, out in kinds:
        t.matmul(t.empty((2, 3), operand), t.empty((3, 4), operand), t.empty((2, 4), out))
    known = " or ".join(f"{operand} @ {operand} -> {out}" for operand, out in kinds)
    other = "float64" if real == wide else "float32"
    wrong = [(real, other, real), (other, real, wide), ("f8", "f8", wide), (real, real, "i4"), (other, other, real)]
    for a, b, out in wrong:
        with pytest.raises(GpunetError) as caught:
            t.matmul(t.empty((2, 3), a), t.empty((3, 4), b), t.empty((2, 4), out))
        got = f"{np.dtype(a)} @ {np.dtype(b)} -> {np.dtype(out)}"
        assert str(caught.value) == f"stage1.conv: matmul: expected {known}, got {got}"


# The product on NumPy


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("stored", ["real", "wide"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_product_is_rounded_once(dtype, stored, accumulate):
    """Operands may be transposed; the sum is float32's, the one rounding that of the output."""
    types, rng = Types.of(dtype), np.random.default_rng(0)
    a, b = rng.normal(size=(3, 9, 5)).astype(types.real), rng.normal(size=(3, 9, 7)).astype(types.real)
    out = rng.normal(size=(3, 5, 7)).astype(getattr(types, stored))
    expected = np.einsum("gki,gkj->gij", a.astype(float), b.astype(float)) + accumulate * out.astype(float)
    Backend().bind_matmul(a.transpose(0, 2, 1), b, out, accumulate, "float16", None)()
    half_a_unit = epsilon(dtype) / 2 if stored == "real" else 0
    assert (np.abs(out - expected) <= half_a_unit * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_long_sum_does_not_stand_still(dtype):
    """4096 ones: added in float16 they would end at 2048, in bfloat16 at 256."""
    real = Types.of(dtype).real
    out = np.zeros((1, 1), real)
    Backend().bind_matmul(np.ones((1, 4096), real), np.ones((4096, 1), real), out, 0, "float16", None)()
    assert out[0, 0] == 4096


# Training


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_it_trains_as_float32_does(dtype, replicas):
    """In the first loss a dozen tensors are rounded, by half an epsilon each, which adds up as a random walk does.

    So logits are off by less than two epsilons of their size, and the loss by no more than they are. Gradients are held
    to float32's layer by layer (test_layers): in a whole network a ReLU or a maximum may go the other way.
    """
    x, y = batch()
    with closing(step_of("float32", replicas=replicas)) as plain:
        plain.gradient(x, y)
        expected, size = plain.losses()["loss"], np.abs(plain.read("prediction")).max()
    with closing(step_of(dtype, replicas=replicas)) as step:
        step.gradient(x, y)
        first, scale = step.losses()["loss"], step.state["loss_scale"]
        assert 0 < abs(first - expected) < 2 * epsilon(dtype) * size
        assert scale == (LOSS_SCALE if dtype == "float16" else 1)
        assert step.read("prediction").dtype == Types.of(dtype).real
        assert step.predict(x).dtype == np.float32
        for _ in range(20):
            take(step, x, y)
        step.gradient(x, y)
        assert step.losses()["loss"] < first / 4
        assert (step.state["update"], step.state["good"], step.state["loss_scale"]) == (20, 20, scale)
        assert {v.dtype for v in everything(step).values()} == {np.dtype("float32")}


def test_tf32_is_float32_on_numpy():
    x, y = batch()
    with closing(step_of("float32")) as plain, closing(step_of("tf32")) as step:
        for _ in range(3):
            take(plain, x, y)
            take(step, x, y)
        for name, value in everything(plain).items():
            np.testing.assert_array_equal(everything(step)[name], value)
        np.testing.assert_array_equal(step.predict(x), plain.predict(x))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_weights_move_by_less_than_sixteen_bits_resolve(dtype):
    real, name = Types.of(dtype).real, "net.conv.weight"
    with closing(step_of(dtype, SGD(1e-5, clip=1.0))) as step:
        before = step.weights[name].astype(real)
        large = np.abs(before.astype(np.float32)) > 0.1  # half a unit in the last place is 3e-5 there, or more
        step.weights[name] = before
        step.gradient(*batch())
        step.update()
        after = step.weights[name]
        assert ((after != before) & large).sum() > large.sum() / 2
        np.testing.assert_array_equal(after.astype(real)[large], before[large])
        for _ in range(1000):
            step.update()
        assert (step.weights[name].astype(real) != before)[large].any(), "small steps must add up"


# The loss scale


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loss_scale_that_is_too_large_is_halved_until_gradients_fit(replicas):
    x, y = batch()
    with closing(step_of("float16", replicas=replicas)) as step:
        change(step, loss_scale=2.0**24)
        before, steps = everything(step), 0
        while True:
            scale = step.state["loss_scale"]
            take(step, x, y)
            steps += 1
            state = step.state
            assert (state["batch"], state["halt"]) == (steps, -1)
            if state["apply"]:
                break
            assert (state["update"], state["good"], state["loss_scale"]) == (0, 0, scale / 2)
            for name, value in everything(step).items():
                assert value.tobytes() == before[name].tobytes(), name
        assert scale == 2.0 ** (25 - steps) < 65504
        assert len(step.metrics()) == 1
        first = step.metrics()[0][0]
        for _ in range(15):
            take(step, x, y)
        assert step.state["update"] == 16
        assert step.metrics()[-1][0] < first / 2


def test_a_loss_scale_grows_after_two_thousand_good_steps():
    x, y = batch()
    with closing(step_of("float16")) as step:
        change(step, good=1998)
        for scale, good in ((LOSS_SCALE, 1999), (2 * LOSS_SCALE, 0), (2 * LOSS_SCALE, 1)):
            take(step, x, y)
            assert (step.state["loss_scale"], step.state["good"]) == (scale, good)
            assert step.state["apply"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_never_finite_halts(dtype):
    """At once where the loss is not scaled; in float16 when there is nothing left to halve."""
    x, y = batch()
    halvings = int(np.log2(LOSS_SCALE)) if dtype == "float16" else 0
    with closing(step_of(dtype)) as step:
        change(step, good=1999)
        before = everything(step)
        for number in range(halvings + 3):
            take(step, np.full_like(x, np.nan), y)
            assert step.state["halt"] == (-1 if number < halvings else halvings)
        state = step.state
        assert (state["loss_scale"], state["update"], state["apply"]) == (1, 0, 0)
        for name, value in everything(step).items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float64", "bfloat16"])
def test_only_float16_is_scaled(dtype):
    with closing(step_of(dtype)) as step:
        change(step, good=5000)
        take(step, *batch())
        assert (step.state["loss_scale"], step.state["good"]) == (1, 5001)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_what_is_reported_and_applied_knows_no_loss_scale(clip):
    """A power of two changes no bits of a float16, unless it is one below 6e-5, where they become fewer."""
    x, y = batch()
    found = []
    for scale in (64.0, LOSS_SCALE):
        with closing(step_of("float16", SGD(1.0, clip=clip))) as step:
            change(step, loss_scale=scale)
            before = np.concatenate([v.ravel() for v in step.weights.values()])
            step.gradient(x, y)
            assert np.abs(step.read("net.fc.bias:gradient")).max() > scale / 4, "read gives what is there"
            losses = step.losses()
            step.update()
            row = dict(zip(METRICS, step.metrics()[0], strict=True))
            assert (row["loss"], row["accuracy"]) == (losses["loss"], losses["accuracy"])
            moved = np.concatenate([v.ravel() for v in step.weights.values()]) - before
            if clip:
                assert row["norm"] > 2 * clip
            assert np.linalg.norm(moved) == pytest.approx(clip or row["norm"], rel=1e-4)
            found.append((losses["loss"], row["norm"], moved))
    assert found[0][0] == found[1][0] < 10
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-2, atol=1e-4)


def test_accumulated_gradients_share_a_loss_scale():
    x, y = batch()
    with closing(step_of("float16")) as step:
        step.gradient(x[:20], y[:20])
        parts = [step.read("net.fc.weight:gradient")]
        step.gradient(x[20:], y[20:])
        parts.append(step.read("net.fc.weight:gradient"))
        step.gradient(x[:20], y[:20])
        step.gradient(x[20:], y[20:], accumulate=True)
        np.testing.assert_allclose(step.read("net.fc.weight:gradient"), sum(parts), rtol=1e-5, atol=1e-3)
        assert step.losses()["count"] == N
