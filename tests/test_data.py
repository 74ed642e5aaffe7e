"""Splits, the user's arrays, holding out, limits, statistics, contact sheets, what `load` refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunet import data
from gpunet.data import Arrays, DataSet, Split
from gpunet.errors import GpunetError

BYTES = np.arange(12 * 4 * 4 * 3, dtype=np.uint8).reshape(12, 4, 4, 3)
LABELS = np.arange(12, dtype=np.int32) % 3


def numbered(labels):
    """A data set whose image i holds i in its first two pixels."""
    n = len(labels)
    images = np.arange(n, dtype="<u2").view(np.uint8).reshape(n, 1, 2, 1)
    train = Split(images, np.asarray(labels, np.int32))
    return DataSet("numbered", tuple("abcdefgh"), train, test=Split(images[:1], np.zeros(1, np.int32)))


def numbers(split):
    return np.ascontiguousarray(split.images).reshape(-1, 2).view("<u2")[:, 0]


def refused(call, *words):
    """The call fails with one line that holds the words."""
    with pytest.raises(GpunetError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert word in text, text


def test_a_split_checks_its_arrays():
    assert len(Split(BYTES, LABELS)) == 12
    refused(lambda: Split(BYTES), "labels or values")
    refused(lambda: Split(BYTES, LABELS, np.zeros((12, 1), np.float32)), "labels or values")
    refused(lambda: Split(BYTES.astype(np.float64), LABELS), "images", "uint8 or float32", "float64")
    refused(lambda: Split(BYTES[:, :, ::-1], LABELS), "C-contiguous")
    refused(lambda: Split(BYTES, LABELS.astype(np.int64)), "targets", "int32", "int64")
    refused(lambda: Split(BYTES, values=np.zeros(12, np.float32)), "2 axes")
    refused(lambda: Split(BYTES[:5], LABELS), "as many", "(5, 4, 4, 3)", "12 targets")
    refused(lambda: Split(BYTES[:0], LABELS[:0]), "at least one")


def test_a_data_set_checks_its_splits_against_each_other():
    train = Split(BYTES, LABELS)
    refused(lambda: DataSet("d", ("a", "b"), train), "d: train", "labels", "0 to 1", "0 to 2")
    refused(
        lambda: DataSet("d", tuple("abc"), train, test=Split(BYTES[:, :2].copy(), LABELS)), "d: test", "as in train"
    )
    floats = Split(BYTES.astype(np.float32), LABELS)
    refused(lambda: DataSet("d", tuple("abc"), train, validation=floats), "d: validation", "float32")
    values = Split(BYTES, values=np.zeros((12, 1), np.float32))
    refused(lambda: DataSet("d", tuple("abc"), train, validation=values), "d: validation", "as in train")
    assert str(DataSet("d", tuple("abc"), train)) == "d: train 12; 3 classes; 4 x 4 x 3 uint8"


def test_arrays_become_splits():
    d = Arrays(
        BYTES.astype(np.float64) / 255, LABELS.tolist(), validation=3, test=(BYTES / 255, LABELS.astype(np.uint8))
    )
    assert d.train.images.dtype == np.float32 and d.train.labels.dtype == np.int32
    assert (len(d.train), len(d.validation), len(d.test), d.classes) == (9, 3, 12, ("0", "1", "2"))
    grey = Arrays(BYTES[..., 0], LABELS, validation=0, classes=["x", "y", "z"])
    assert grey.train.images.shape == (12, 4, 4, 1) and grey.validation is None and grey.classes == ("x", "y", "z")
    planes = np.ascontiguousarray(np.tile(BYTES, (1, 2, 2, 1)).transpose(0, 3, 1, 2))
    turned = Arrays(planes, LABELS, validation=(planes[:2], LABELS[:2]), layout="NCHW")
    assert np.array_equal(turned.train.images, np.tile(BYTES, (1, 2, 2, 1))) and len(turned.validation) == 2
    values = Arrays(BYTES, np.ones((12, 2)), validation=0.25)
    assert values.train.values.shape == (9, 2) and values.train.values.dtype == np.float32 and values.classes == ()
    assert Arrays(BYTES, LABELS + 1, validation=0).note == "no training image of class 0"


@pytest.mark.parametrize(
    ("x", "y", "more", "words"),
    [
        (BYTES.astype(np.int64), LABELS, {}, ["x: expected uint8 or floats", "int64", "astype"]),
        (BYTES.reshape(12, -1), LABELS, {}, ["x: expected shape", "(12, 48)"]),
        (np.zeros((12, 3, 8, 8), np.uint8), LABELS, {}, ["channels first", "layout='NCHW'"]),
        (BYTES, LABELS, {"layout": "CHW"}, ["layout"]),
        (BYTES, LABELS[:5], {}, ["y: expected as many", "12", "(5,)"]),
        (BYTES, 3, {}, ["y: expected as many"]),
        (BYTES, LABELS - 1, {}, ["labels from 0", "-1"]),
        (BYTES, LABELS.astype(np.int64) + 2**40, {}, ["labels from 0"]),
        (BYTES, LABELS + 10**6, {}, ["count from 0"]),
        (BYTES, LABELS.astype(np.float32), {}, ["whole numbers of shape (n,)", "float32 of shape (12,)"]),
        (BYTES, np.eye(12, dtype=int), {}, ["whole numbers of shape (n,)"]),
        (BYTES, LABELS, {"classes": ("a", "b")}, ["labels", "0 to 1"]),
        (BYTES, np.zeros((12, 1)), {"classes": ("a",)}, ["classes"]),
        (BYTES, np.full((12, 1), np.nan), {}, ["y: expected finite"]),
        (np.where(BYTES == 7, np.inf, 0.0), LABELS, {}, ["x: expected finite"]),
        (np.full(BYTES.shape, 1e39), LABELS, {}, ["x: expected finite"]),
        (BYTES, LABELS, {"test": (BYTES[..., :2], LABELS)}, ["arrays: test", "as in train"]),
        (BYTES, LABELS, {"validation": 12}, ["validation", "below the 12"]),
        (BYTES, LABELS, {"validation": 2.5}, ["validation"]),
        (BYTES, LABELS, {"validation": -1}, ["validation"]),
        (BYTES, LABELS, {"validation": 10}, ["at most 9", "every class keeps one"]),
        (BYTES, LABELS, {"seed": -1}, ["seed"]),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_arrays_refuses(x, y, more, words):
    refused(lambda: Arrays(x, y, **more), *words)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=300), st.data())
def test_holding_out_keeps_every_image_once_and_classes_in_proportion(labels, draw):
    whole = numbered(labels)
    n, present = len(labels), len(set(labels))
    count = draw.draw(st.integers(1, max(1, n - present)))
    try:
        d = data.hold_out(whole, count, seed=draw.draw(st.integers(0, 2**64 - 1)))
    except GpunetError:
        assert min(np.unique(labels, return_counts=True)[1]) < n / count  # some class too small for its share
        return
    assert len(d.validation) == count and d.test is whole.test
    both = np.concatenate([numbers(d.train), numbers(d.validation)])
    assert sorted(both) == list(range(n))
    for split in (d.train, d.validation):
        assert np.array_equal(split.labels, np.asarray(labels)[numbers(split)])
        assert np.all(np.diff(numbers(split).astype(int)) > 0)
    for label in set(labels):
        share = count * labels.count(label) / n
        assert abs(np.count_nonzero(d.validation.labels == label) - share) <= 1.0
        assert np.count_nonzero(d.train.labels == label) >= 1


def test_holding_out_follows_the_seed():
    whole = numbered(np.arange(2000) % 8)
    first, again, other = (numbers(data.hold_out(whole, 200, seed=s).validation) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first[:6].tolist() == [2, 9, 11, 15, 25, 36]  # the draw is part of what a run records
    assert len(np.unique(np.diff(first))) > 10  # scattered, not a block
    assert len(data.hold_out(whole, 0.05).validation) == 100
    assert data.hold_out(whole, 0) is whole and data.hold_out(whole, 0.0001) is whole


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 250))
def test_a_subset_holds_the_first_of_each_class(labels, n):
    whole = numbered(labels).train
    part = data.subset(whole, n)
    assert len(part) == min(n, len(labels))
    for label in set(labels):
        mine = numbers(part)[part.labels == label]
        assert np.array_equal(mine, np.flatnonzero(np.asarray(labels) == label)[: len(mine)])
        assert abs(len(mine) - len(part) * labels.count(label) / len(labels)) < 1.0


def test_a_subset_of_values_is_the_first_images():
    split = Split(BYTES, values=np.arange(12, dtype=np.float32)[:, None])
    assert data.subset(split, 5).values.ravel().tolist() == [0, 1, 2, 3, 4]
    assert data.subset(split, 50) is split
    refused(lambda: data.subset(split, 0), "limit")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_train_alone_in_double(dtype, monkeypatch):
    monkeypatch.setattr(data.statistics, "CHUNK", 1000)  # several chunks, the last one short
    x = np.random.default_rng(0).integers(0, 256, (321, 5, 4, 3)).astype(dtype)
    x[..., 2] = 200
    if dtype == np.float32:
        x[..., 1] = 1e4 + x[..., 1] * 1e-2  # a large mean beside a small spread
    labels = np.zeros(len(x), np.int32)
    test = Split(np.zeros_like(x), labels)
    d = DataSet("d", ("a",), Split(x, labels), test=test, validation=test)
    mean, sd = data.channel_statistics(d)
    exact = x.astype(np.float64)
    assert np.allclose(mean, exact.mean((0, 1, 2)), rtol=1e-13)
    assert np.allclose(sd, exact.std((0, 1, 2)), rtol=1e-11) and sd[2] == 0
    assert np.allclose(data.mean_image(d), exact.mean(0), rtol=1e-13) and data.mean_image(d).shape == (5, 4, 3)


def test_a_contact_sheet_shows_the_images_of_each_class():
    d = Arrays(BYTES, LABELS, validation=0, classes=["first", "second", "third"])
    sheet = data.contact_sheet(d.train, d.classes, columns=3)
    pixels = np.asarray(sheet)
    left = sheet.width - 3 * (64 + 2)
    for row in range(3):
        for column in range(3):
            corner = pixels[2 + row * 66 :, left + column * 66 :][:64, :64]
            assert np.array_equal(corner[8::16, 8::16], BYTES[row + 3 * column])
    values = Arrays(BYTES.astype(np.float32), np.zeros((12, 1)), validation=0)
    assert data.contact_sheet(values.train, values.classes, columns=5).height > 2 * 66
    one = Split(np.zeros((1, 4, 4, 2), np.uint8), np.zeros(1, np.int32))
    assert data.contact_sheet(one, ("a", "empty")).mode == "RGB"


def test_load_refuses_what_it_does_not_know():
    refused(lambda: data.load("cifar11"), "cifar10, cifar100, folder, shapes", "cifar11")
    refused(lambda: data.load("shapes", fallback="cifar10"), "fallback")
    refused(lambda: data.load("shapes", "/tmp"), "directory")
    refused(lambda: data.load("shapes", sise=3), "'sise'", "train, test")
    refused(lambda: data.load("folder", "/tmp"), "size")
    refused(lambda: data.load("cifar10", size=3), "'size'", "coarse, download")
    refused(lambda: data.load("cifar10", coarse=True), "coarse")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("cifar10", "validation", "5000"),
        ("cifar10", "validation", True),
        ("cifar10", "seed", 1.0),
        ("cifar10", "limit", 10.0),
        ("cifar10", "directory", 5),
        ("cifar10", "download", 1),
        ("cifar100", "coarse", "yes"),
        ("shapes", "train", 1e4),
        ("folder", "size", "32"),
        ("folder", "size", None),
        ("folder", "channels", 3.0),
    ],
)
def test_load_refuses_values_of_another_kind(name, option, value):
    refused(lambda: data.load(name, **{option: value}), f"data {name}: {option}: expected", repr(value))


def test_a_limit_leaves_validation_alone():
    whole = data.load("shapes", train=200, test=20, validation=50)
    part = data.load("shapes", train=200, test=20, validation=50, limit=30)
    assert len(part.train) == 30 and np.bincount(part.train.labels).tolist() == [3] * 10
    assert np.array_equal(part.validation.images, whole.validation.images)
    assert replace(part, note="x").note == "x"
