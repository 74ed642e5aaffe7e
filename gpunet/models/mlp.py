"""Fully connected networks."""

from gpunet.nn import Flatten, Graph, Input, Linear, ReLU, Sequential
from gpunet.nn.init import HEAD


def mlp(input_shape=(32, 32, 3), classes=10, hidden=(256,)):
    """Flatten, then one Linear + ReLU a hidden width, then Linear."""
    image = Input(input_shape)
    layers = [layer for width in hidden for layer in (Linear(width), ReLU())]
    return Graph(image, Sequential(Flatten(), *layers, Linear(classes, weight_init=HEAD, name="head"))(image))
