"""Alex Krizhevsky's network of cuda-convnet with unshared weights, "layers-conv-local-11pct": 11 % test error."""

from gpunet.nn import LRN, Conv2d, Graph, Input, Linear, LocallyConnected2d, MaxPool, ReLU, Sequential


def cuda_convnet(input_shape=(24, 24, 3), classes=10, bias_rate=2.0, init="published"):
    """cuda-convnet's 11 % network (Krizhevsky 2012): two convolutions with LRN, two locally connected layers, fc.

    It was trained on crops of 24 x 24 of images of 32 x 32 less the mean image. init: "published" for its deviations
    (1e-4, .01, .04, .04, .01), which suit raw pixels; else one for all layers.
    """
    deviations = (1e-4, 0.01, 0.04, 0.04, 0.01)
    inits = [["normal", sd] for sd in deviations] if init == "published" else [init] * len(deviations)

    def weights(number):
        return {"weight_init": inits[number], "bias_rate": bias_rate}

    def norm(number):
        return LRN(9, 0.001, 0.75, 1.0, region="across", name=f"norm{number}")

    image = Input(input_shape)
    net = Sequential(
        Conv2d(64, 5, name="conv1", **weights(0)), ReLU(), MaxPool(3, 2, ceil=True), norm(1),
        Conv2d(64, 5, name="conv2", **weights(1)), ReLU(), norm(2), MaxPool(3, 2, ceil=True),
        LocallyConnected2d(64, 3, name="local3", **weights(2)), ReLU(),
        LocallyConnected2d(32, 3, name="local4", **weights(3)), ReLU(),
        Linear(classes, name="fc10", **weights(4)),
    )  # fmt: skip
    return Graph(image, net(image))
