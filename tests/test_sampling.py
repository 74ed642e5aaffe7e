"""Which images an epoch visits: what each order promises, by counting and by chi-square at fixed seeds."""

import zlib
from contextlib import closing

import numpy as np
import pytest
from small_run import Killed, halves, last_run, left, network, new, on, recipe, stop_after
from test_random import chi_square
from test_window import Late

from gpunet import GpunetError, Source, Step, nn, optim
from gpunet.backends import problem
from gpunet.core import random
from gpunet.data import Split
from gpunet.train import Trainer, trainer

SIZES = [900, 3, 90, 0, 7]  # images of each class; one class has none
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), SIZES)).astype(np.int32)
IMAGES = np.random.default_rng(1).integers(0, 256, (1000, 2, 2, 1), np.uint8)
DRAWN = ["shuffled", "replacement", "balanced"]


def source(order, labels=LABELS, **options):
    return Source(Split(IMAGES[: len(labels)], labels), order=order, classes=5, **options)


def epochs(order, count, seed=3, **options):
    given = source(order, **options)
    return [given.images_of(seed, epoch) for epoch in range(count)]


# What is drawn


@pytest.mark.parametrize("order", ["shuffled", "stored"])
def test_each_image_once(order):
    for drawn in epochs(order, 3):
        assert (np.sort(drawn) == np.arange(1000)).all()
        assert (drawn == np.arange(1000)).all() == (order == "stored")


def test_draws_with_replacement_are_independent_and_even():
    drawn = epochs("replacement", 200)
    counts = np.bincount(np.concatenate(drawn), minlength=1000)
    assert abs(chi_square(counts)) < 4
    pairs = np.concatenate([d[:-1] // 50 * 20 + d[1:] // 50 for d in drawn])  # neighbours
    assert abs(chi_square(np.bincount(pairs, minlength=400))) < 4
    places = np.array(drawn)[:, 17]  # one place over the epochs
    assert abs(chi_square(np.bincount(places // 50, minlength=20))) < 4
    missed = np.mean([1000 - len(np.unique(d)) for d in drawn])  # of n images, n/e are not visited in an epoch
    assert missed == pytest.approx(1000 * (1 - 1 / 1000) ** 1000, abs=4 * 10 / np.sqrt(200))


def test_draws_reach_the_last_image_of_any_set():
    for n in (1, 2, 3, 5, 1000003):
        drawn = random.replacement(1, 0, n)
        assert drawn.dtype == np.int32 and len(drawn) == n
        assert drawn.min() >= 0 and drawn.max() < n
    n = 1000003  # the lower half of a word decides in n^2 / 2^32 of them
    words = random.philox(1, random.SAMPLE_SITE, 0, 0, 250_001).tolist()
    assert random.replacement(1, 0, n).tolist() == [word * n >> 64 for word in words[:n]]


def test_balanced_classes_have_as_many_places_give_or_take_one():
    """And over k epochs exactly as many, because the classes with one more change."""
    present = [c for c in range(5) if SIZES[c]]
    for n in (1000, 999, 998, 997):
        labels = LABELS[:n]
        total = np.zeros(5, int)
        for drawn in epochs("balanced", len(present), labels=labels):
            counts = np.bincount(labels[drawn], minlength=5)
            assert set(counts[present]) <= {n // 4, n // 4 + 1} and counts[3] == 0 and counts.sum() == n
            total += counts
        assert (total[present] == n).all()


def test_within_a_class_images_are_used_as_often_as_each_other():
    members = [np.flatnonzero(c == LABELS) for c in range(5)]
    for drawn in epochs("balanced", 3):
        counts = np.bincount(drawn, minlength=1000)
        for c in (0, 1, 2, 4):
            own = counts[members[c]]
            assert own.max() - own.min() <= 1
            assert own.sum() == 250
    assert counts[LABELS == 0].max() == 1  # 250 of the 900, each once


def test_which_images_of_a_large_class_are_left_out_is_even_over_epochs():
    drawn = np.concatenate(epochs("balanced", 150))
    counts = np.bincount(drawn, minlength=1000)[LABELS == 0]
    chance = 150 * 250 / 900
    deviation = ((counts - chance) ** 2 / (chance * (1 - 250 / 900))).sum()  # without replacement in an epoch
    assert abs(deviation - 899) < 4 * np.sqrt(2 * 899)


def test_the_places_of_a_balanced_epoch_do_not_tell_the_class():
    drawn = np.array(epochs("balanced", 50))
    classes = np.searchsorted([0, 1, 2, 4], LABELS[drawn])
    pairs = (classes[:, :-1] * 4 + classes[:, 1:]).reshape(-1)
    assert abs(chi_square(np.bincount(pairs, minlength=16))) < 4
    halves = np.array([np.bincount(classes[:, i::2].reshape(-1), minlength=4) for i in (0, 1)])
    assert abs(chi_square(halves.reshape(-1))) < 4


@pytest.mark.parametrize("order", DRAWN)
def test_epochs_and_seeds_differ(order):
    first, second = epochs(order, 2)
    assert (first != second).any() and (first != epochs(order, 1, seed=4)[0]).any()
    assert (first == epochs(order, 1)[0]).all()


def test_the_bits_are_frozen():
    """A checkpoint goes on with them: if they change, random.FORMAT must."""
    drawn = np.concatenate(epochs("replacement", 2) + epochs("balanced", 2))
    assert (random.FORMAT, zlib.crc32(drawn.astype("<i4").tobytes())) == (1, 628076918)


# What a training gets


def net():
    image = nn.Input((2, 2, 1))
    return nn.Graph(image, nn.Linear(5)(image))


def visited(order, backend="numpy", batch=16, steps=None, window=None, replicas=1):
    """Return the losses, an image each at a rate of 0, over an epoch and a half: they name the images."""
    step = Step(net(), nn.SoftmaxCrossEntropy(), optim.SGD(0.0), batch=batch, dtype="float64", backend=backend,
                replicas=replicas, seed=5, source=source(order, LABELS[:200], window=window))  # fmt: skip
    with closing(step):
        found = []
        for _ in range(steps or step.batches * 3 // 2):
            step.gradient()
            found.append(step.losses()["loss"] * step.losses()["count"])
            step.advance()
        return np.array(found)


def expected(order, batch=16):
    """The same from images_of and predict."""
    given = source(order, LABELS[:200])
    step = Step(net(), nn.SoftmaxCrossEntropy(), batch=200, dtype="float64", seed=5)
    with closing(step):
        x = step.predict(given.normalise(given.split.images))
    losses = np.log(np.exp(x).sum(axis=1)) - x[np.arange(200), LABELS[:200]]
    drawn = [losses[given.images_of(5, epoch)] for epoch in (0, 1)]
    sums = [[d[i : i + batch].sum() for i in range(0, 200, batch)] for d in drawn]
    return np.array([*sums[0], *sums[1]])[: -(-200 // batch) * 3 // 2]


@pytest.mark.parametrize("order", [*DRAWN, "stored"])
@pytest.mark.parametrize("options", [{}, {"batch": 7}, {"replicas": 3}, {"window": 64}])
def test_a_step_visits_the_images_of_the_order(order, options):
    np.testing.assert_allclose(visited(order, **options), expected(order, options.get("batch", 16)), rtol=1e-12)


def test_a_window_never_shows_a_half_too_early():
    for order in DRAWN:
        np.testing.assert_allclose(visited(order, Late(), window=64), expected(order), rtol=1e-12)


@pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")
@pytest.mark.parametrize("order", ["replacement", "balanced"])
def test_the_emulator_visits_them_too(order):
    np.testing.assert_allclose(visited(order, "emulator"), expected(order), rtol=1e-12)


@pytest.mark.parametrize("order", ["replacement", "balanced"])
def test_a_killed_training_goes_on_to_the_same(order, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "write_report", lambda result: None)
    config = recipe(tmp_path, train={"order": order}, run={"checkpoint_steps": 1})
    whole = left(new(config).fit().run.path)
    for after in (2, 4, 7):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, after)
            with pytest.raises(Killed):
                new(config).fit()
        assert left(on(last_run(config)).fit().run.path) == whole


def test_the_order_makes_a_difference(tmp_path):
    steps = {}
    for order in (*DRAWN, "stored"):
        made = Trainer(recipe(tmp_path, train={"order": order}), graph=network(), data=halves(), show=False)
        assert made.watched["validation"].order == "stored"
        with closing(made.step):
            made.step()
            steps[order] = made.step.metrics()[0, 0]
    assert len(set(steps.values())) == 4


# Mistakes


def test_values_have_no_classes_to_balance():
    split = Split(IMAGES[:20], values=np.zeros((20, 2), np.float32))
    for order in ("shuffled", "stored", "replacement"):
        Source(split, order=order)
    with pytest.raises(GpunetError, match="source train: order: expected labels for 'balanced', got images"):
        Source(split, order="balanced")


@pytest.mark.parametrize("wrong", ["random", "", True, None])
def test_an_unknown_order_is_refused(wrong):
    with pytest.raises(GpunetError, match="order: expected one of shuffled, stored, replacement, balanced, got"):
        source(wrong)
