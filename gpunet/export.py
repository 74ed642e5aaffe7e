"""Trained networks as ONNX files, which other programs run. Knows the layers' formulas in ONNX's words, no backend.

    gpunet.export.onnx(Predictor.load(checkpoint), "net.onnx")

Images go in as gpunet has them, (n, height, width, channels), and are normalised and transposed in the graph, whose own
layout is ONNX's, channels before pixels. Every node has the path of its layer, every constant the weight's name.
"""

import json
import math
from pathlib import Path

import numpy as np

import gpunet
from gpunet import nn
from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole

OPSET, IR = 17, 8  # of 2022, which whatever reads ONNX today should read
INPUT, OUTPUT, PROBABILITIES = "images", "logits", "probabilities"
LIMIT = 2**31 - 2**20  # bytes of a protobuf message, which an ONNX file is


def onnx(model, path, *, batch=None, pixels="uint8"):
    """Write a Predictor or a Step in inference to an ONNX file in float32; return the model as the onnx package has it.

    Input "images": raw pixels 0 to 255, "uint8" or "float32" by `pixels`; of a Step without a source, which knows no
    mean and scale, float32 as its network takes them. Outputs: "logits", the network's, and "probabilities", what
    `Predictor.predict` makes of them, unless the loss has none. batch: images a call, any number by default.
    """
    package = _package()
    if batch is not None and batch < 1:
        raise GpunetError(f"export: batch: expected at least 1, got {batch}")
    if pixels not in ("uint8", "float32"):
        raise GpunetError(f"export: pixels: expected uint8 or float32, got '{pixels}'")
    step, affine, classes, link = _parts(model)
    pixels = pixels if affine else "float32"
    net = _Net(package, {**step.weights, **step.statistics})
    _trace(net, step.graph, _input(net, step.graph, model, affine, pixels), link)
    if (nbytes := sum(value.nbytes for value in net.constants.values())) > LIMIT:
        raise GpunetError(f"{path}: an ONNX file holds at most {LIMIT:,} bytes, this network has {nbytes:,}")
    model = net.model(step.graph, batch, pixels, link, _metadata(step.graph, affine, pixels, classes))
    package.checker.check_model(model, full_check=True)
    write_whole(Path(path), model.SerializeToString())
    return model


def _package():
    try:
        import onnx.checker
    except ImportError:
        raise GpunetError('export: the package onnx is missing: pip install "gpunet[onnx]"') from None
    return onnx


def _parts(model):
    """Return (step, (mean, scale) or None, class names, what makes probabilities of the outputs)."""
    if hasattr(model, "step"):
        return model.step, (model.mean, model.scale), model.classes, model.link
    link = "softmax" if model.loss is None else getattr(model.loss, "link", None)
    return model, (model.source.mean, model.source.scale) if model.source else None, (), link


def _metadata(graph, affine, pixels, classes):
    height, width, channels = graph.input_shape
    what = "raw pixels 0 to 255, normalised inside" if affine else "images as the network takes them, normalised"
    return {
        "gpunet": gpunet.__version__,
        "input": f"{what}; {pixels} (n, {height}, {width}, {channels}): height, width, channels",
        "input_layout": "NHWC",
        "classes": json.dumps(list(classes), ensure_ascii=False),
    }


def _input(net, graph, model, affine, pixels):
    """Add the nodes from the images to what the network takes: preprocessing, then (x - mean) * scale."""
    x, preprocess = INPUT, getattr(model, "preprocess", None)
    if pixels == "uint8":
        x = net.add("Cast", x, name="input/float", to=net.package.TensorProto.FLOAT)
    if preprocess and preprocess.gcn is not None:
        x = _gcn(net, preprocess.gcn, x)
    if preprocess and preprocess.whitening is not None:
        x = _whitening(net, graph.input_shape, preprocess.whitening, x)
    for op, value in zip(("Sub", "Mul"), affine or (), strict=False):
        value = np.asarray(value, np.float64)
        value = value.reshape(graph.input_shape) if value.size == math.prod(graph.input_shape) else value
        x = net.add(op, x, net.constant({"Sub": "input/mean", "Mul": "input/scale"}[op], value), name=f"input/{op}")
    return x


def _gcn(net, gcn, x):
    """scale * (x - mean) / max(epsilon, sqrt(bias + variance)), of each image."""

    def constant(name, value):
        return net.constant(f"input/gcn/{name}", value)

    def mean(x, name):
        return net.add("ReduceMean", x, name=f"input/gcn/{name}", axes=(1, 2, 3), keepdims=1)

    x = net.add("Sub", x, mean(x, "mean"), name="input/gcn/centred")
    variance = mean(net.add("Mul", x, x, name="input/gcn/squared"), "variance")
    variance = net.add("Add", variance, constant("bias", gcn.bias), name="input/gcn/biased")
    deviation = net.add("Sqrt", variance, name="input/gcn/deviation")
    deviation = net.add("Max", deviation, constant("epsilon", gcn.epsilon), name="input/gcn/divisor")
    return net.add("Mul", net.add("Div", x, deviation, name="input/gcn/divided"), constant("scale", gcn.scale),
                   name="input/gcn")  # fmt: skip


def _whitening(net, shape, whitening, x):
    """The images as rows less their mean, times the matrices, plus the mean again for "pca"."""
    mean = net.constant("input/whiten/mean", whitening.mean)
    rows = net.constant("input/whiten/rows", (-1, math.prod(shape)), np.int64)
    x = net.add("Sub", net.add("Reshape", x, rows, name="input/whiten/flat"), mean, name="input/whiten/centred")
    for number, matrix in enumerate(whitening.matrices, 1):
        x = net.add("MatMul", x, net.constant(f"input/whiten/matrix{number}", matrix), name=f"input/whiten/{number}")
    if whitening.kind == "pca":
        x = net.add("Add", x, mean, name="input/whiten/mean_again")
    images = net.constant("input/whiten/images", (-1, *shape), np.int64)
    return net.add("Reshape", x, images, name="input/whiten")


def _trace(net, graph, x, link):
    """Add the nodes from the network's input to the outputs."""
    values = {graph.input: net.add("Transpose", x, name="input/channels_first", perm=(0, 3, 1, 2))}
    for node in graph.nodes:
        form = FORMS.get(type(node.layer))  # a class derived from one may compute anything
        if form is None:
            known = ", ".join(kind.__name__ for kind in FORMS)
            raise GpunetError(f"{node.path}: {type(node.layer).__name__} has no form in ONNX; expected one of {known}")
        values[node] = form(net, node, *(values[i] for i in node.inputs))
    y = values[graph.output]
    if len(graph.output_shape) == 3:
        y = net.add("Transpose", y, name="output/channels_last", perm=(0, 2, 3, 1))
    net.add("Identity", y, name="output/logits", output=OUTPUT)
    if link == "softmax":
        net.add("Softmax", OUTPUT, name="output/softmax", output=PROBABILITIES, axis=-1)
    elif link == "sigmoid":
        net.add("Sigmoid", OUTPUT, name="output/sigmoid", output=PROBABILITIES)


class _Net:
    """An ONNX graph in the making: nodes in order, constants by name."""

    def __init__(self, package, tensors):
        self.package, self.tensors = package, tensors
        self.nodes, self.constants = [], {}

    def add(self, op, *inputs, name, output=None, **attributes):
        """Add a node, and return the name of its output: "<its own>:output" unless told."""
        output = output or f"{name}:output"
        self.nodes.append(self.package.helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def constant(self, name, value, dtype=np.float32):
        """Return the name of a constant; a weight that is read twice is there once, unless it is laid out otherwise."""
        value, wanted = np.ascontiguousarray(value, dtype), name
        for number in range(2, len(self.constants) + 3):
            if np.array_equal(self.constants.setdefault(name, value), value, equal_nan=value.dtype.kind == "f"):
                return name
            name = f"{wanted}@{number}"
        raise AssertionError(wanted)

    def weight(self, parameter, arrange=None):
        """Return the name of a weight or statistic as a constant, its values arranged by a function."""
        value = self.tensors[parameter.name]
        return self.constant(parameter.name, value if arrange is None else arrange(value))

    def model(self, graph, batch, pixels, link, metadata):
        """Return the finished model."""
        helper, kinds = self.package.helper, self.package.TensorProto
        kind = {"uint8": kinds.UINT8, "float32": kinds.FLOAT}[pixels]
        n = batch or "n"
        outputs = [OUTPUT, PROBABILITIES] if link else [OUTPUT]
        made = helper.make_graph(
            self.nodes,
            "gpunet",
            [helper.make_tensor_value_info(INPUT, kind, [n, *graph.input_shape])],
            [helper.make_tensor_value_info(name, kinds.FLOAT, [n, *graph.output_shape]) for name in outputs],
            [self.package.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(made, opset_imports=opset, ir_version=IR, producer_name="gpunet")
        model.producer_version = gpunet.__version__
        helper.set_model_props(model, metadata)
        return model


# Layers. A form is a function (net, node, inputs...) -> output; shapes stand in the nodes, without the batch.


def _conv(net, node, x):
    layer = node.layer
    inputs = [x, net.weight(layer.parameters["weight"], lambda w: w.transpose(3, 2, 0, 1))]
    if layer.bias:
        inputs.append(net.weight(layer.parameters["bias"]))
    return net.add(
        "Conv", *inputs, name=node.path, kernel_shape=layer.size, strides=layer.stride, pads=layer.padding * 2,
        dilations=layer.dilation, group=layer.groups,
    )  # fmt: skip


def _conv_transpose(net, node, x):
    layer = node.layer
    inputs = [x, net.weight(layer.parameters["weight"], lambda w: w.transpose(3, 2, 0, 1))]
    if layer.bias:
        inputs.append(net.weight(layer.parameters["bias"]))
    return net.add(
        "ConvTranspose", *inputs, name=node.path, kernel_shape=layer.size, strides=layer.stride,
        pads=layer.padding * 2, dilations=layer.dilation, output_padding=layer.output_padding, group=layer.groups,
    )  # fmt: skip


def _locally_connected(net, node, x):
    """The patches by a convolution that copies, then a product at each place; opset 17 cannot unfold."""
    layer = node.layer
    *_, c, outputs = layer.parameters["weight"].shape
    depth = math.prod(layer.size) * c
    copies = np.eye(depth).reshape(depth, *layer.size, c).transpose(0, 3, 1, 2)
    x = net.add(
        "Conv", x, net.constant(f"{node.path}/copies", copies), name=f"{node.path}/patches", kernel_shape=layer.size,
        strides=layer.stride, pads=layer.padding * 2, dilations=layer.dilation,
    )  # fmt: skip
    x = net.add("Transpose", x, name=f"{node.path}/by_place", perm=(2, 3, 0, 1))
    weight = net.weight(layer.parameters["weight"], lambda w: w.reshape(*node.shape[:2], depth, outputs))
    x = net.add("MatMul", x, weight, name=f"{node.path}/products")
    if layer.bias:
        bias = net.weight(layer.parameters["bias"], lambda b: b.reshape(*node.shape[:2], 1, outputs))
        x = net.add("Add", x, bias, name=f"{node.path}/sum")
    return net.add("Transpose", x, name=node.path, perm=(2, 3, 0, 1))


def _rows_first(node, weight):
    """Return a weight whose rows are in the order in which an image's values lie here, channels first."""
    shape = node.inputs[0].shape
    if len(shape) == 1:
        return weight
    rows = weight.reshape(*shape, node.layer.outputs)
    return rows.transpose(2, 0, 1, 3).reshape(weight.shape)


def _linear(net, node, x, factor=1.0, name=None):
    """Gemm, x @ (factor * weight) + bias."""
    layer = node.layer
    if len(node.inputs[0].shape) == 3:
        x = net.add("Flatten", x, name=f"{node.path}/flatten")
    inputs = [x, net.weight(layer.parameters["weight"], lambda w: factor * _rows_first(node, w))]
    if layer.bias:
        inputs.append(net.weight(layer.parameters["bias"]))
    return net.add("Gemm", *inputs, name=name or node.path)


def _batchnorm(net, node, x, name=None):
    given = [net.weight(node.layer.parameters[key]) for key in ("gamma", "beta", "mean", "variance")]
    return net.add("BatchNormalization", x, *given, name=name or node.path, epsilon=node.layer.eps)


def _batchnorm_relu(net, node, x, *residual):
    """The fused layers, taken apart again."""
    x = _batchnorm(net, node, x, f"{node.path}/norm")
    if residual:
        x = net.add("Add", x, *residual, name=f"{node.path}/add")
    return net.add("Relu", x, name=node.path)


def _activation(op):
    return lambda net, node, x: net.add(op, x, name=node.path)


def _leaky_relu(net, node, x):
    return net.add("LeakyRelu", x, name=node.path, alpha=node.layer.scalars[0])


def _gelu(net, node, x):
    """x * (1 + erf(x / sqrt 2)) / 2; opset 17 has no Gelu yet."""
    y = net.add("Mul", x, net.constant("gelu/root", 0.5**0.5), name=f"{node.path}/scaled")
    y = net.add("Erf", y, name=f"{node.path}/erf")
    y = net.add("Add", y, net.constant("gelu/one", 1), name=f"{node.path}/sum")
    half = net.add("Mul", x, net.constant("gelu/half", 0.5), name=f"{node.path}/half")
    return net.add("Mul", half, y, name=node.path)


def _silu(net, node, x):
    return net.add("Mul", x, net.add("Sigmoid", x, name=f"{node.path}/sigmoid"), name=node.path)


def _elu(net, node, x):
    return net.add("Elu", x, name=node.path, alpha=float(node.layer.scalars[0]))


def _softmax(net, node, x):
    return net.add("Softmax", x, name=node.path, axis=1)


def _prelu(net, node, x):
    """The slopes in a shape that channels before pixels broadcast with."""
    ones = (1,) * (len(node.shape) - 1)
    slope = net.weight(node.layer.parameters["slope"], lambda s: s.reshape(-1, *ones))
    return net.add("PRelu", x, slope, name=node.path)


def _maxout(net, node, x):
    """ReduceMax over an axis of the pieces, which divides the channels."""
    *pixels, c = node.shape
    shape = net.constant(f"{node.path}/shape", (0, c, node.layer.pieces, *pixels), np.int64)
    x = net.add("Reshape", x, shape, name=f"{node.path}/pieces")
    return net.add("ReduceMax", x, name=node.path, axes=(2,), keepdims=0)


def _affine(net, node, x, arrange):
    """Multiply by gamma and add beta, each arranged by a function."""
    gamma, beta = (net.weight(node.layer.parameters[key], arrange) for key in ("gamma", "beta"))
    x = net.add("Mul", x, gamma, name=f"{node.path}/scaled")
    return net.add("Add", x, beta, name=node.path)


def _group_norm(net, node, x):
    """InstanceNormalization of each group as one channel, for opset 17 has no GroupNormalization yet."""
    *pixels, c = node.shape
    groups = node.layer.groups
    grouped = net.constant(f"{node.path}/grouped", (0, groups, -1), np.int64)
    back = net.constant(f"{node.path}/back", (0, c, *pixels), np.int64)
    x = net.add("Reshape", x, grouped, name=f"{node.path}/groups")
    plain = net.constant(f"{node.path}/ones", np.ones(groups)), net.constant(f"{node.path}/zeros", np.zeros(groups))
    x = net.add("InstanceNormalization", x, *plain, name=f"{node.path}/norm", epsilon=node.layer.eps)
    x = net.add("Reshape", x, back, name=f"{node.path}/channels")
    return _affine(net, node, x, lambda v: v.reshape(c, *(1 for _ in pixels)))


def _layer_norm(net, node, x):
    """LayerNormalization over all axes of the image, or over the channels as the last axis."""
    channels = node.layer.over == "channels"
    image = len(node.shape) == 3

    def arrange(v):
        return v.reshape(node.shape).transpose(2, 0, 1) if image and not channels else v

    given = [net.weight(node.layer.parameters[key], arrange) for key in ("gamma", "beta")]
    if not (image and channels):
        return net.add("LayerNormalization", x, *given, name=node.path, axis=1, epsilon=node.layer.eps)
    x = net.add("Transpose", x, name=f"{node.path}/channels_last", perm=(0, 2, 3, 1))
    x = net.add("LayerNormalization", x, *given, name=f"{node.path}/norm", axis=-1, epsilon=node.layer.eps)
    return net.add("Transpose", x, name=node.path, perm=(0, 3, 1, 2))


def _dropout(net, node, x):
    """In inference nothing, or the plain form's factor."""
    if node.layer.form == "inverted" or not node.layer.threshold:
        return x
    return net.add("Mul", x, net.constant(f"{node.path}/keep", node.layer.keep), name=node.path)


def _dropconnect(net, node, x):
    """The mean over masks as a Gemm; behind ReLU the closed form, mean * P(z) + s * p(z)."""
    layer = node.layer
    mean = _linear(net, node, x, layer.keep, f"{node.path}/mean" if layer.activation else None)
    if not layer.activation:
        return mean

    def add(op, *inputs, name):
        return net.add(op, *inputs, name=f"{node.path}/{name}")

    if len(node.inputs[0].shape) == 3:
        x = add("Flatten", x, name="rows")
    spread = layer.keep * (1 - layer.keep)
    weight = net.weight(layer.parameters["weight"], lambda w: spread * _rows_first(node, w) ** 2)
    variance = add("MatMul", add("Mul", x, x, name="squares"), weight, name="variance")
    tiny, half = net.constant("dropconnect/tiny", 1e-30), net.constant("dropconnect/half", 0.5)
    s = add("Max", add("Sqrt", variance, name="s"), tiny, name="positive")
    z = add("Div", mean, s, name="z")
    root = add("Mul", z, net.constant("dropconnect/root", 0.5**0.5), name="root")
    below = add("Add", add("Mul", add("Erf", root, name="erf"), half, name="halved"), half, name="distribution")
    square = add("Neg", add("Mul", root, root, name="square"), name="negative")
    density = add("Mul", add("Exp", square, name="exp"), net.constant("dropconnect/top", 0.3989422804014327), name="p")
    y = add("Add", add("Mul", mean, below, name="left"), add("Mul", s, density, name="right"), name="sum")
    return net.add("Relu", y, name=node.path)  # rounding alone makes it negative


def _stochastic_pool(net, node, x):
    """Sum of a*a / sum of a as the ratio of two averages over the same pixels, a = max(x, 0)."""
    layer, pads = node.layer, (*node.layer.padding, *_ends(node))
    a = net.add("Relu", x, name=f"{node.path}/activity")
    means = [
        net.add("AveragePool", v, name=f"{node.path}/{name}", kernel_shape=layer.size, strides=layer.stride, pads=pads)
        for name, v in (("mean", a), ("mean_square", net.add("Mul", a, a, name=f"{node.path}/square")))
    ]
    divisor = net.add("Max", means[0], net.constant("pool/tiny", 1e-30), name=f"{node.path}/positive")
    return net.add("Div", means[1], divisor, name=node.path)


def _ends(node):
    """Return how far the last window reaches beyond the lower and right edge of the image, 0 if it ends before.

    With that as explicit padding ONNX's plain rule gives our output's size, so that nothing depends on its ceil_mode,
    which other programs read in more than one way.
    """
    layer, image = node.layer, node.inputs[0].shape
    sizes = zip(node.shape[:2], layer.stride, layer.size, image[:2], layer.padding, strict=True)
    return tuple(max(0, (out - 1) * stride + k - n - pad) for out, stride, k, n, pad in sizes)


def _max_pool(net, node, x):
    layer = node.layer
    pads = (*layer.padding, *_ends(node))
    return net.add("MaxPool", x, name=node.path, kernel_shape=layer.size, strides=layer.stride, pads=pads)


def _avg_pool(net, node, x):
    """The divisor: pixels of the image, or of the padded image, that lie in the window; never beyond the padding."""
    layer, ends = node.layer, _ends(node)
    before = layer.padding
    counts = int(layer.include_pad and any(before))
    if counts and any(end > pad for end, pad in zip(ends, before, strict=True)):
        # A window hangs over the padding, too. So the image is padded first, and then as good as without padding.
        places = net.constant(f"{node.path}/pads", (0, 0, *before, 0, 0, *before), np.int64)
        x = net.add("Pad", x, places, name=f"{node.path}/padded")
        ends = tuple(max(0, end - pad) for end, pad in zip(ends, before, strict=True))
        before, counts = (0, 0), 0
    return net.add(
        "AveragePool", x, name=node.path, kernel_shape=layer.size, strides=layer.stride, pads=(*before, *ends),
        count_include_pad=counts,
    )  # fmt: skip


def _lrn(net, node, x):
    """ONNX has the form across channels; x / (k + alpha * AveragePool(x^2))^beta where padding counts is the other."""
    layer = node.layer
    if layer.region == "across":
        return net.add("LRN", x, name=node.path, size=layer.size, alpha=layer.alpha, beta=layer.beta, bias=layer.k)
    y, half = net.add("Mul", x, x, name=f"{node.path}/square"), layer.size // 2
    y = net.add(
        "AveragePool", y, name=f"{node.path}/mean", kernel_shape=(layer.size,) * 2, pads=(half,) * 4,
        count_include_pad=1,
    )  # fmt: skip
    y = net.add("Mul", y, net.constant(f"{node.path}/alpha", layer.alpha), name=f"{node.path}/scaled")
    y = net.add("Add", y, net.constant(f"{node.path}/k", layer.k), name=f"{node.path}/sum")
    y = net.add("Pow", y, net.constant(f"{node.path}/beta", layer.beta), name=f"{node.path}/power")
    return net.add("Div", x, y, name=node.path)


def _global_avg_pool(net, node, x):
    return net.add("Flatten", net.add("GlobalAveragePool", x, name=f"{node.path}/mean"), name=node.path)


def _scale(net, node, x):
    return net.add("Mul", x, net.constant(f"{node.path}/factor", node.layer.factor), name=node.path)


def _add(net, node, x, *others):
    for number, other in enumerate(others, 1):
        last = number == len(others)
        x = net.add("Add", x, other, name=node.path if last else f"{node.path}/{number}")
    return x


def _concat(net, node, *xs):
    return net.add("Concat", *xs, name=node.path, axis=1)


def _flatten(net, node, x):
    """In gpunet's order: height, width, channel."""
    if len(node.inputs[0].shape) == 3:
        x = net.add("Transpose", x, name=f"{node.path}/channels_last", perm=(0, 2, 3, 1))
    return net.add("Flatten", x, name=node.path)


FORMS = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.DepthwiseConv2d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    nn.LocallyConnected2d: _locally_connected,
    nn.BatchNorm: _batchnorm,
    nn.BatchNormReLU: _batchnorm_relu,
    nn.BatchNormAddReLU: _batchnorm_relu,
    nn.ReLU: _activation("Relu"),
    nn.LeakyReLU: _leaky_relu,
    nn.Sigmoid: _activation("Sigmoid"),
    nn.Tanh: _activation("Tanh"),
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.MaxPool: _max_pool,
    nn.AvgPool: _avg_pool,
    nn.GlobalAvgPool: _global_avg_pool,
    nn.LRN: _lrn,
    nn.ELU: _elu,
    nn.Softplus: _activation("Softplus"),
    nn.Hardswish: _activation("HardSwish"),
    nn.PReLU: _prelu,
    nn.Maxout: _maxout,
    nn.Softmax: _softmax,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.StochasticPool: _stochastic_pool,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.DropConnect: _dropconnect,
    nn.Add: _add,
    nn.Concat: _concat,
    nn.Flatten: _flatten,
    nn.Scale: _scale,
}
