"""Replicas: the same draws and the same weights whatever their number, however slow one is, and after a failure."""

import signal
import threading
import time
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from gpunet.backends.numpy import Backend
from gpunet.core.replicas import Team
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.nn import BatchNorm, Conv2d, Dropout, Graph, Input, Linear, MaxPool, ReLU, Sequential, SoftmaxCrossEntropy
from gpunet.optim.sgd import SGD

CLASSES = 3


def split(n, shape=(6, 7, 2), seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), np.uint8)
    return Split(images, rng.integers(0, CLASSES, n, np.int32))


def source(n, name="train", **options):
    return Source(split(n), mean=100.0, scale=0.02, flip=True, pad=2, classes=CLASSES, name=name, **options)


def network(norm=True, drop=0.2):
    image = Input((6, 7, 2))
    layers = [Dropout(drop, name="drop"), Conv2d(4, 3, bias=not norm, name="conv")]
    layers += [BatchNorm(name="norm"), ReLU()] if norm else [ReLU()]
    return Graph(image, Sequential(*layers, MaxPool(2), Linear(CLASSES, name="fc"), name="net")(image))


def step_of(replicas, n=14, batch=6, backend="numpy", norm=True, **options):
    given = {"dtype": "float64", "replicas": replicas, "backend": backend, "seed": 5, "source": source(n)} | options
    return Step(network(norm), SoftmaxCrossEntropy(), SGD(0.05, 0.9, 1e-3, nesterov=True), batch=batch, **given)


def tensors(step):
    kept = {**step.weights, **step.statistics}
    return kept | {f"velocity {k}": v for k, v in step.optimizer_state["velocity"].items()}


def assert_same(got, expected):
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-10, atol=1e-10 * np.abs(value).max(), err_msg=key)


# What they compute


@pytest.mark.parametrize("shape", [(14, 6), (8, 7), (20, 5)])
def test_draws_do_not_depend_on_replicas(shape):
    """The first layer's output is order, crop, flip and mask in one: the same bits; so are those of backward's mask."""
    n, batch = shape
    seen = []
    for replicas in (1, 2, 3):
        keep = ("net.drop:output", "net.drop:output_gradient", "input:gradient")
        with closing(step_of(replicas, n, batch, keep=keep, dtype="float32")) as step:
            outputs, masks = [], []
            for _ in range(2 * step.batches):
                step.gradient()
                outputs.append(step.read("net.drop:output"))
                gradient, below = step.read("net.drop:output_gradient"), step.read("input:gradient")
                masks.append((below != 0) | (gradient == 0))
                step.advance()
            seen.append((np.concatenate(outputs), np.concatenate(masks)))
    for outputs, masks in seen[1:]:
        np.testing.assert_array_equal(outputs, seen[0][0])
        np.testing.assert_array_equal(masks, seen[0][1])
    assert len(np.unique(seen[0][0])) > 100
    forward, backward = seen[0][0] != 0, seen[0][1]
    assert not (forward & ~backward).any(), "backward dropped what forward kept"


@pytest.mark.parametrize("norm", [True, False])
def test_replicas_train_the_same_weights(norm):
    """Batches of 6 and a tail of 2, which leaves one of three replicas idle."""
    results = []
    for replicas in (1, 2, 3):
        with closing(step_of(replicas, norm=norm)) as step:
            assert step.replicas == replicas
            for _ in range(7):
                step()
            results.append((tensors(step), step.metrics(), step.state))
            metrics = step.evaluate(source(11, "held out"))
            assert metrics["count"] == 11
            results[-1] += (np.array(list(metrics.values())),)
    for got in results[1:]:
        assert_same(got[0], results[0][0])
        np.testing.assert_allclose(got[1], results[0][1], rtol=1e-10)
        assert got[2] == results[0][2]
        np.testing.assert_allclose(got[3], results[0][3], rtol=1e-10)
    assert results[0][1][:, 2].tolist() == [6, 6, 2, 6, 6, 2, 6]


def test_the_callers_batch_may_be_smaller_than_the_replicas():
    x, y = split(7).images / 128 - 1, split(7).labels
    results = []
    for replicas in (1, 3):
        with closing(step_of(replicas, batch=7, source=None)) as step:
            for n in (7, 1, 2, 7):
                step.gradient(x[:n], y[:n])
                assert step.losses()["count"] == n
                assert len(step.read("prediction")) == n
                step.update()
            results.append(tensors(step) | {"output": step.predict(x)})
    assert_same(results[1], results[0])


def test_more_replicas_than_blocks_of_weights():
    """Two tensors are two blocks of the arena: one of three replicas has nothing to update."""
    image = Input((2, 2, 1))
    results = []
    for replicas in (1, 3):
        graph = Graph(image, Linear(2, name="fc")(image))
        with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.1), batch=3, dtype="float64", replicas=replicas)) as step:
            for _ in range(3):
                step.gradient(np.arange(12).reshape(3, 2, 2, 1) / 12, np.array([0, 1, 1]))
                step.update()
            results.append(dict(step.weights))
    assert_same(results[1], results[0])


class Slow(Backend):
    """A NumPy backend on which the main replica, or all others, come late to what they read from elsewhere."""

    def __init__(self, main):
        super().__init__()
        self.main = main

    def slowed(self, call):
        def run():
            if (threading.current_thread() is threading.main_thread()) == self.main:
                time.sleep(0.004)
            call()

        return run

    def bind_launch(self, kernel, arguments, workspace):
        call = super().bind_launch(kernel, arguments, workspace)
        return self.slowed(call) if kernel.stem in ("augment", "optim") else call

    def bind_reduce(self, *arguments):
        return self.slowed(super().bind_reduce(*arguments))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_slow_replica_changes_nothing(norm, accumulate):
    """Nobody may write what a slow replica still reads: sums, scratch, or the order of the next epoch."""
    results = []
    for replicas, backend in ((1, "numpy"), (3, Slow(main=True)), (3, Slow(main=False))):
        with closing(step_of(replicas, backend=backend, norm=norm)) as step:
            for _ in range(3):
                step(accumulate)
            results.append(tensors(step))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# What happens when one fails


class Failing(Backend):
    """A NumPy backend whose kernel `name` fails once in a replica when `armed`."""

    def __init__(self, name, main):
        super().__init__(numba=False)  # which fuses nothing
        self.name_of_kernel, self.main, self.armed = name, main, False

    def bind_launch(self, kernel, arguments, workspace):
        call = super().bind_launch(kernel, arguments, workspace)
        if kernel.name != self.name_of_kernel:
            return call

        def run():
            if self.armed and (threading.current_thread() is threading.main_thread()) == self.main:
                self.armed = False
                raise FloatingPointError(f"{kernel.name} failed")
            call()

        return run


def blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


@pytest.fixture
def two_blas_threads():
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        assert set(blas_threads()) == {2}
        yield
        assert set(blas_threads()) == {2}


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("kernel", ["batch_crop_flip", "batchnorm_backward_sums", "maxpool_forward"])
def test_a_step_survives_a_failing_replica(kernel, main, two_blas_threads):
    """The others stop, the failure is raised as it is, and a step that did not happen can be done again."""
    with closing(step_of(1)) as step:
        for _ in range(3):
            step()
        expected = tensors(step)
    backend = Failing(kernel, main)
    with closing(step_of(3, backend=backend)) as step:
        step()
        backend.armed = True
        with pytest.raises(FloatingPointError, match=f"{kernel} failed"):
            step()
        assert not backend.armed
        assert set(blas_threads()) == {2}
        assert step.state["update"] == step.state["batch"] == 1
        step()
        step()
        assert_same(tensors(step), expected)


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("kernel", ["gradient_finish", "sgd_update", "state_advance"])
def test_replicas_agree_on_where_they_are_after_a_failed_update(kernel, main):
    """Some weights may be updated, but no replica is a batch or an update ahead of the others."""
    backend = Failing(kernel, main)
    with closing(step_of(3, backend=backend)) as step:
        step()
        backend.armed = True
        with pytest.raises(FloatingPointError, match=f"{kernel} failed"):
            step()
        assert step.state["update"] == step.state["batch"] == 1
        step()
        step()
        assert step.state["update"] == step.state["batch"] == 3
        assert step.metrics()[:, 2].tolist() == [6, 6, 2]


def test_an_order_that_was_not_drawn_is_drawn_again():
    backend = Failing("order_draw", True)
    with closing(step_of(2, backend=backend)) as step, closing(step_of(1)) as expected:
        backend.armed = True
        with pytest.raises(FloatingPointError):
            step()
        step()
        expected()
        assert_same(tensors(step), tensors(expected))


def test_one_blas_thread_while_replicas_run(two_blas_threads):
    team, seen = Team(2), []
    try:
        team.run([[lambda: seen.append(blas_threads())], [lambda: seen.append(blas_threads())]])
        assert {n for counts in seen for n in counts} == {1}
    finally:
        team.close()


def test_replicas_wait_for_each_other():
    team, log = Team(3), []
    try:
        for _ in range(20):
            log.clear()
            lists = [[partial(log.append, ("a", r)), team.wait, partial(log.append, ("b", r))] for r in range(3)]
            lists[2].insert(0, lambda: time.sleep(1e-3))
            team.run(lists)
            assert sorted(log[:3]) == [("a", 0), ("a", 1), ("a", 2)]
            assert sorted(log[3:]) == [("b", 0), ("b", 1), ("b", 2)]
    finally:
        team.close()


def fail():
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize("replica", [0, 1, 2])
def test_a_failure_stops_the_others_and_is_raised(replica):
    team, done = Team(3), []
    try:
        lists = [[team.wait, lambda: done.append(1)] for _ in range(3)]
        lists[replica] = [fail]
        with pytest.raises(ZeroDivisionError, match="mine"):
            team.run(lists)
        assert not done
        team.run([[team.wait, lambda: done.append(1)] for _ in range(3)])
        assert len(done) == 3
    finally:
        team.close()


def test_an_interrupt_waits_for_the_others():
    """Ctrl-C while the main thread waits for a slower replica: it is raised when nobody computes any more."""
    team, done = Team(2), []

    def interrupt():
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        done.append("the replica")

    try:
        with pytest.raises(KeyboardInterrupt):
            team.run([[], [interrupt]])
        assert done == ["the replica"]
        for _ in range(3):
            team.run([[team.wait], [team.wait, lambda: done.append("again")]])
        assert done[1:] == ["again"] * 3
    finally:
        team.close()


def test_close_ends_the_threads_and_a_step_starts_them_again():
    before = threading.active_count()
    step = step_of(3)
    step()
    assert threading.active_count() == before + 2
    step.close()
    step.close()
    assert threading.active_count() == before
    with closing(step):
        step()
        assert step.state["update"] == 2
