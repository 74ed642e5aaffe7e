"""LeNet-5 in the form in use today."""

from gpunet.nn import Conv2d, Graph, Input, Linear, MaxPool, ReLU, Sequential
from gpunet.nn.init import HEAD


def lenet(input_shape=(32, 32, 3), classes=10):
    """conv5 6, pool, conv5 16, pool, fc 120, fc 84, fc (LeCun et al. 1998, but ReLU and max pooling)."""
    image = Input(input_shape)
    net = Sequential(
        Conv2d(6, 5, padding=0), ReLU(), MaxPool(2),
        Conv2d(16, 5, padding=0), ReLU(), MaxPool(2),
        Linear(120), ReLU(), Linear(84), ReLU(), Linear(classes, weight_init=HEAD, name="head"),
    )  # fmt: skip
    return Graph(image, net(image))
