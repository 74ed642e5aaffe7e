"""The drawn set: the same bits, balanced, out of a linear classifier's reach, each shape its own."""

import hashlib

import numpy as np
import pytest

from gpunet import data
from gpunet.data import shapes
from gpunet.errors import GpunetError


@pytest.fixture(scope="module")
def drawn():
    return data.load("shapes", validation=0)


def test_the_bits_are_fixed(drawn):
    digest = hashlib.sha256(drawn.train.images[:1000].tobytes()).hexdigest()
    assert digest == "46a0a7368f5a453bb6429b420ad9c30e27abd4e23b6c9065d6cef8298bddaa05"
    other = data.load("shapes", train=100, test=10, seed=1)
    assert not np.array_equal(other.train.images[:50], drawn.train.images[:50])
    assert not np.array_equal(drawn.test.images[:50], drawn.train.images[:50])


def test_a_small_set_is_the_beginning_of_a_large_one(drawn):
    small = data.load("shapes", train=130, test=37, validation=0)
    assert np.array_equal(small.train.images, drawn.train.images[:130])
    assert np.array_equal(small.test.images, drawn.test.images[:37])


def test_sizes_balance_and_note(drawn):
    assert (len(drawn.train), len(drawn.test)) == (10_000, 2_000)
    assert np.bincount(drawn.train.labels).tolist() == [1000] * 10
    assert drawn.train.images.shape[1:] == (32, 32, 3) and len(drawn.classes) == 10
    assert "synthetic" in drawn.note


def test_pictures_vary_over_the_whole_range(drawn):
    mean, sd = data.channel_statistics(drawn)
    assert np.all(abs(mean - 128) < 8) and np.all((sd > 50) & (sd < 90))
    assert drawn.train.images.min() == 0 and drawn.train.images.max() == 255
    whole = drawn.train.images.astype(np.float32)
    of_class = np.stack([whole[drawn.train.labels == i].mean(0) for i in range(10)])
    assert np.abs(of_class - whole.mean(0)).mean() < 4  # of 255: the class is not in the mean picture


def test_a_linear_classifier_stays_below_25_percent(drawn):
    train, test = ((s.images[:4000].reshape(-1, 3072).astype(np.float32) - 128) / 72 for s in (drawn.train, drawn.test))
    targets = np.eye(10, dtype=np.float32)[drawn.train.labels[:4000]]
    gram, right = train.T @ train, train.T @ targets
    weights = np.linalg.solve(gram + 1000 * np.eye(3072, dtype=np.float32), right)
    hits = (test @ weights).argmax(1) == drawn.test.labels
    fitted = (train @ weights).argmax(1) == drawn.train.labels[:4000]
    assert hits.mean() < 0.25 < fitted.mean()  # it did learn, by heart


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_lies_in_its_frame(name):
    """Inside within 1.1 of the centre, between a fifth and three quarters of the square, edges of slope about 1."""
    grid = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    distance = shapes.SHAPES[name](x, y)
    inside = distance < 0
    assert distance.dtype == np.float32
    assert 0.6 < inside.sum() * 0.01**2 < 3.0
    assert np.sqrt(x * x + y * y)[inside].max() < 1.15
    slope = np.hypot(*np.gradient(distance, 0.01))[np.abs(distance) < 0.05]
    assert 0.9 < np.median(slope) < 1.1


def test_shapes_refuses():
    for wrong in ({"seed": -1}, {"seed": 2**64}, {"train": 9}, {"test": 0}):
        with pytest.raises(GpunetError, match="shapes: "):
            data.load("shapes", **wrong)
