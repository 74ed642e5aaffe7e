"""What a recipe's augmentation does to real images: the contact sheet of every transform."""

from textwrap import wrap

import numpy as np

from gpunet.core.augmentation import AUGMENTATIONS, Augmentation
from gpunet.core.batches import Batches
from gpunet.core.source import Source
from gpunet.data.sheet import rows_sheet
from gpunet.errors import GpunetError

ORIGINALS, DRAWS = 2, 5  # images a row, and how often each is drawn
WIDTH = 44  # letters of a caption's line
WARPS = ("reflect", "interpolation", "warp_probability")
BESIDE = {  # settings that change what a transform looks like: shown with it where a recipe has them
    "crop": ("reflect",),
    "interpolation": ("rotate", "reflect"),
    "elastic": ("elastic_sigma", *WARPS),
    **dict.fromkeys(("rescale", "rotate", "shear", "stretch", "zoom", "lens"), WARPS),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "lighting"), ("color_probability",)),
    "cutout": ("cutout_probability",),
    **dict.fromkeys(("mixup", "cutmix"), ("mix_probability",)),
}


def augmentation_sheet(split, recipe, classes=None, seed=0):
    """Return (a Pillow image, [what was left out and why]): a row a transform on the split's first images.

    recipe: an Augmentation, whose settings are shown; what it leaves alone is shown with an example's.
    """
    rows, captions, left_out = [], [], []
    mean = split.images[:1000].mean(axis=(0, 1, 2), dtype=np.float64)
    for name in AUGMENTATIONS:
        keys = shown(name, recipe)
        try:
            rows.append(_row(split, Augmentation(**keys), mean, classes, seed))
        except GpunetError as error:
            left_out.append(f"{name} is left out: {error}")
            continue
        note = "as in this recipe" if name in recipe.active else "an example: not in this recipe"
        said = ", ".join(f"{key} = {_text(value)}" for key, value in keys.items())
        captions.append((name, *wrap(said, WIDTH), note))
    rows.append(_row(split, recipe, mean, classes, seed))
    captions.append(("all of this recipe", *(wrap(", ".join(recipe.active), WIDTH) or ["nothing"])))
    some = split.images[:ORIGINALS]
    limits = (0, 255) if some.dtype == np.uint8 else (some.min(), some.max())
    heads = ["original", *[f"draw {i + 1}" for i in range(DRAWS)]] * ORIGINALS
    return rows_sheet(rows, captions, heads, limits), left_out


def shown(name, recipe):
    """Return the keys of an Augmentation that does this alone: as the recipe has it, or an example."""
    keys = dict(AUGMENTATIONS[name].example)
    if name in recipe.active:
        set_here = {key: getattr(recipe, key) for key in BESIDE.get(name, ())}
        keys |= {name: getattr(recipe, name), **{k: v for k, v in set_here.items() if v != getattr(Augmentation, k)}}
    return keys


def _row(split, what, mean, classes, seed):
    """Return pictures: each original, then it as it is in one epoch after another."""
    source = Source(split, mean=mean, classes=classes, order="stored", augmentation=what)
    plain = Source(split, mean=mean, classes=classes, order="stored")
    drawn = _first(source, seed, range(DRAWS))
    originals = _first(plain, seed, [0])
    every = np.concatenate([originals, drawn]) + mean  # (1 + draws, originals, h, w, c)
    return every.swapaxes(0, 1).reshape(-1, *every.shape[2:])


def _first(source, seed, epochs):
    """Return the first images of a source in these epochs."""
    batches = Batches(source, min(ORIGINALS, len(source)), seed=seed)
    return np.stack([batches.read(epoch * len(batches))[0] for epoch in epochs])


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)
