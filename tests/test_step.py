"""Step: its three programs, what they leave untouched, their memory to the byte, and SGD in both forms."""

import os
import subprocess
import sys
import tracemalloc
import weakref
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gpunet.backends.numpy import Backend
from gpunet.core.observe import Poison
from gpunet.core.source import Source
from gpunet.core.step import METRICS, Step
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.nn import (
    GELU,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Graph,
    Input,
    LeakyReLU,
    Linear,
    MaxPool,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
)  # fmt: skip
from gpunet.optim.sgd import SGD

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 256 << 10  # bytes: what a replayed call may allocate at most


def split(n=14, shape=(6, 7, 2), classes=3):
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, classes, n, np.int32))


def source(n=14, name="train", **options):
    options = {"mean": 100.0, "scale": 0.02, "flip": True, "pad": 2, "classes": 3} | options
    return Source(split(n), name=name, **options)


def network(*layers, shape=(6, 7, 2)):
    image = Input(shape)
    layers = layers or (Conv2d(4, 3, name="conv"), ReLU(name="relu"), MaxPool(2), Linear(3, name="fc"))
    return Graph(image, Sequential(*layers, name="net")(image))


def step_of(graph=None, loss=None, optimizer=None, **options):
    options = {"batch": 6, "dtype": "float64", "replicas": 1} | options
    return Step(graph or network(), loss or SoftmaxCrossEntropy(), optimizer or SGD(0.05, 0.9, 1e-3), **options)


def batch_of(n=6, shape=(6, 7, 2), classes=3):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, *shape)), rng.integers(0, classes, n)


def zoo(shape=(16, 16, 4)):
    """A network with a layer of every kind."""
    image = Input(shape)
    x = Sequential(Conv2d(8, 3), BatchNorm(), ReLU(), Dropout(0.1))(image)
    y = Sequential(Conv2d(8, 3, groups=2), LeakyReLU(), Conv2d(8, 1), GELU(), AvgPool(3, 1, 1), Tanh())(x)
    x = Concat()(Add()(x, y), SiLU()(y), MaxPool(3, 1, 1)(x))
    y = Sequential(Conv2d(8, 3, 2, name="half"), Sigmoid())(x)
    x = Concat()(GlobalAvgPool()(x), Flatten()(y))
    return Graph(image, Linear(3, name="fc")(x))


# Gradient, update, advance


def everything(step):
    slots = step.optimizer_state["velocity"]
    return [np.concatenate([[0], *(v.reshape(-1) for v in d.values())]) for d in (step.weights, step.statistics, slots)]


def test_gradient_changes_nothing_and_repeats_bit_for_bit():
    with closing(step_of(zoo((6, 7, 2)), source=source(), replicas=2)) as step:
        step()
        before, state = everything(step), step.state
        names = [*step.weights]
        step.gradient()
        first, losses = [step.read(f"{n}:gradient") for n in names], step.losses()
        step.gradient()
        assert step.losses() == losses
        for name, gradient in zip(names, first, strict=True):
            np.testing.assert_array_equal(step.read(f"{name}:gradient"), gradient, err_msg=name)
        for now, then in zip(everything(step), before, strict=True):
            np.testing.assert_array_equal(now, then)
        assert step.state == state


def test_a_step_is_gradient_update_advance():
    with closing(step_of(zoo((6, 7, 2)), source=source())) as one, closing(
        step_of(zoo((6, 7, 2)), source=source())
    ) as other:
        for _ in range(4):
            one()
            other.gradient()
            other.update()
            other.advance()
        assert one.state == other.state
        assert one.state["batch"] == one.state["update"] == 4
        assert one.state["epoch"] == 1
        for a, b in zip(everything(one), everything(other), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.metrics(), other.metrics())


def test_accumulated_micro_batches_equal_one_batch():
    x, y = batch_of(12)
    with closing(step_of(batch=12)) as whole, closing(step_of(batch=4, replicas=2)) as parts:
        for _ in range(3):
            whole.gradient(x, y)
            whole.update()
            for i, stop in ((0, 4), (4, 8), (8, 11), (11, 12)):
                parts.gradient(x[i:stop], y[i:stop], accumulate=i > 0)
            assert parts.losses() == pytest.approx(whole.losses(), rel=1e-12)
            parts.update()
        for a, b in zip(everything(whole), everything(parts), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(whole.metrics()[:, :6], parts.metrics()[:, :6], rtol=1e-10)


def test_accumulating_over_a_source_blends_the_mean_of_batch_statistics():
    graph = network(BatchNorm(0.5, name="norm"), Linear(3))
    with closing(step_of(graph, source=source(12, order="stored", flip=False, pad=0))) as step:
        step(2)
        assert (step.state["update"], step.state["batch"], step.state["epoch"]) == (1, 2, 1)
        pixels = (split(12).images - 100.0) * 0.02
        means = pixels.reshape(2, -1, 2).mean(1)
        np.testing.assert_allclose(step.statistics["net.norm.mean"], 0.5 * means.mean(0), rtol=1e-10)
        variances = pixels.reshape(2, -1, 2).var(1, ddof=1)
        np.testing.assert_allclose(step.statistics["net.norm.variance"], 0.5 + 0.5 * variances.mean(0), rtol=1e-10)


def test_draws_move_with_advance_alone():
    graph = network(Dropout(0.5, name="drop"), Linear(3))
    x, y = batch_of()
    with closing(step_of(graph, keep=("net.drop:output",))) as step:
        seen = []
        for advances in (0, 0, 1, 0, 1):
            for _ in range(advances):
                step.advance()
            step.gradient(x, y)
            seen.append(step.read("net.drop:output").tobytes())
            step.update()
        assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
        assert seen[0] != seen[4]


def test_a_gradient_that_is_not_finite_is_not_applied():
    x, y = batch_of()
    with closing(step_of()) as step:
        step.gradient(x, y)
        step.update()
        before = everything(step)
        with np.errstate(invalid="ignore"):
            step.gradient(np.where(np.arange(6)[:, None, None, None] == 3, np.nan, x), y)
            step.update()
        for now, then in zip(everything(step), before, strict=True):
            np.testing.assert_array_equal(now, then)
        state = step.state
        assert (state["apply"], state["halt"], state["update"]) == (0, 0, 1)


# SGD against a few straight lines


def straight(form, nesterov, w, v, g, lr, momentum, decay):
    """One step of SGD on one tensor."""
    d = g + decay * w
    if form == "pytorch":
        v = momentum * v + d
        return w - lr * (d + momentum * v if nesterov else v), v
    new = momentum * v + lr * d
    return w - ((1 + momentum) * new - momentum * v if nesterov else new), new


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["pytorch", "caffe"])
def test_sgd_in_both_forms(form, nesterov, fast, replicas):
    """Rates that change, a bias's own rate and decay, clipping, and a factor the host sets between updates."""
    graph = network(
        Conv2d(4, 3, bias_rate=2.0, bias_decay=0.0, name="conv"), BatchNorm(name="norm"), Linear(3, bias=False)
    )
    rates, (x, y) = [0.1, 0.05, 0.2], batch_of()
    optimizer = SGD(9.0, 0.9, 1e-2, nesterov=nesterov, form=form, clip=0.2)
    with closing(step_of(graph, optimizer=optimizer, rates=rates, backend=Backend(fast), replicas=replicas)) as step:
        w = dict(step.weights)
        v = {name: np.zeros_like(value) for name, value in w.items()}
        for number in range(5):
            if number == 3:
                state = step.state
                state["lr_scale"] = 0.5
                step.state = state
            step.gradient(x, y)
            gradients = {name: step.read(f"{name}:gradient") / 6 for name in w}
            norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
            rate = rates[min(number, 2)] * (0.5 if number >= 3 else 1)
            for name, g in gradients.items():
                bias = name == "net.conv.bias"
                lr, decay = rate * (2 if bias else 1), 0 if bias else 1e-2
                w[name], v[name] = straight(form, nesterov, w[name], v[name], g * min(1, 0.2 / norm), lr, 0.9, decay)
            step.update()
            for name, value in w.items():
                np.testing.assert_allclose(step.weights[name], value, rtol=1e-12, atol=1e-14, err_msg=name)
                np.testing.assert_allclose(step.optimizer_state["velocity"][name], v[name], rtol=1e-12, atol=1e-14)
            row = dict(zip(METRICS, step.metrics()[-1], strict=True))
            assert row["norm"] == pytest.approx(norm, rel=1e-12)
            assert row["rate"] == pytest.approx(rate, rel=1e-12)
            assert norm > 0.2, "nothing to clip"


# Predict, evaluate, read


def test_predict_pads_the_last_batch():
    x, _ = batch_of(15)
    graph = zoo((6, 7, 2))
    with closing(step_of(graph, batch=6)) as step, closing(step_of(graph, batch=15, replicas=2)) as whole:
        np.testing.assert_allclose(step.predict(x), whole.predict(x), rtol=1e-12)
        np.testing.assert_allclose(step.predict(x[:1]), whole.predict(x)[:1], rtol=1e-12)
        assert step.predict(x[:0]).shape == (0, 3)


def test_pixels_are_taken_as_the_source_does():
    with closing(step_of(source=source())) as step:
        pixels = split().images
        np.testing.assert_array_equal(step.predict(pixels), step.predict((pixels - 100.0) * 0.02))
        losses = []
        for x in (pixels[:2], (pixels[:2] - 100.0) * 0.02):
            step.gradient(x, np.array([0, 1]))
            losses.append(step.losses()["loss"])
        assert losses[0] == losses[1]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_evaluate_counts_every_image_once(replicas):
    graph = network(Conv2d(4, 3), BatchNorm(), ReLU(), Dropout(0.5), Linear(3))
    with closing(step_of(graph, source=source(), replicas=replicas)) as step:
        step()
        held_out = source(11, "held out", smoothing=0.3)
        got = step.evaluate(held_out)
        logits = step.predict(held_out.split.images)
        labels = held_out.labels
        shifted = logits - logits.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(11), labels]
        assert got["count"] == 11
        assert got["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        assert got["loss"] == pytest.approx(losses.mean(), rel=1e-10)
        assert step.evaluate(held_out) == got


def test_evaluate_leaves_training_as_it_was():
    """Also where it is the training set itself that is looked at."""
    train, other = source(), source(9, "other")
    with closing(step_of(source=train)) as step, closing(step_of(source=source())) as expected:
        for _ in range(5):
            step()
            assert step.evaluate(other)["count"] == 9
            assert step.evaluate(train)["count"] == 14
            expected()
        assert step.state == expected.state
        for a, b in zip(everything(step), everything(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_targets_may_be_values():
    x, _ = batch_of()
    y = np.random.default_rng(2).normal(size=(6, 3))
    values = Source(Split(x.astype(np.float32), values=y.astype(np.float32)), order="stored")
    with closing(step_of(loss=MeanSquaredError(), source=values, dtype="float32")) as step:
        step.gradient()
        drawn = step.losses()
        step.gradient(x, y)
        assert drawn == pytest.approx(step.losses(), rel=1e-6)
        expected = np.square(step.read("prediction") - y).mean()
        assert drawn["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_kept_tensors_are_those_of_the_last_replay(replicas):
    keep = ("net.*:output", "net.fc:output_gradient", "input:gradient")
    x, y = batch_of()
    with closing(step_of(keep=keep, replicas=replicas)) as step, closing(step_of()) as plain:
        for _ in range(2):
            for s in (step, plain):
                s.gradient(x, y)
        conv, relu = step.read("net.conv:output"), step.read("net.relu:output")
        np.testing.assert_array_equal(relu, np.maximum(conv, 0))
        assert (conv < 0).any(), "the ReLU wrote over what was to be kept"
        np.testing.assert_array_equal(step.read("net.fc:output"), step.read("prediction"))
        p = np.exp(step.read("prediction"))
        expected = p / p.sum(1, keepdims=True) - np.eye(3)[y]
        np.testing.assert_allclose(step.read("net.fc:output_gradient"), expected, rtol=1e-10, atol=1e-14)
        assert step.read("input:gradient").shape == x.shape
        for name in step.weights:
            np.testing.assert_allclose(step.read(f"{name}:gradient"), plain.read(f"{name}:gradient"), rtol=1e-12)
        step.predict(x)
        np.testing.assert_allclose(step.read("net.fc:output"), step.predict(x), rtol=1e-12)
        with pytest.raises(GpunetError, match="not kept"):
            step.read("net.fc:output_gradient")


def test_weights_are_copied_in_and_out():
    with closing(step_of()) as step:
        weight = step.weights["net.fc.weight"]
        weight += 1
        assert not np.array_equal(step.weights["net.fc.weight"], weight)
        step.weights["net.fc.weight"] = weight
        weight += 1
        np.testing.assert_array_equal(step.weights["net.fc.weight"] + 1, weight)
        step.weights.update({name: np.zeros_like(value) for name, value in step.weights.items()})
        assert not step.predict(batch_of()[0]).any()
        assert sorted(step.weights) == ["net.conv.bias", "net.conv.weight", "net.fc.bias", "net.fc.weight"]


def test_first_weights_depend_on_seed_and_name_alone():
    small = network(BatchNorm(), Conv2d(4, 3, name="conv"), Linear(3, name="other"))
    steps = [step_of(seed=3), step_of(small, seed=3, replicas=2, dtype="float32"), step_of(seed=4)]
    first, second, third = (step.weights["net.conv.weight"] for step in steps)
    np.testing.assert_array_equal(first.astype(np.float32), second)
    assert not np.array_equal(first, third)


# Memory


class Spy(Backend):
    """A NumPy backend that notes what is allocated, and which views lie where."""

    def __init__(self):
        super().__init__()
        self.blocks, self.scratch, self.views = [], {}, []

    def allocate(self, nbytes):
        block = super().allocate(nbytes)
        assert block.nbytes == nbytes
        self.blocks.append(block)
        return block

    def view(self, memory, offset, tensor):
        view = super().view(memory, offset, tensor)
        if tensor.base.arena is None:
            self.scratch[id(memory)] = memory
            low, high = np.lib.array_utils.byte_bounds(view)
            start = memory.ctypes.data
            assert start + offset <= low
            assert high <= start + offset + tensor.base.nbytes <= start + memory.nbytes, "a base beyond its memory"
        return view


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_exactly_the_planned_bytes_are_allocated(replicas, dtype):
    spy = Spy()
    with closing(step_of(zoo((6, 7, 2)), source=source(), backend=spy, replicas=replicas, dtype=dtype)) as step:
        planned = step.memory()
        assert not spy.blocks, "planning allocates nothing"
        for _ in range(4):
            step()
        step.predict(batch_of()[0])
        step.evaluate(step.source)
        assert step.memory() == planned
        assert [b.nbytes for b in spy.scratch.values()] == [planned["scratch"] // replicas] * replicas
        adopted = planned["train.images"] + planned["train.targets"]
        step.gradient(*batch_of())
        step.losses()
        step.metrics()
        assert sum(b.nbytes for b in spy.blocks) == sum(planned.values()) - adopted


@pytest.mark.parametrize("replicas", [1, 3])
def test_scratch_that_is_too_small_is_freed_before_a_larger_one_is_taken(replicas):
    class Counted(Backend):
        """Notes how many blocks of scratch are alive when a block of so many bytes is allocated."""

        def __init__(self):
            super().__init__()
            self.scratch, self.alive = {}, {}

        def allocate(self, nbytes):
            self.alive.setdefault(nbytes, sum(ref() is not None for ref in self.scratch.values()))
            return super().allocate(nbytes)

        def view(self, memory, offset, tensor):
            if tensor.base.arena is None:
                self.scratch[id(memory)] = weakref.ref(memory.base)  # the owner: views refer to it, not to each other
            return super().view(memory, offset, tensor)

    backend = Counted()
    with closing(step_of(backend=backend, replicas=replicas, keep=("*",))) as step:
        step.predict(batch_of()[0])
        assert len(backend.scratch) == replicas
        step.gradient(*batch_of())
        assert backend.alive[step.memory()["scratch"] // replicas] == 0


def test_a_failed_replay_leaves_nothing_to_read():
    class Failing(Backend):
        def bind_call(self, name, views, options, workspace):
            return fail if name == "blocked_backward_weight" else super().bind_call(name, views, options, workspace)

    def fail():
        raise FloatingPointError("failed")

    with closing(step_of(backend=Failing())) as step:
        step.predict(batch_of()[0])
        with pytest.raises(FloatingPointError):
            step.gradient(*batch_of())
        with pytest.raises(GpunetError, match="kept by the last replay: nothing"):
            step.read("prediction")


@pytest.mark.parametrize("engine", ["blocked", "unfold"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_nothing_in_scratch_outlives_a_replay(engine, replicas):
    """Memory full of NaN before every replay: the same bits come out."""
    results = []
    for poison in (False, True):
        backend = Backend()
        backend.engine = lambda types, engine=engine: engine
        with closing(step_of(zoo((6, 7, 2)), source=source(), backend=backend, replicas=replicas)) as step, (
            step.observed(*[Poison()] * poison)
        ):
            for _ in range(4):
                step()
            step.gradient()
            step.gradient(accumulate=True)
            step.update()
            output = step.predict(batch_of()[0])
            results.append([*everything(step), step.metrics(), output, str(step.evaluate(source(8, "other")))])
    for clean, poisoned in zip(*results, strict=True):
        np.testing.assert_array_equal(poisoned, clean)
    assert np.isfinite(results[0][0]).all()


class Watched(Backend):
    """A NumPy backend that measures what each replayed call allocates."""

    def __init__(self):
        super().__init__()
        self.peaks = defaultdict(int)

    def watched(self, name, call):
        def run():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            call()
            _, peak = tracemalloc.get_traced_memory()
            self.peaks[name] = max(self.peaks[name], peak - before)

        return run

    def bind_launch(self, kernel, arguments, workspace):
        return self.watched(kernel.name, super().bind_launch(kernel, arguments, workspace))

    def bind_matmul(self, *arguments):
        return self.watched("matmul", super().bind_matmul(*arguments))

    def bind_call(self, name, views, options, workspace):
        return self.watched(name, super().bind_call(name, views, options, workspace))


def numpy_bytes():
    """Return the bytes of NumPy's arrays that tracemalloc saw being allocated."""
    only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([only]).traces)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def images(n, shape=(16, 16, 4)):
    rng = np.random.default_rng(0)
    return Source(
        Split(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 3, n, np.int32)),
        mean=120.0, scale=0.02, flip=True, pad=2, classes=3,
    )  # fmt: skip


def test_a_replayed_step_allocates_nothing_large(traced):
    """One image of the zoo is 4 to 24 KB a tensor: 64 of them make any temporary of a tensor's size stand out."""
    watched = Watched()
    step = step_of(zoo(), source=images(128), batch=64, dtype="float32", backend=watched)
    with closing(step):
        for _ in range(4):
            step()
        watched.peaks.clear()
        for _ in range(4):
            step()
        large = {name: peak for name, peak in sorted(watched.peaks.items()) if peak > BLOCK}
        assert not large, f"bytes allocated in one call, above {BLOCK}: {large}"
        assert len(watched.peaks) > 30


def test_a_hundred_steps_grow_by_nothing(traced):
    with closing(step_of(zoo(), source=images(10), batch=4, dtype="float32", replicas=2)) as step:
        for _ in range(5):
            step()
        before = numpy_bytes()
        for _ in range(100):
            step()
        assert numpy_bytes() <= before


GROWTH = """
import sys
import numpy as np
from gpunet import models
from gpunet.backends.numpy import Backend
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.nn import SoftmaxCrossEntropy
from gpunet.optim.sgd import SGD

def resident():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) * 1024

np.ones((64, 64)) @ np.ones((64, 64))
rng = np.random.default_rng(0)
n = 600
split = Split(rng.integers(0, 256, (2 * n, 32, 32, 3), np.uint8), rng.integers(0, 10, 2 * n, np.int32))
source = Source(split, mean=120.0, scale=0.02, flip=True, pad=4, classes=10)
graph = models.resnet9(widths=(8, 16, 16, 16))
before = resident()
options = {"dtype": "float64", "keep": ("*",), "backend": Backend(numba=False)}  # more bytes for the time; no compiler
step = Step(graph, SoftmaxCrossEntropy(), SGD(0.01, 0.9), batch=n, source=source, replicas=1, **options)
arena = sum(step.memory().values()) - step.memory()["train.images"]
for _ in range(int(sys.argv[1])):
    step()
print(arena, resident() - before)
"""


def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_a_process_grows_by_its_arena_and_no_more():
    if available() < 6 << 30:
        pytest.skip(f"needs 6 GB of free memory, there are {available() >> 20} MB")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, "5"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    arena, grown = map(int, done.stdout.split())
    assert arena > 3 << 28
    assert arena * 0.5 < grown <= 1.02 * arena + (24 << 20), f"planned {arena}, grown by {grown}"
