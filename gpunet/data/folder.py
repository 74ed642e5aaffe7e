"""Pictures in folders, DIRECTORY/train/CLASS/*.png and the like, as a DataSet; packed once, then read in one piece.

validation/ and test/ beside train/ are taken as they are where they exist.
"""

import hashlib
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpunet.data.dataset import DataNotFound, DataSet, Split
from gpunet.data.download import cache_folder
from gpunet.data.picture import ENDINGS, prepare_image
from gpunet.errors import GpunetError

FORMAT = 1  # of the packed file and of what prepare_image does; another number, another file
BLOCK = 64  # pictures that one thread prepares in a piece


def load_folder(directory, *, size, channels=3, skip_unreadable=False, cache=True):
    """Return the DataSet of a folder, every picture cut and scaled to `size` (see prepare_image).

    size: (height, width), or a number for both. Unreadable pictures are refused, or left out and noted. The pixels are
    packed into the cache folder, under a key of all paths, sizes and times; where that cannot be written, they are not.
    """
    if channels not in (1, 3):
        raise GpunetError(f"folder: channels: expected 1 or 3, got {channels}")
    root = Path(directory).expanduser()
    size, shape = _size(size), (*_size(size), channels)
    classes, listing = list_pictures(root)
    packed = _packed_path(root, shape, skip_unreadable, listing) if cache else None
    arrays, note = _unpack(packed) if packed else None, ""
    if arrays is None:
        arrays = _prepare(root, listing, size, channels, skip_unreadable)
        note = _pack(packed, arrays) if packed else ""
    left_out = arrays["left_out"].tolist()
    if left_out:
        note = f"{len(left_out)} unreadable pictures left out: {_some(left_out)}" + (f"; {note}" if note else "")
    splits = {name: Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in listing}
    return DataSet("folder", classes, **splits, note=note)


def list_pictures(root):
    """Return (classes, {split: [(path, label)]}) in the order of names; classes are the folders in train/.

    Raises DataNotFound without train/, GpunetError for an empty class or one that train/ does not have.
    """
    folders = {name: root / name for name in ("train", "validation", "test") if (root / name).is_dir()}
    if "train" not in folders:
        raise DataNotFound(f"{root}: expected pictures in {root / 'train'}/CLASS/, found no such folder")
    listing, classes = {}, tuple(p.name for p in _visible(folders["train"]) if p.is_dir())
    for name, folder in folders.items():
        listing[name] = []
        for place in (p for p in _visible(folder) if p.is_dir()):
            if place.name not in classes:
                raise GpunetError(f"{place}: expected a class of train/ ({_some(classes)}), found '{place.name}'")
            files = [p for p in _visible(place) if p.suffix.lower() in ENDINGS]
            if name == "train" and not files:
                raise GpunetError(f"{place}: expected pictures ({' '.join(ENDINGS)}), found none")
            listing[name] += [(file, classes.index(place.name)) for file in files]
        if not listing[name]:
            raise GpunetError(f"{folder}: expected folders of pictures, one a class, found none")
    return classes, listing


def _visible(folder):
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise GpunetError(f"{folder}: cannot be listed: {error.strerror}") from None


def _some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more


def _size(size):
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in pair):
        raise GpunetError(f"folder: size: expected (height, width) from 1 to 4096, got {size!r}")
    return pair


def _prepare(root, listing, size, channels, skip_unreadable):
    """Return {split_images, split_labels, left_out (paths)}; raises GpunetError that lists what cannot be read."""
    arrays, problems = {}, []
    total = sum(map(len, listing.values()))
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=total, desc=f"packing {root}", unit="picture", disable=None) as bar,
    ):
        for name, pictures in listing.items():
            images = _room(root, (len(pictures), *size, channels))
            labels = np.array([label for _, label in pictures], np.int32)
            good = np.ones(len(pictures), bool)

            def work(start, pictures=pictures, images=images, good=good):
                found = []
                for i, (path, _) in enumerate(pictures[start : start + BLOCK], start):
                    try:
                        images[i] = prepare_image(path, size, channels)
                    except GpunetError as error:
                        good[i] = False
                        found.append(str(error))
                bar.update(min(BLOCK, len(pictures) - start))
                return found

            problems += [p for found in pool.map(work, range(0, len(pictures), BLOCK)) for p in found]
            whole = good.all()
            arrays[f"{name}_images"] = images if whole else images[good]
            arrays[f"{name}_labels"] = labels if whole else labels[good]
    if problems and not (skip_unreadable and all(map(len, arrays.values()))):
        raise GpunetError(
            f"{root}: {len(problems)} of {total} pictures are unreadable: {_some(problems)}; repair or remove them "
            f"(`gpunet data check {root}` lists all) or set skip_unreadable"
        )
    arrays["left_out"] = np.array([p.removeprefix(f"{root}{os.sep}") for p in problems], dtype=str)
    return arrays


def _room(root, shape):
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        raise GpunetError(
            f"{root}: {math.prod(shape) / 1e9:.1f} GB of memory needed for {shape[0]} pictures; ask for a smaller size"
        ) from None


def _packed_path(root, shape, skip_unreadable, listing):
    """Return the cache file of exactly these files, sizes, times and this shape."""
    digest = hashlib.sha256(repr((FORMAT, root.resolve(), shape, skip_unreadable)).encode())
    for pictures in listing.values():
        for path, _ in pictures:
            stat = os.stat(path) if os.path.exists(path) else None  # a broken link
            version = stat and (stat.st_size, stat.st_mtime_ns)
            digest.update(f"{path.relative_to(root)}\0{version}\0".encode(errors="surrogateescape"))
    return cache_folder() / "folders" / f"{digest.hexdigest()[:32]}.npz"


def _unpack(packed):
    """Return the arrays of a packed file, None where there is none or it is damaged."""
    try:
        with packed.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except Exception:  # np.load and zipfile raise a dozen kinds; whatever it is, the pictures are still there
        return None


def _pack(packed, arrays):
    """Write the arrays aside and rename; return a note where the disk has no room, "" otherwise.

    A folder that cannot be written is no error: then nothing is kept.
    """
    need = sum(a.nbytes for a in arrays.values()) + 100_000
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(packed.parent).free
        if free < need:
            return f"not packed: {packed.parent} needs {need / 1e6:.0f} MB and has {free / 1e6:.0f} MB"
        handle, aside = tempfile.mkstemp(dir=packed.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(aside, packed)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError:
        pass
    return ""
