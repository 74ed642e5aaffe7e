"""The networks of Keller Jordan's CIFAR-10 speedruns ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024)."""

from gpunet.errors import GpunetError
from gpunet.nn import GELU, BatchNorm, Conv2d, Graph, Input, Linear, MaxPool, Scale, Sequential
from gpunet.nn.init import HEAD


def airbench94(
    input_shape=(32, 32, 3),
    classes=10,
    widths=(64, 256, 256),
    init=("dirac", 1, "he"),
    whitening_init="he",
    scale=1 / 9,
):
    """airbench94: a frozen 2x2 whitening convolution, then three groups of two 3x3 convolutions: 1,971,640 weights.

    The first has two filters for each of the 4 * channels directions of a 2x2 patch; these 288 weights stay, its bias
    trains. Batch normalisation trains no scale. Logits are multiplied by `scale`. init: of the 3x3 convolutions.
    In a recipe `[init]` with `whiten = ["whitening", 5e-4]` finds the first ones in the training images.
    """
    if len(widths) != 3:
        raise GpunetError(f"airbench94: widths: expected 3, got {widths}")

    def norm(name):
        return BatchNorm(0.4, eps=1e-12, scale=False, name=name)

    def conv(width, name):
        return Conv2d(width, 3, bias=False, weight_init=init, name=name)

    def group(width, number):
        return Sequential(
            conv(width, "conv1"), MaxPool(2, name="pool"), norm("norm1"), GELU(name="gelu1"),
            conv(width, "conv2"), norm("norm2"), GELU(name="gelu2"), name=f"group{number}",
        )  # fmt: skip

    image = Input(input_shape)
    whiten = Conv2d(8 * input_shape[2], 2, padding=0, weight_init=whitening_init, name="whiten")
    x = GELU(name="whiten_gelu")(whiten(image))
    for number, width in enumerate(widths, 1):
        x = group(width, number)(x)
    x = Linear(classes, bias=False, weight_init=HEAD, name="head")(MaxPool(3, name="pool")(x))
    graph = Graph(image, Scale(scale, name="scale")(x))
    whiten.parameters["weight"].frozen = True
    return graph
