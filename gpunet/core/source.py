"""A resident data set as the start of a program: which launches turn its next batch into x and targets."""

from dataclasses import dataclass, field

import numpy as np

from gpunet.core import random
from gpunet.core.augmentation import COLOR, COUNT, GEOMETRY, Augmentation, pixel_axes
from gpunet.errors import GpunetError

ORDERS = ("shuffled", "stored", "replacement", "balanced")


@dataclass(eq=False)
class Source:
    """A split that lies on the device, and how a batch is drawn from it.

    x = (pixel - mean) * scale, for training after what `augmentation` says; flip, pad and reflect are short for one
    that crops and flips. `mean` and `scale` have a value a channel or one a pixel and channel (a mean image). Labels
    become dense rows with label smoothing; with `values` in the split the targets are those. window: at most so many
    images lie on the device at a time, and the others are copied there while it computes (gpunet.core.window).

    order: which images an epoch visits, as many as there are. "shuffled": each once; "stored": each once, as they lie;
    "replacement": independent draws; "balanced": each class as often as the others, give or take one, and within a
    class each image as often as the others, give or take one.
    """

    split: object
    mean: object = 0.0
    scale: object = 1.0
    flip: bool = False
    pad: int = 0
    reflect: bool = False
    smoothing: float = 0.0
    classes: int | None = None
    order: str = "shuffled"
    window: int | None = None
    name: str = field(default="train")
    augmentation: Augmentation | None = None

    def __post_init__(self):
        images = self.split.images
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            raise GpunetError(
                f"source {self.name}: images: expected uint8 or float32 of shape (n, h, w, c), "
                f"got {images.dtype} of shape {images.shape}"
            )
        if self.order not in ORDERS:
            raise GpunetError(f"source {self.name}: order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.order == "balanced" and self.labels is None:
            raise GpunetError(
                f"source {self.name}: order: expected labels for 'balanced', got images with values; "
                f"known for these: {', '.join(ORDERS[:-1])}"
            )
        if self.labels is not None and self.classes is None:
            self.classes = int(self.labels.max()) + 1
        if self.augmentation is None:
            self.augmentation = Augmentation(flip=self.flip, crop=self.pad, reflect=self.reflect)
        elif self.flip or self.pad or self.reflect:
            raise GpunetError(f"source {self.name}: flip, pad and reflect: expected none beside an augmentation")
        self._check_augmentation()
        whole = self._affine(self.mean).size > self.shape[2] or self._affine(self.scale).size > self.shape[2]
        self.means, self.scales = (
            np.ascontiguousarray(np.broadcast_to(self._affine(v), self.shape) if whole else self._affine(v)).reshape(-1)
            for v in (self.mean, self.scale)
        )

    def _check_augmentation(self):
        """Raise GpunetError for what these images, or their targets, cannot have done to them."""
        what, images, place = self.augmentation, self.split.images, f"source {self.name}: augmentation"
        channels = images.shape[3]
        if what.colors and images.dtype != np.uint8:
            raise GpunetError(
                f"{place}: brightness, contrast, saturation, hue, lighting: expected pixels 0 to 255 in uint8, "
                f"got {images.dtype} images; leave these out"
            )
        three = [n for n in what.active if n in ("saturation", "hue", "lighting")]
        if three and channels != 3:
            raise GpunetError(f"{place}: {', '.join(three)}: expected images of 3 channels, got {channels}")
        side = min(images.shape[1:3])
        if what.reflect and what.crop >= side:
            raise GpunetError(f"{place}: crop: expected at most {side - 1} with reflect, as the images have {side} "
                              f"pixels, got {what.crop}")  # fmt: skip
        if what.mixes and self.labels is None:
            raise GpunetError(f"{place}: mixup, cutmix: expected labels, got values")
        if (what.mixes or what.alternate) and self.window is not None and self.window < len(images):
            raise GpunetError(
                f"{place}: mixup, cutmix, alternate: expected the whole set on the device, got a window of "
                f"{self.window} of {len(images)} images"
            )

    def _affine(self, value):
        """Return a mean or scale as one value a channel, or one a pixel and channel."""
        value = np.asarray(value, np.float64)
        channels = self.shape[2]
        if not (np.abs(value) <= np.finfo(np.float32).max).all():
            raise GpunetError(f"source {self.name}: mean or scale: expected finite numbers that float32 can hold")
        if value.ndim <= 1 and value.size in (1, channels):
            return np.broadcast_to(value, (channels,))
        if value.size == np.prod(self.shape):
            return value.reshape(self.shape)
        raise GpunetError(
            f"source {self.name}: mean or scale: expected 1, {channels} or {self.shape} values, got shape {value.shape}"
        )

    @property
    def shape(self):
        """Height, width and channels of an image."""
        return self.split.images.shape[1:]

    @property
    def labels(self):
        """Class labels, or None where the targets are values."""
        return self.split.labels

    @property
    def width(self):
        """Columns of the targets."""
        return self.classes if self.labels is not None else self.split.values.shape[1]

    def __len__(self):
        return len(self.split.images)

    def batches(self, batch):
        """Batches of an epoch; the last may be smaller."""
        return -(-len(self) // batch)

    def held(self, batch):
        """Return how many images lie on the device: all, or two halves of whole batches."""
        if self.window is None or self.window >= len(self):
            return len(self)
        half = self.window // 2 // batch * batch
        if not half:
            raise GpunetError(
                f"source {self.name}: window: expected at least two batches of {batch} images, got {self.window}"
            )
        return 2 * half

    def targets(self, wide):
        """Return the labels, or the values, as they lie on the device."""
        return np.ascontiguousarray(
            *((self.labels, np.int32) if self.labels is not None else (self.split.values, wide))
        )

    def normalise(self, images):
        """Return images as the network sees them, without augmentation: float64 (n, h, w, c)."""
        shape = self.shape if self.means.size > self.shape[2] else (self.shape[2],)
        return (images - self.means.reshape(shape)) * self.scales.reshape(shape)

    def arenas(self, wide, batch):
        """Return {name: (shape, dtype, contents)} of what it keeps on the device; images and targets as they are."""
        images, targets, held = self.split.images, self.targets(wide), self.held(batch)
        whole = held == len(self)
        what = self.augmentation
        found = {} if what.plain else {
            "settings": ((COUNT,), np.float64, self._settings),
            "weights": (what.gaussian.shape, np.int32, lambda: what.gaussian),
        }  # fmt: skip
        if self.order == "balanced":
            members, starts = self.members()
            found |= {n: (a.shape, np.int32, lambda a=a: a) for n, a in (("members", members), ("starts", starts))}
        return found | {
            "images": ((held, *images.shape[1:]), images.dtype, (lambda: images) if whole else None),
            "targets": ((held, *targets.shape[1:]), targets.dtype, (lambda: targets) if whole else None),
            "order": ((len(self),), np.int32, None if whole else lambda: np.arange(len(self)) % held),
            "mean": (self.means.shape, wide, lambda: self.means),
            "scale": (self.scales.shape, wide, lambda: self.scales),
        }

    def members(self):
        """Return (images by class and as stored within, where each class that has any begins): int32 (n), (k + 1)."""
        order = np.argsort(self.labels, kind="stable")
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        return order.astype(np.int32), np.append(starts, len(order)).astype(np.int32)

    def images_of(self, seed, epoch):
        """Return the images of an epoch, in order: what the launch of `trace_order` draws, on the host."""
        n = len(self)
        if self.order == "stored":
            return np.arange(n, dtype=np.int32)
        if self.order == "balanced":
            return random.balanced(seed, epoch, *self.members())
        return {"shuffled": random.permutation, "replacement": random.replacement}[self.order](seed, epoch, n)

    def trace_order(self, t, state):
        """Add the launch that draws the epoch's order, or the stored one."""
        order, n = t.arena(f"{self.name}.order"), len(self)
        if self.order == "stored":
            t.launch("order_stored", order, n)
        elif self.order == "balanced":
            members, starts = t.arena(f"{self.name}.members"), t.arena(f"{self.name}.starts")
            t.launch("order_balanced", members, starts, order, t.arena(state), t.seed, n, starts.size - 1)
        else:
            kernel = {"shuffled": "order_draw", "replacement": "order_replacement"}[self.order]
            t.launch(kernel, order, t.arena(state), t.seed, n)

    def trace_batch(self, t, state, nominal, augment):
        """Add the launches that make this share of the batch; return (x, targets).

        `nominal` is the batch size that places are counted by; a place beyond the last image gives zeros
        and targets of NaN, which losses know as padding.
        """
        if augment and not self.augmentation.plain:
            return self._trace_augmented(t, state, nominal)
        n, (h, w, c), share = t.share.size, self.shape, t.share
        x = t.empty((n, h, w, c))
        what = self.augmentation
        pad, flip, reflect = (what.crop, what.mirrors, int(what.reflect)) if augment else (0, 0, 0)
        images, order, mean, scale = (t.arena(f"{self.name}.{a}") for a in ("images", "order", "mean", "scale"))
        sizes = (nominal, self.batches(nominal), share.first, len(self), self.held(nominal))
        t.launch("batch_crop_flip", images, order, t.arena(state), mean, scale, x, t.seed, flip, pad, reflect, *sizes,
                 self.means.size, n, h, w, c, h, w)  # fmt: skip
        targets, given = t.empty((n, self.width)), t.arena(f"{self.name}.targets")
        if self.labels is None:
            t.launch("batch_values", given, order, t.arena(state), targets, *sizes, n, self.width)
        else:
            smoothing = self.smoothing if augment else 0.0
            t.launch("batch_targets", given, order, t.arena(state), targets, smoothing, *sizes, n, self.width)
        return x, targets

    def _settings(self):
        """Return the table that transforms_draw reads; the axes of the colours are those of these images."""
        return self.augmentation.table(pixel_axes(self.split.images) if self.augmentation.lighting else None)

    def _trace_augmented(self, t, state, nominal):
        """Add the launches of a batch that is more than cropped and flipped: draws, one warp, colours and mixing."""
        n, (h, w, c), share, what = t.share.size, self.shape, t.share, self.augmentation
        mix, elastic = int(what.mixes), int(what.elastic > 0)
        slots = n * (1 + mix)  # images, and partners behind them
        images, order, mean, scale, given, settings, weights = (
            t.arena(f"{self.name}.{a}") for a in ("images", "order", "mean", "scale", "targets", "settings", "weights")
        )
        record, batches, held = t.arena(state), self.batches(nominal), self.held(nominal)
        geometry, color = t.empty((slots, len(GEOMETRY)), np.int64), t.empty((slots, len(COLOR)), t.wide)
        rows, field = (t.empty((slots * 2 * h * w if elastic else 1,), np.int32) for _ in range(2))
        t.launch("transforms_draw", order, record, settings, weights, geometry, color, rows, field, t.seed, mix,
                 elastic, weights.size - 1, nominal, batches, share.first, len(self), n, h, w)  # fmt: skip
        warped, x = t.empty((slots, h, w, c), t.wide), t.empty((n, h, w, c))
        t.launch("batch_warp", images, geometry, field, warped, mix, elastic, int(what.reflect), held, n, h, w, c)
        sizes = (self.means.size, n, h, w, c)
        t.launch("batch_finish", warped, geometry, color, mean, scale, x, int(what.colors), mix, *sizes)
        targets = t.empty((n, self.width))
        places = (nominal, batches, share.first, len(self), held, n, self.width)
        if mix:
            t.launch("batch_targets_mixed", given, geometry, color, targets, self.smoothing, held, n, self.width)
        elif self.labels is None:
            t.launch("batch_values", given, order, record, targets, *places)
        else:
            t.launch("batch_targets", given, order, record, targets, self.smoothing, *places)
        return x, targets
