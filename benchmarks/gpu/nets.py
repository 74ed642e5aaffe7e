"""The nets of the GPU report, as gpunet graphs, and the images they are fed with. Knows no backend and no peer."""

from functools import cache, partial

import numpy as np

from gpunet import models
from gpunet.models.resnet import BasicBlock, conv_bn_relu
from gpunet.nn import GELU, BatchNorm, Conv2d, GlobalAvgPool, Graph, Input, Linear, MaxPool, Sequential
from gpunet.nn.init import HEAD

SHAPE, CLASSES = (32, 32, 3), 10
PAD = 4
MEAN, SCALE = 120.0, 1 / 60


def resnet18(widths=(64, 128, 256, 512)):
    """ResNet-18 for small images: 3x3 stem, four stages of two basic blocks, 1x1 shortcuts where the shape changes."""
    image = Input(SHAPE)
    x = conv_bn_relu(widths[0], name="stem")(image)
    for stage, width in enumerate(widths, 1):
        for number in (1, 2):
            changes = stage > 1 and number == 1
            x = BasicBlock(width, 2 if changes else 1, project=changes, name=f"stage{stage}_block{number}")(x)
    return Graph(image, Linear(CLASSES, weight_init=HEAD, name="head")(GlobalAvgPool()(x)))


def airbench(widths=(64, 256, 256), first=24):
    """The structure of airbench94 as far as gpunet has its layers: its first convolution trains, its logits are whole.

    BN scales stay 1. What trains it here is SGD with Nesterov's momentum.
    """

    def conv(width):
        return Conv2d(width, 3, bias=False)

    def norm():
        return BatchNorm(momentum=0.4, eps=1e-12, scale=False)

    image = Input(SHAPE)
    layers = [Conv2d(first, 2, padding=0), GELU()]
    for width in widths:
        layers += [conv(width), MaxPool(2), norm(), GELU(), conv(width), norm(), GELU()]
    layers += [MaxPool(3), Linear(CLASSES, bias=False, weight_init=HEAD, name="head")]
    return Graph(image, Sequential(*layers)(image))


NETS = {
    "resnet9": partial(models.build, "resnet9"),
    "resnet9-narrow": partial(models.build, "resnet9", widths=(32, 64, 128, 256)),
    "resnet18": resnet18,
    "resnet20": partial(models.build, "resnet20"),
    "airbench": airbench,
    "cifar10_quick": partial(models.build, "cifar10_quick"),
}
TINY = {
    "resnet9": {"widths": (4, 4, 8, 8)},
    "resnet9-narrow": {"widths": (2, 2, 4, 4)},
    "resnet18": {"widths": (2, 2, 4, 4)},
    "resnet20": {"widths": (2, 4, 4)},
    "airbench": {"widths": (4, 4, 8), "first": 4},
}


def build(name, tiny=False):
    """Return the graph of a net; tiny: with so few channels that the emulator runs it."""
    return NETS[name](**(TINY.get(name, {}) if tiny else {}))


@cache
def images(count):
    """Return (images, labels): random pixels, some thousand images again and again."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (min(count, 4096), *SHAPE), np.uint8)
    return np.resize(some, (count, *SHAPE)), rng.integers(0, CLASSES, count).astype(np.int32)


def source(count):
    """Return a Source of so many images, cropped and flipped at random."""
    from gpunet.core.source import Source
    from gpunet.data import Split

    pixels, labels = images(count)
    return Source(Split(pixels, labels), [MEAN] * 3, [SCALE] * 3, flip=True, pad=PAD, classes=CLASSES)
