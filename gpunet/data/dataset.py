"""What a data set is: splits of images with labels or values, checked here once, and how a split is cut in two.

Knows nothing of where images come from and nothing of training.
"""

from dataclasses import dataclass, replace

import numpy as np

from gpunet.core.random import philox, site_of
from gpunet.errors import GpunetError


class DataNotFound(GpunetError):
    """A data set that is neither on this machine nor to be fetched: what a fallback may stand in for."""


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """n images, uint8 or float32 (n, h, w, c), with labels int32 (n,) or values float32 (n, k): one of the two.

    Arrays are C-contiguous. Raises GpunetError where they are not as described.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    values: np.ndarray | None = None

    def __post_init__(self):
        if (self.labels is None) == (self.values is None):
            raise GpunetError("split: expected labels or values, one of the two")
        axes, dtype = (1, np.int32) if self.values is None else (2, np.float32)
        for name, array, ndim, dtypes in (
            ("images", self.images, 4, (np.uint8, np.float32)),
            ("targets", self.targets, axes, (dtype,)),
        ):
            if array.ndim != ndim or array.dtype not in dtypes or not array.flags.c_contiguous:
                kinds = " or ".join(np.dtype(d).name for d in dtypes)
                raise GpunetError(
                    f"split: {name}: expected {kinds} with {ndim} axes, C-contiguous; "
                    f"got {array.dtype} of shape {array.shape}"
                )
        if len(self.images) != len(self.targets) or self.images.size == 0:
            raise GpunetError(
                f"split: expected as many images as targets and at least one, got images {self.images.shape} "
                f"and {len(self.targets)} targets"
            )

    @property
    def targets(self):
        """The labels, or the values where there are no labels."""
        return self.values if self.labels is None else self.labels

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        return f"Split({self.images.dtype} images {self.images.shape}, {self.targets.dtype} {self.targets.shape})"

    def pick(self, index):
        """Return the Split of the images at `index`: a slice, numbers or a mask."""
        pick = [None if a is None else a[index] for a in (self.labels, self.values)]
        return Split(self.images[index], *pick)


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Splits with the same kind of image; `classes` are the names behind the labels, () where targets are values.

    `note` is one line that the user must see ("" for none): a stand-in, images left out.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None = None
    test: Split | None = None
    note: str = ""

    def __post_init__(self):
        first = self.train
        for name, split in self.splits.items():
            place = f"{self.name}: {name}"
            got, expected = ((s.images.dtype.name, *s.images.shape[1:], *s.targets.shape[1:]) for s in (split, first))
            if got != expected or (split.labels is None) != (first.labels is None):
                raise GpunetError(f"{place}: images or targets: expected {expected} as in train, got {got}")
            if split.labels is not None:
                low, high = split.labels.min(), split.labels.max()
                if low < 0 or high >= len(self.classes):
                    raise GpunetError(
                        f"{place}: labels: expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes, "
                        f"got {low} to {high}"
                    )

    @property
    def splits(self):
        """The splits that are there, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    def __repr__(self):
        counts = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        h, w, c = self.train.images.shape[1:]
        kind = f"{len(self.classes)} classes" if self.classes else f"{self.train.values.shape[1]} values an image"
        return f"{self.name}: {counts}; {kind}; {h} x {w} x {c} {self.train.images.dtype}"


def Arrays(x, y, *, validation=0.1, test=None, classes=None, seed=0, layout="NHWC", name="arrays"):
    """Return the user's own arrays as a DataSet.

    x: uint8, or floats, which become float32; (n, h, w, c), grey (n, h, w), or (n, c, h, w) with layout="NCHW".
    y: whole numbers (n,) are labels that count from 0, floats (n, k) are values; test is (x, y) as well, and so may
    validation be; as a number it is held out from x. Classes are named by `classes` or by their number.
    """
    train, held, tests = _split(f"{name}: train", x, y, layout), None, None
    if isinstance(validation, tuple):
        held = _split(f"{name}: validation", *validation, layout)
    if test is not None:
        tests = _split(f"{name}: test", *test, layout)
    classes, note = _class_names(name, [s for s in (train, held, tests) if s is not None], classes)
    dataset = DataSet(name, classes, train, held, tests, note)
    return dataset if held is not None else hold_out(dataset, validation, seed)


def _split(place, x, y, layout):
    """Return a Split of the user's arrays, converted where nothing is lost but float64's digits."""
    x, y = np.asarray(x), np.asarray(y)
    if layout not in ("NHWC", "NCHW"):
        raise GpunetError(f"{place}: layout: expected 'NHWC' or 'NCHW', got {layout!r}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise GpunetError(
            f"{place}: x: expected uint8 or floats, got {x.dtype}; for pixels 0 to 255: x.astype('uint8')"
        )
    if x.ndim not in (3, 4):
        raise GpunetError(f"{place}: x: expected shape (n, h, w, channels) or grey (n, h, w), got {x.shape}")
    if x.ndim == 3:
        x = x[..., None]
    elif layout == "NCHW":
        x = x.transpose(0, 2, 3, 1)
    elif x.shape[1] in (1, 3) and x.shape[2] == x.shape[3] > 4:
        raise GpunetError(
            f"{place}: x: expected channels last, got {x.shape}, which looks like channels first; say layout='NCHW'"
        )
    if y.ndim == 0 or len(y) != len(x):
        raise GpunetError(f"{place}: y: expected as many targets as the {len(x)} images, got shape {y.shape}")
    if x.dtype != np.uint8:
        x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            raise GpunetError(f"{place}: x: expected finite float32 numbers, got NaN or infinity")
    x = np.ascontiguousarray(x)
    if y.ndim == 1 and y.dtype.kind in "iu":
        if len(y) and (y.min() < 0 or y.max() >= 2**31):
            raise GpunetError(f"{place}: y: expected labels from 0 on, got {y.min()} to {y.max()}")
        return Split(x, np.ascontiguousarray(y, np.int32))
    if y.ndim == 2 and y.dtype.kind == "f":
        values = np.ascontiguousarray(y, np.float32)
        if not np.isfinite(values).all():
            raise GpunetError(f"{place}: y: expected finite float32 values, got NaN or infinity")
        return Split(x, values=values)
    raise GpunetError(
        f"{place}: y: expected whole numbers of shape (n,), which are labels, or floats of shape (n, k), which are "
        f"values; got {y.dtype} of shape {y.shape}"
    )


def _class_names(name, splits, classes):
    """Return (names, note): the names given, or the numbers up to the highest label of any split."""
    if splits[0].labels is None:
        if classes is not None:
            raise GpunetError(f"{name}: classes: expected none, because y holds values and not labels")
        return (), ""
    if classes is None:
        count = max(int(s.labels.max()) for s in splits if s.labels is not None) + 1
        if count > 100_000:
            raise GpunetError(f"{name}: y: labels up to {count - 1}: expected class numbers that count from 0")
        classes = map(str, range(count))
    classes = tuple(map(str, classes))
    absent = sorted(set(range(len(classes))) - set(splits[0].labels.tolist()))
    more = "" if len(absent) < 6 else f" and {len(absent) - 5} more"
    names = ", ".join(classes[i] for i in absent[:5]) + more
    return classes, f"no training image of class {names}" if absent else ""


def hold_out(dataset, validation, seed=0):
    """Return the DataSet with `validation` drawn from train, each class by its share; test is not looked at.

    validation: a count, or a share of train when below 1; 0 leaves train whole. Same seed, same images.
    """
    n = len(dataset.train)
    if not 0 <= seed < 2**64:
        raise GpunetError(f"{dataset.name}: seed: expected 0 to 2**64 - 1, got {seed}")
    if not 0 <= validation < n or (validation >= 1 and validation != int(validation)):
        raise GpunetError(
            f"{dataset.name}: validation: expected a count below the {n} training images or a share below 1, "
            f"got {validation}"
        )
    count = int(validation) if validation >= 1 else round(validation * n)
    if count == 0:
        return dataset
    # Sorted random words are a permutation whose bits no NumPy release changes.
    drawn = np.argsort(philox(seed, site_of("data.hold_out"), 0, 0, -(-n // 4))[:n], kind="stable")
    labels = dataset.train.labels
    held = drawn[:count] if labels is None else drawn[_stratified(labels[drawn], count, reserve=1)]
    if len(held) < count:
        raise GpunetError(
            f"{dataset.name}: validation: expected at most {len(held)} images, so that every class keeps one to "
            f"train on, got {count}"
        )
    rest = np.ones(n, bool)
    rest[held] = False
    train = dataset.train
    return replace(dataset, train=train.pick(rest), validation=train.pick(np.sort(held)))


def subset(split, n):
    """Return the first n images of a Split, of each class the first by its share; the whole Split if it has no more."""
    if n < 1:
        raise GpunetError(f"limit: expected at least 1 image, got {n}")
    if n >= len(split):
        return split
    return split.pick(slice(n) if split.labels is None else np.sort(_stratified(split.labels, n)))


def _stratified(labels, n, reserve=0):
    """Return n places, of each class the first n * count / total (largest remainders first), leaving `reserve` of each.

    Fewer than n where the reserve does not allow more.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota, remainder = np.divmod(n * counts, len(labels))
    order = np.argsort(-remainder, kind="stable")
    order = order[(quota + reserve < counts)[order]]
    quota[order[: n - quota.sum()]] += 1
    by_class = np.argsort(inverse, kind="stable")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.flatnonzero(rank < quota[inverse])
