"""VGG with batch normalisation, its head cut down to one linear layer for small images."""

from gpunet.errors import GpunetError
from gpunet.models.resnet import conv_bn_relu, pooled_head
from gpunet.nn import Dropout, Graph, Input, MaxPool, Sequential

STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(input_shape=(32, 32, 3), classes=10, depth=11, widths=(64, 128, 256, 512, 512), dropout=0.0):
    """VGG-11, 13, 16 or 19 (Simonyan & Zisserman 2015): stages of 3x3 convolutions, each ended by a 2x2 pool."""
    if depth not in STAGES:
        raise GpunetError(f"vgg: depth: expected one of {', '.join(map(str, STAGES))}, got {depth}")
    if len(widths) != 5:
        raise GpunetError(f"vgg: widths: expected 5, one a stage, got {widths}")
    image = x = Input(input_shape)
    for stage, (count, width) in enumerate(zip(STAGES[depth], widths, strict=True), 1):
        convs = [conv_bn_relu(width, name=f"conv{i}") for i in range(1, count + 1)]
        x = Sequential(*convs, MaxPool(2, name="pool"), name=f"stage{stage}")(x)
    if dropout:
        x = Dropout(dropout)(x)
    return Graph(image, pooled_head(classes)(x))
