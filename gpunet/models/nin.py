"""Network in Network: 1x1 convolutions between the wide ones, and class maps that are averaged."""

from gpunet.nn import AvgPool, Conv2d, Dropout, GlobalAvgPool, Graph, Input, MaxPool, ReLU, Sequential


def nin(input_shape=(32, 32, 3), classes=10, dropout=0.5, bias_rate=2.0, init="he"):
    """Network in Network for CIFAR-10 (Lin et al. 2014), sized as its published Caffe form: 966,986 parameters.

    Three blocks of a convolution and two of 1x1, pooled 3/2 by Caffe's ceil rule; the last has a map a class. That form
    has a ReLU behind the class maps, too, under which all logits may die at once, and init ["normal", 0.05].
    """

    def block(number, size, *widths):
        layers = []
        for i, width in enumerate(widths, 1):
            k = size if i == 1 else 1
            layers.append(Conv2d(width, k, weight_init=init, bias_rate=bias_rate, name=f"conv{i}"))
            layers.append(ReLU(name=f"relu{i}"))
        return Sequential(*layers[: -1 if number == 3 else None], name=f"block{number}")

    image = Input(input_shape)
    net = Sequential(
        block(1, 5, 192, 160, 96), MaxPool(3, 2, ceil=True, name="pool1"), Dropout(dropout, name="dropout1"),
        block(2, 5, 192, 192, 192), AvgPool(3, 2, ceil=True, name="pool2"), Dropout(dropout, name="dropout2"),
        block(3, 3, 192, 192, classes), GlobalAvgPool(name="pool3"),
    )  # fmt: skip
    return Graph(image, net(image))
