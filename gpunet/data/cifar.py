"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in both published layouts, found on this machine or downloaded.

Reads binary files (rows of label bytes and 3072 bytes in planes R, G, B) and the Python pickles that hold the same.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpunet.data.dataset import DataNotFound, DataSet, Split
from gpunet.data.download import Archive, cache_folder, fetch
from gpunet.data.unpickle import read_pickle
from gpunet.errors import GpunetError

PIXELS = 32 * 32 * 3
URL = "https://www.cs.toronto.edu/~kriz"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Layout:
    """How a set is published: its files, and its kinds of label in the order of a binary row."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    images: dict[str, int]  # split: images in each of its files
    folders: dict[str, str]  # published folder: what its file names end in
    classes: dict[str, tuple[str, ...]]  # kind of label: class names
    archive: Archive


SETS = {
    "cifar10": Layout(
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        images={"train": 10_000, "test": 10_000},
        folders={"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""},
        classes={"labels": tuple(CLASSES.split())},
        archive=Archive(
            f"{URL}/cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            170_498_071,
            "cifar-10-batches-py",
        ),
    ),
    "cifar100": Layout(
        train=("train",),
        test=("test",),
        images={"train": 50_000, "test": 10_000},
        folders={"cifar-100-binary": ".bin", "cifar-100-python": ""},
        classes={"coarse_labels": tuple(COARSE.split()), "fine_labels": tuple(FINE.split())},
        archive=Archive(
            f"{URL}/cifar-100-python.tar.gz",
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            169_001_437,
            "cifar-100-python",
        ),
    ),
}


def load_cifar(name, directory=None, *, coarse=False, download=True):
    """Return the DataSet, train and test as published; coarse: CIFAR-100's 20 superclasses.

    `directory` is then the only place that is looked in; else GPUNET_DATA, the cache folder and the network, in turn.
    """
    layout = SETS[name]
    if coarse and "coarse_labels" not in layout.classes:
        raise GpunetError(f"{name}: coarse: expected false, only cifar100 has coarse labels")
    kind = "coarse_labels" if coarse else list(layout.classes)[-1]
    if directory is not None:
        places = [Path(directory).expanduser()]
    else:
        places = [Path(p).expanduser() for p in (os.environ.get("GPUNET_DATA"),) if p] + [cache_folder()]
    found, looked = find(layout, places), ", ".join(map(str, places))
    if found is None:
        if directory is not None or not download:
            raise DataNotFound(
                f"{name}: not found in {looked}; expected the files {layout.train[0]} ... {layout.test[-1]} (or with "
                f".bin) there or in its subfolder {' or '.join(layout.folders)}"
            )
        target = fetch(layout.archive, cache_folder())
        found = find(layout, [target])
        if found is None:
            raise GpunetError(f"{target}: expected the files of {name}, found others; remove that folder")
    return read(name, *found, kind)


def find(layout, places):
    """Return (folder, ending) of the first complete copy, None where there is no file of it.

    Raises GpunetError where a copy lacks files and no other is complete.
    """
    partial = None
    for place in places:
        for subfolder, ending in layout.folders.items():
            for folder in (place, place / subfolder):
                files = [stem + ending for stem in layout.train + layout.test]
                missing = [file for file in files if not os.path.isfile(folder / file)]
                if not missing:
                    return folder, ending
                if len(missing) < len(files):
                    partial = partial or f"{folder}: missing: {', '.join(missing)}; unpack the archive anew"
    if partial:
        raise GpunetError(partial)
    return None


def read(name, folder, ending, kind):
    """Return the DataSet in a folder with all its files."""
    layout, splits = SETS[name], []
    for stems, images in ((layout.train, layout.images["train"]), (layout.test, layout.images["test"])):
        pixels = np.empty((len(stems), images, 32, 32, 3), np.uint8)
        labels = np.empty((len(stems), images), np.int32)
        for i, stem in enumerate(stems):
            path = folder / (stem + ending)
            try:
                planes, given = (_read_binary if ending else _read_python)(path, layout, images, kind)
            except OSError as error:
                raise GpunetError(f"{path}: cannot be read: {error.strerror or error}") from None
            low, high, top = min(given), max(given), len(layout.classes[kind]) - 1
            if low < 0 or high > top:
                raise GpunetError(f"{path}: {kind}: expected 0 to {top}, got {low} to {high}; fetch it anew")
            labels[i] = given
            pixels[i] = planes.reshape(images, 3, 32, 32).transpose(0, 2, 3, 1)
        splits.append(Split(pixels.reshape(-1, 32, 32, 3), labels.reshape(-1)))
    return DataSet(name, layout.classes[kind], splits[0], test=splits[1])


def _read_binary(path, layout, images, kind):
    """Return (planes uint8 (n, 3072), labels (n,))."""
    kinds = list(layout.classes)
    row, size = len(kinds) + PIXELS, path.stat().st_size
    if size != images * row:
        raise GpunetError(
            f"{path}: expected {images * row} bytes, {images} images of {row}, got {size} ({size / row:.6g} images); "
            f"fetch it anew"
        )
    rows = np.fromfile(path, np.uint8).reshape(images, row)
    return rows[:, len(kinds) :], rows[:, kinds.index(kind)]


def _read_python(path, layout, images, kind):
    """Return (planes uint8 (n, 3072), labels (n,))."""
    size = path.stat().st_size
    if size < images * PIXELS:
        raise GpunetError(f"{path}: expected at least {images * PIXELS} bytes, got {size}; fetch it anew")
    content = read_pickle(path)
    planes, labels = content.get("data"), content.get(kind)
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape != (images, PIXELS):
        got = f"{planes.dtype} {planes.shape}" if isinstance(planes, np.ndarray) else type(planes).__name__
        raise GpunetError(f"{path}: data: expected uint8 ({images}, {PIXELS}), got {got}; fetch it anew")
    if not isinstance(labels, list) or len(labels) != images or not all(type(i) is int for i in labels):
        got = f"{len(labels)} of something" if isinstance(labels, list) else type(labels).__name__
        raise GpunetError(f"{path}: {kind}: expected a list of {images} whole numbers, got {got}; fetch it anew")
    return planes, labels
