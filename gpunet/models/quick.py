"""Caffe's two networks for CIFAR-10, meant for a mean image subtracted from pixels of 0 to 255."""

from gpunet.nn import LRN, AvgPool, Conv2d, Graph, Input, Linear, MaxPool, ReLU, Sequential


def cifar10_quick(input_shape=(32, 32, 3), classes=10, bias_rate=2.0, init="caffe"):
    """Three 5x5 convolutions, each pooled 3/2 by Caffe's ceil rule, and two linear layers: 145,578 parameters.

    init: "caffe" for the published deviations (1e-4, .01, .01, .1, .1), which suit raw pixels; else one for all layers.
    """
    deviations = (1e-4, 0.01, 0.01, 0.1, 0.1)
    inits = [["normal", sd] for sd in deviations] if init == "caffe" else [init] * len(deviations)

    def conv(width, number):
        return Conv2d(width, 5, weight_init=inits[number - 1], bias_rate=bias_rate, name=f"conv{number}")

    def fc(width, number):
        return Linear(width, weight_init=inits[number + 2], bias_rate=bias_rate, name=f"ip{number}")

    image = Input(input_shape)
    net = Sequential(
        conv(32, 1), MaxPool(3, 2, ceil=True), ReLU(),
        conv(32, 2), ReLU(), AvgPool(3, 2, ceil=True),
        conv(64, 3), ReLU(), AvgPool(3, 2, ceil=True),
        fc(64, 1), fc(classes, 2),
    )  # fmt: skip
    return Graph(image, net(image))


def cifar10_full(input_shape=(32, 32, 3), classes=10, init="caffe"):
    """Three 5x5 convolutions, two of them with local response normalisation, and one linear layer: 89,578 parameters.

    As published: biases at twice the rate, but for the third convolution's; the linear layer's weights decay 250 times
    as fast, its bias not at all. init: "caffe" for the published deviations (1e-4, .01, .01, .01), which suit raw
    pixels; else one for all layers.
    """
    inits = [["normal", sd] if init == "caffe" else init for sd in (1e-4, 0.01, 0.01, 0.01)]

    def conv(width, number, bias_rate=2.0):
        return Conv2d(width, 5, weight_init=inits[number - 1], bias_rate=bias_rate, name=f"conv{number}")

    def norm(number):
        return LRN(3, 5e-5, 0.75, region="within", name=f"norm{number}")

    image = Input(input_shape)
    net = Sequential(
        conv(32, 1), MaxPool(3, 2, ceil=True), ReLU(), norm(1),
        conv(32, 2), ReLU(), AvgPool(3, 2, ceil=True), norm(2),
        conv(64, 3, 1.0), ReLU(), AvgPool(3, 2, ceil=True),
        Linear(classes, weight_init=inits[3], weight_decay=250.0, bias_rate=2.0, bias_decay=0.0, name="ip1"),
    )  # fmt: skip
    return Graph(image, net(image))
