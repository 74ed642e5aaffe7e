"""Sets larger than the device: whatever the window, the same training bit for bit, and no half is read too early."""

from contextlib import closing

import numpy as np
import pytest

from gpunet import GpunetError, Source, Step, nn, optim
from gpunet.backends.numpy import Backend
from gpunet.core.backend import Types
from gpunet.core.trace import Share, Trace
from gpunet.data import Split
from gpunet.train.config import load_config
from gpunet.train.summary import Plan

BATCH = 8
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (70, 5, 5, 2), np.uint8)
LABELS = RNG.integers(0, 4, 70).astype(np.int32)
VALUES = RNG.normal(size=(70, 4)).astype(np.float32)


class Late(Backend):
    """Copies to the device only when the computation waits for it: what is read without waiting is wrong."""

    def __init__(self):
        super().__init__()
        self.staged, self.log = [], []

    def stage(self, pairs, after):
        event = [list(pairs)]
        self.staged.append(sum(array.nbytes for _, array in pairs))
        self.log.append("stage")
        return event

    def wait(self, event):
        self.log.append("wait")
        while event:
            super().stage(event.pop(), None)

    def finish(self, event):
        self.log.append("finish")


def net():
    image = nn.Input((5, 5, 2))
    return nn.Graph(image, nn.Linear(4)(nn.GlobalAvgPool()(nn.ReLU()(nn.Conv2d(6, 3)(image)))))


def source(window, name="train", values=False, **options):
    split = Split(IMAGES, values=VALUES) if values else Split(IMAGES, LABELS)
    return Source(split, 120.0, 1 / 60, window=window, classes=None if values else 4, name=name, **options)


def trained(window, backend=None, steps=23, values=False, **arguments):
    """Return everything that 23 steps (over two epochs and a half), two evaluations and one more step leave."""
    loss = nn.MeanSquaredError() if values else nn.SoftmaxCrossEntropy()
    step = Step(net(), loss, optim.SGD(0.05, 0.9), batch=BATCH, backend=backend or Backend(), dtype="float64",
                source=source(window, values=values, flip=True, pad=1))  # fmt: skip
    with closing(step):
        for _ in range(steps):
            step(**arguments)
        other = source(window, "other", values, order="stored")
        seen = [step.evaluate(other), step.evaluate(step.source)]
        step.gradient()
        seen.append(step.losses())
        step(**arguments)
        held = step.memory()["train.images"] // IMAGES[0].nbytes
        return {**step.weights}, step.metrics(), seen, held


def assert_same(got, expected):
    assert all((got[0][name] == value).all() for name, value in expected[0].items())
    np.testing.assert_array_equal(got[1], expected[1])
    assert got[2] == expected[2]


@pytest.mark.parametrize("backend", [Backend, Late])
@pytest.mark.parametrize(("window", "held"), [(16, 16), (32, 32), (47, 32), (50, 48), (69, 64), (70, 70), (99, 70)])
def test_the_window_changes_nothing_but_the_memory(window, held, backend):
    got = trained(window, backend())
    assert got[3] == held
    assert_same(got, trained(None))


@pytest.mark.parametrize("arguments", [{"accumulate": 2}, {"steps": 3}, {"accumulate": 3, "steps": 2}])
def test_several_batches_a_call(arguments):
    assert_same(trained(16, Late(), **arguments), trained(None, **arguments))


def test_values_and_replicas():
    assert_same(trained(16, Late(), values=True), trained(None, values=True))


def test_each_half_is_copied_once_an_epoch_and_ahead_of_its_use():
    backend = Late()
    step = Step(net(), nn.SoftmaxCrossEntropy(), optim.SGD(0.05), batch=BATCH, backend=backend, source=source(32))
    with closing(step):
        assert step.batches == 9  # halves of two batches: 2, 2, 2, 2 and the last one with 6 images
        for _ in range(18):
            step()
    each = IMAGES[0].nbytes + 4
    ends = [6 * each, 16 * each]  # five halves an epoch: the next begins in the one that ends, and waits for it
    assert backend.staged[:5] == [16 * each] * 4 + ends[:1]
    assert backend.staged[5:10] == [16 * each] * 4 + ends[:1]
    assert backend.log[:5] == ["stage", "wait", "stage", "wait", "finish"]
    rest = [word for word in backend.log if word != "wait"][2:]  # a buffer is filled again once its copy is over
    assert rest == ["finish", "stage"] * (len(backend.staged) - 2)


def test_a_window_too_small_for_two_batches_is_refused():
    with pytest.raises(GpunetError, match="source train: window: expected at least two batches of 8 images, got 15"):
        trained(15)


def test_the_largest_batch_is_one_that_the_window_holds():
    config = load_config("mlp_shapes", ["train.batch=20", "train.window=40"])
    assert Plan(config).largest_batch(1 << 40) == 20


def test_a_product_of_batches_has_a_result_of_batches():
    t = Trace(Types.of("float32"), Share.of(1, 0, 1), {}, {}, training=False, engine="unfold")
    a, b = t.empty((2, 3, 4)), t.empty((2, 4, 5))
    t.matmul(a, b, t.empty((2, 3, 5)))
    flat, mixed = ((2, 3, 4), (2, 4, 5), (3, 5)), ((2, 3, 4), (4, 5), (2, 3, 5))
    for shapes in (flat, mixed, ((1, 2, 3, 4), (1, 2, 4, 5), (1, 2, 3, 5))):
        with pytest.raises(GpunetError, match="matmul: .* does not give"):
            t.matmul(*map(t.empty, shapes))
