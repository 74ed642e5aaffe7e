"""Data sets by name and the user's own: splits of uint8 images with labels, drawn once and checked at the door.

`load` gives CIFAR-10, CIFAR-100, folders of pictures and the synthetic `shapes`; `Arrays` takes what you have.
"""

import inspect
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path

from gpunet.core.augmentation import AUGMENTATIONS, Augmentation
from gpunet.data.cifar import load_cifar
from gpunet.data.dataset import Arrays, DataNotFound, DataSet, Split, hold_out, subset
from gpunet.data.folder import load_folder
from gpunet.data.picture import open_image, prepare_image
from gpunet.data.shapes import load_shapes
from gpunet.data.sheet import Report, captioned_sheet, check, contact_sheet, preprocess_sheet
from gpunet.data.statistics import channel_statistics, mean_image
from gpunet.errors import GpunetError

__all__ = [
    "AUGMENTATIONS",
    "Arrays",
    "Augmentation",
    "DataNotFound",
    "DataSet",
    "Report",
    "Split",
    "captioned_sheet",
    "channel_statistics",
    "check",
    "contact_sheet",
    "hold_out",
    "load",
    "mean_image",
    "open_image",
    "prepare_image",
    "preprocess_sheet",
    "subset",
]

LOADERS = {"cifar10": load_cifar, "cifar100": load_cifar, "folder": load_folder, "shapes": load_shapes}
BOOL, WHOLE = ("true or false", bool), ("a whole number", Integral)
# What the arguments of `load` must be: in words, then in types.
KINDS = {
    "fallback": ("'shapes' or none", str, type(None)),
    "directory": ("a path", str, Path, type(None)),
    "validation": ("a number", Real),
    "limit": (*WHOLE, type(None)),
    "size": ("a whole number or two of them", Integral, list, tuple),
    **dict.fromkeys(("seed", "train", "test", "channels"), WHOLE),
    **dict.fromkeys(("coarse", "download", "skip_unreadable", "cache"), BOOL),
}

COMMON = ("directory", "validation", "seed", "fallback", "limit")  # those that all sets have


def load(name, directory=None, validation=0.1, seed=0, fallback=None, *, limit=None, **options):
    """Return the DataSet `name`: cifar10, cifar100, folder or shapes; `options` are its loader's keywords.

    `validation` images (a count, or a share below 1) are held out from train, drawn by class and `seed`; a folder's own
    validation/ is taken instead. test is never looked at. limit: keep this many of the remaining training images.
    fallback="shapes" stands in for a set that is neither here nor to be fetched, with at most a tenth held out; `note`
    then says why. Where a directory was given, that is an error all the same.
    """
    if name not in LOADERS:
        raise GpunetError(f"data: name: expected {', '.join(LOADERS)}, got {name!r}")
    if fallback not in (None, "shapes"):
        raise GpunetError(f"data: fallback: expected 'shapes' or none, got {fallback!r}")
    check_arguments(name, **options, directory=directory, validation=validation, seed=seed, limit=limit)
    try:
        dataset = _load(name, directory, seed, options)
    except DataNotFound as error:
        if fallback is None or directory is not None:  # a folder that was named is not stood in for
            raise
        dataset = load_shapes(seed=seed)
        dataset = replace(dataset, note=f"shapes, a synthetic stand-in for {name}: {error}")
        validation = min(validation, len(dataset.train) // 10)
    if dataset.validation is None:
        dataset = hold_out(dataset, validation, seed)
    return dataset if limit is None else replace(dataset, train=subset(dataset.train, limit))


def check_arguments(name, /, **given):
    """Refuse arguments of `load` that the loader `name` does not have, and values of another kind."""
    parameters = inspect.signature(LOADERS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in COMMON]
    for option, value in given.items():
        if option not in known and option not in COMMON:
            raise GpunetError(f"data {name}: unknown option {option!r}; known: {', '.join(known)}")
        words, *kinds = KINDS[option]
        if not isinstance(value, tuple(kinds)) or isinstance(value, bool) != (kinds == [bool]):
            raise GpunetError(f"data {name}: {option}: expected {words}, got {value!r}")


def _load(name, directory, seed, options):
    if name == "shapes":
        if directory is not None:
            raise GpunetError(f"data shapes: directory: expected none, shapes is drawn and not read; got {directory}")
        return load_shapes(seed=seed, **options)
    if name == "folder":
        if directory is None or "size" not in options:
            raise GpunetError("data folder: expected a directory and a size, (height, width) of the pictures")
        return load_folder(directory, **options)
    return load_cifar(name, directory, **options)
