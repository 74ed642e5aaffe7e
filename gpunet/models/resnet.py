"""Residual networks for small images."""

from gpunet.errors import GpunetError
from gpunet.nn import Add, BatchNorm, Block, Conv2d, GlobalAvgPool, Graph, Input, Linear, MaxPool, ReLU, Sequential
from gpunet.nn.init import HEAD, he


def conv_bn_relu(width, stride=1, name=None):
    """3x3 convolution without bias, batch normalisation, ReLU."""
    return Sequential(
        Conv2d(width, 3, stride, padding=1, bias=False, name="conv"),
        BatchNorm(name="norm"),
        ReLU(name="relu"),
        name=name,
    )


def pooled_head(classes):
    """The last layer over max-pooled features, which are large: as if its logits were divided by 8 (Page 2019).

    A logit's change in an update grows with the square of the features; at the full rate the loss explodes at first.
    """
    return Linear(classes, weight_init=he("uniform", 1 / 3 / 64), weight_rate=1 / 64, name="head")


class BasicBlock(Block):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, width, stride=1, project=False, name=None):
        super().__init__(name)
        self.width, self.stride, self.project = width, stride, project

    def connect(self, x):
        """Wire body, shortcut, sum."""
        y = conv_bn_relu(self.width, self.stride, "body1")(x)
        y = Conv2d(self.width, 3, bias=False, name="conv2")(y)
        y = BatchNorm(name="norm2")(y)
        if self.project:
            x = Conv2d(self.width, 1, self.stride, padding=0, bias=False, name="project")(x)
            x = BatchNorm(name="project_norm")(x)
        return ReLU(name="relu")(Add(name="add")(y, x))


def resnet(input_shape=(32, 32, 3), classes=10, depth=20, widths=(16, 32, 64)):
    """ResNet-`depth` for CIFAR-10 (He et al. 2016, section 4.2), depth = 6n + 2; 1x1 shortcuts where widths change."""
    if depth < 8 or (depth - 2) % 6:
        raise GpunetError(f"resnet: depth: expected 6n + 2 (20, 32, 44, 56, 110), got {depth}")
    image = Input(input_shape)
    x = conv_bn_relu(widths[0], name="stem")(image)
    for stage, width in enumerate(widths, 1):
        for number in range(1, (depth - 2) // 6 + 1):
            first = number == 1 and stage > 1
            x = BasicBlock(width, 2 if first else 1, project=first, name=f"stage{stage}_block{number}")(x)
    return Graph(image, Linear(classes, weight_init=HEAD, name="head")(GlobalAvgPool()(x)))


class _Residual(Block):
    """x + two convolutions of x."""

    def __init__(self, width, name=None):
        super().__init__(name)
        self.width = width

    def connect(self, x):
        """Wire the two and the sum."""
        y = conv_bn_relu(self.width, name="body1")(x)
        return Add(name="add")(x, conv_bn_relu(self.width, name="body2")(y))


def resnet9(input_shape=(32, 32, 3), classes=10, widths=(64, 128, 256, 512)):
    """ResNet-9 (Page 2019): stem, three stages of conv-BN-ReLU-pool with a residual pair in the first and the third."""
    if len(widths) != 4:
        raise GpunetError(f"resnet9: widths: expected 4, got {widths}")
    image = Input(input_shape)
    x = conv_bn_relu(widths[0], name="stem")(image)
    for stage, width in enumerate(widths[1:], 1):
        layers = [conv_bn_relu(width, name="conv"), MaxPool(2, name="pool")]
        if stage != 2:
            layers.append(_Residual(width, name="residual"))
        x = Sequential(*layers, name=f"stage{stage}")(x)
    x = MaxPool(tuple(max(1, size // 8) for size in input_shape[:2]), name="pool")(x)
    return Graph(image, pooled_head(classes)(x))
