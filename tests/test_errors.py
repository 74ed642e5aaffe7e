"""What a mistake says: place, what was expected, what came, and from whom."""

from contextlib import closing

import numpy as np
import pytest

from gpunet import nn
from gpunet.core import sources
from gpunet.core.backend import Types, check_launch
from gpunet.core.source import Source
from gpunet.core.state import STATE
from gpunet.core.step import Step
from gpunet.core.trace import Base, Share, Tensor, Trace
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.nn import (
    Add,
    AvgPool,
    Concat,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Graph,
    Input,
    LeakyReLU,
    Linear,
    MaxPool,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    init,
)  # fmt: skip
from gpunet.optim.sgd import SGD

# Shapes that do not fit: the layer's path, expected, got, the producer


def at(*layers):
    """Chain layers in a block `net` on an image (8, 6, 4)."""
    image = Input((8, 6, 4))
    return Graph(image, Sequential(*layers, name="net")(image))


SHAPES = [
    (
        lambda: at(ReLU(name="act"), Conv2d(6, 3, groups=3, name="conv")),
        "net.conv: expected channels that 3 groups divide, got 4 from net.act of shape (8, 6, 4)",
    ),
    (
        lambda: at(MaxPool(4, name="pool"), Conv2d(6, 3, padding=0, name="conv")),
        "net.conv: expected an input of at least 3 pixels, got 2 from net.pool of shape (2, 1, 4)",
    ),
    (
        lambda: at(Conv2d(6, (1, 9), padding=0, name="conv")),
        "net.conv: expected an input of at least 9 pixels, got 6 from input of shape (8, 6, 4)",
    ),
    (
        lambda: at(AvgPool((3, 7), name="pool")),
        "net.pool: expected an input of at least 7 pixels, got 6 from input of shape (8, 6, 4)",
    ),
    (
        lambda: at(Linear(5, name="fc"), Conv2d(6, 3, name="conv")),
        "net.conv: expected an input of shape (height, width, channels), got (5,) from net.fc of shape (5,)",
    ),
    (
        lambda: at(Flatten(name="flat"), GlobalAvgPool(name="mean")),
        "net.mean: expected an input of shape (height, width, channels), got (192,) from net.flat of shape (192,)",
    ),
]


@pytest.mark.parametrize(("build", "message"), SHAPES)
def test_shapes_that_do_not_fit(build, message):
    with pytest.raises(GpunetError) as error:
        build()
    assert str(error.value) == message


def test_inputs_that_do_not_fit_each_other():
    image = Input((8, 6, 4))
    conv, pool = Conv2d(3, 3, name="conv")(image), MaxPool(2, name="pool")(image)
    with pytest.raises(GpunetError) as error:
        Graph(image, Add(name="sum")(image, conv))
    assert str(error.value) == (
        "sum: expected two or more inputs of one shape, got (8, 6, 4), (8, 6, 3) "
        "from input of shape (8, 6, 4) and conv of shape (8, 6, 3)"
    )
    with pytest.raises(GpunetError) as error:
        Graph(image, Concat(name="join")(conv, pool))
    assert str(error.value) == (
        "join: expected inputs that differ in channels only, got (8, 6, 3), (4, 3, 4) "
        "from conv of shape (8, 6, 3) and pool of shape (4, 3, 4)"
    )


def test_a_shared_layer_keeps_its_size():
    image = Input((8, 6, 4))
    fc, conv = Linear(4, name="fc"), Conv2d(3, 3, name="conv")
    with pytest.raises(GpunetError, match=r"^fc@2: expected 192 inputs, as at its first call, got 4 from fc of shape"):
        Graph(image, fc(fc(image)))
    with pytest.raises(GpunetError, match=r"^conv@2: expected 4 input channels, as at its first call, got x of shape"):
        Graph(image, conv(conv(image)))


ARGUMENTS = [
    (lambda: Conv2d(4, 2), "Conv2d: padding 'same' needs an odd size, got (2, 2)"),
    (lambda: Conv2d(4, (3, 3, 3)), "Conv2d: size: expected one or two whole numbers, got (3, 3, 3)"),
    (lambda: Conv2d(4, 3, padding=-1), "Conv2d: padding: expected one or two whole numbers, got -1"),
    (lambda: Conv2d(4, 3, stride=1.5), "Conv2d: stride: expected one or two whole numbers, got 1.5"),
    (lambda: Conv2d(4, 3, stride=0), "Conv2d: expected outputs, size, stride, dilation, groups of at least 1"),
    (lambda: Conv2d(4, 3, groups=3), "Conv2d: expected outputs, size"),
    (lambda: Conv2d(4, 3, weight_init="hee"), "init: expected one of normal, truncated_normal,"),
    (lambda: MaxPool(2, padding=2), "pool: expected size and stride of at least 1 and padding of at most half"),
    (lambda: AvgPool(2.0), "pool: size: expected one or two whole numbers, got 2.0"),
    (lambda: Dropout(1.0), "Dropout: rate: expected 0 <= rate < 1, got 1.0"),
    (lambda: LeakyReLU(-0.1), "LeakyReLU: slope: expected 0 or more, got -0.1"),
    (lambda: init.he("gauss"), "init: distribution: expected 'normal' or 'uniform', got 'gauss'"),
    (lambda: SGD(-1), "SGD: lr: expected 0 or more, got -1"),
    (lambda: SGD(1, form="keras"), "SGD: form: expected 'pytorch' or 'caffe', got 'keras'"),
]


@pytest.mark.parametrize(("make", "message"), ARGUMENTS)
def test_arguments_of_layers(make, message):
    with pytest.raises(GpunetError) as error:
        make()
    assert str(error.value).startswith(message)


# The door of every launch

FLOAT = Types.of("float32")
PLACE = "stage1.act"


def tensor(*shape, dtype="float32"):
    return Tensor(Base(0), shape, np.dtype(dtype))


DOOR = [
    ("relu_forward", (tensor(6), tensor(6)), "relu_forward: expected 3 arguments (x, y, n), got 2"),
    ("relu_forward", (tensor(6), tensor(6), 6, 1), "relu_forward: expected 3 arguments (x, y, n), got 4"),
    ("relu_forward", (tensor(6, dtype="f8"), tensor(6), 6), "relu_forward: x: expected float32, got float64"),
    ("relu_forward", (tensor(6), tensor(6, dtype="i4"), 6), "relu_forward: y: expected float32, got int32"),
    (
        "relu_forward",
        (tensor(2, 3), tensor(2, 3).T, 6),
        "relu_forward: y: expected a contiguous tensor, got strides (1, 3) for shape (3, 2)",
    ),
    (
        "relu_forward",
        (tensor(2, 3), tensor(2, 4), 6),
        "relu_forward: y: expected n = 6 elements, got 8 (shape (2, 4))",
    ),
    (
        "column_sum",
        (tensor(4, 3), tensor(2, 2), 4, 3, 2),
        "column_sum: sums: expected parts*c = 6 elements, got 4 (shape (2, 2))",
    ),
    ("relu_forward", (tensor(6), 7, 6), "relu_forward: y: expected a tensor, got int 7"),
    ("relu_forward", (np.zeros(6, "f4"), tensor(6), 6), "relu_forward: x: expected a tensor, got ndarray"),
    ("relu_forward", (tensor(6), tensor(6), tensor(6)), "relu_forward: n: expected a number of type long long, got"),
    ("relu_forward", (tensor(6), tensor(6), "6"), "relu_forward: n: expected a number of type long long, got str"),
    ("relu_forward", (tensor(6), tensor(6), None), "relu_forward: n: expected a number of type long long, got None"),
    ("relu_forward", (tensor(6), tensor(6), 6.5), f"relu_forward: n: expected long long in [{-(2**63)}, {2**63 - 1}]"),
    ("relu_forward", (tensor(6), tensor(6), float("nan")), "relu_forward: n: expected long long in"),
    ("relu_forward", (tensor(6), tensor(6), float("inf")), "relu_forward: n: expected long long in"),
    ("sum_parts", (tensor(6), tensor(6), 0, 1, 2**31), f"sum_parts: n: expected int in [{-(2**31)}, {2**31 - 1}], got"),
    (
        "order_draw",
        (tensor(6, dtype="i4"), tensor(dtype=STATE), -1, 6),
        f"order_draw: seed: expected unsigned long long in [0, {2**64 - 1}], got -1",
    ),
    ("state_update", (tensor(1),), "state_update: state: expected "),
    ("maxpool_forward", (tensor(4, dtype="u1"),) * 2, "maxpool_forward: expected 15 arguments (x, y, index, n, h,"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), DOOR)
def test_the_door_names_place_kernel_and_argument(name, arguments, message):
    with pytest.raises(GpunetError) as error:
        check_launch(sources.kernels()[name], arguments, FLOAT, PLACE)
    assert str(error.value).startswith(f"{PLACE}: {message}")


def test_the_door_casts_numbers():
    kernel = sources.kernels()["leaky_relu_forward"]
    for n in (6, np.int32(6), np.float64(6), 6.0):
        *_, slope, got = check_launch(kernel, (tensor(6), tensor(6), np.float64(0.1), n), FLOAT, PLACE)
        assert (type(got), got, type(slope), slope) == (int, 6, float, float(np.float32(0.1)))
    *_, slope, _ = check_launch(kernel, (tensor(6, dtype="f8"),) * 2 + (0.1, 6), Types.of("float64"), PLACE)
    assert slope == 0.1


def test_pixels_are_bytes_or_floats_in_every_program():
    kernel = sources.kernels()["batch_crop_flip"]
    pixels = kernel.arguments[0]
    assert pixels.type == "pixel"
    for dtype, fits in (("u1", True), ("f4", True), ("f8", False)):
        given = (tensor(1, 1, 1, 1, dtype=dtype), tensor(1, dtype="i4"), tensor(1, dtype=STATE), tensor(1), tensor(1))
        numbers = (0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1)
        if fits:
            check_launch(kernel, (*given, tensor(1), *numbers), FLOAT, PLACE)
        else:
            with pytest.raises(GpunetError, match="images: expected uint8 or float32, got float64"):
                check_launch(kernel, (*given, tensor(1), *numbers), FLOAT, PLACE)


def trace():
    t = Trace(FLOAT, Share(2, 0, 2), {}, {}, training=True, engine="unfold")
    t.path = PLACE
    return t


def test_a_trace_names_unknown_kernels_and_products_that_do_not_fit():
    t = trace()
    with pytest.raises(GpunetError, match=r"^stage1\.act: there is no kernel 'relu'"):
        t.launch("relu", tensor(6))
    with pytest.raises(GpunetError, match=r"^stage1\.act: matmul: \(2, 3\) @ \(2, 3\) does not give \(2, 3\)"):
        t.matmul(tensor(2, 3), tensor(2, 3), tensor(2, 3))
    with pytest.raises(GpunetError, match="matmul"):
        t.matmul(tensor(4, 2, 3), tensor(1, 3, 2), tensor(4, 2, 2))
    with pytest.raises(GpunetError, match="reshape: shape .* has 6 elements, which .* cannot hold"):
        tensor(2, 3).reshape(4, 2)
    with pytest.raises(GpunetError, match="reshape: expected a contiguous tensor"):
        tensor(2, 3).T.reshape(6)


# Step


def network(classes=3):
    image = Input((4, 5, 2))
    return Graph(image, Linear(classes, name="fc")(image))


def split(n=6, shape=(4, 5, 2), classes=3, dtype=np.uint8):
    return Split(np.zeros((n, *shape), dtype), np.arange(n, dtype=np.int32) % classes)


def test_what_a_step_refuses_at_once():
    graph, loss = network(), SoftmaxCrossEntropy()
    for options, message in [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 2, "dtype": "half"}, "dtype: expected one of float32, tf32, float64, float16, bfloat16, got 'half'"),
        ({"batch": 2, "backend": "tpu"}, "backend: expected one of numpy"),
        (
            {"batch": 2, "source": Source(split(shape=(5, 4, 2)))},
            "train: expected images of shape (4, 5, 2), got (5, 4, 2)",
        ),
        ({"batch": 7, "source": Source(split())}, "batch: expected at most 6, the images of train, got 7"),
        (
            {"batch": 2, "source": Source(split(), classes=4)},
            "train: expected targets of 3 columns, as the network's output has, got 4",
        ),
    ]:
        with pytest.raises(GpunetError) as error:
            Step(graph, loss, **options)
        assert str(error.value).startswith(message)


def test_what_a_step_refuses_of_its_callers():
    step = Step(network(), SoftmaxCrossEntropy(), batch=2, replicas=1)
    x, y = np.zeros((2, 4, 5, 2)), np.zeros(2, int)
    with closing(step):
        for call, message in [
            (lambda: step.gradient(), "gradient: this step has no source; pass x and y"),
            (lambda: step.gradient(x[..., :1], y), "gradient: x: expected shape (1 to 2, 4, 5, 2), got (2, 4, 5, 1)"),
            (lambda: step.gradient(x[:0], y[:0]), "gradient: x: expected shape (1 to 2, 4, 5, 2), got (0, 4, 5, 2)"),
            (
                lambda: step.gradient(np.zeros((3, 4, 5, 2)), y),
                "gradient: x: expected shape (1 to 2, 4, 5, 2), got (3, 4, 5, 2)",
            ),
            (lambda: step.gradient(x, y + 3), "gradient: y: expected labels 0 to 2, got 3 to 3"),
            (lambda: step.gradient(x, y - 1), "gradient: y: expected labels 0 to 2, got -1 to -1"),
            (lambda: step.gradient(x, y[:1]), "gradient: y: expected labels (2,) or targets (2, 3), got (1, 3)"),
            (lambda: step.gradient(x, np.zeros((2, 4))), "gradient: y: expected labels (2,) or targets (2, 3), got (2"),
            (lambda: step.predict(x[0]), "predict: x: expected shape (n, 4, 5, 2), got (4, 5, 2)"),
            (lambda: step.update(), "update: this step has no optimizer"),
            (lambda: step.weights.update({"fc.weight": np.ones(3)}), "weights: fc.weight: expected shape (40, 3), got"),
            (lambda: step.weights.update({"fc.wait": np.ones(3)}), "weights: there is no 'fc.wait'; known: fc.weight"),
            (lambda: step.weights.pop("fc.weight"), "weights: fc.weight: a network's tensors cannot be deleted"),
            (lambda: step.read("fc:output"), "read: 'fc:output' is not kept; kept by the last replay: nothing"),
        ]:
            with pytest.raises(GpunetError) as error:
                call()
            assert str(error.value).startswith(message)
        step.predict(x)
        with pytest.raises(GpunetError, match="kept by the last replay: prediction"):
            step.read("fc:output")
    with closing(Step(network(), batch=2, replicas=1)) as step, pytest.raises(GpunetError, match="no loss"):
        step.gradient(x, y)


def test_sources():
    with pytest.raises(GpunetError, match=r"^source train: mean or scale: expected 1, 2 or \(4, 5, 2\) values, got"):
        Source(split(), mean=[1, 2, 3])
    step = Step(network(), SoftmaxCrossEntropy(), batch=2, replicas=1, source=Source(split()))
    with closing(step), pytest.raises(GpunetError, match="source: the name 'train' is taken by another"):
        step.evaluate(Source(split()))


def test_a_message_is_printable_and_not_too_long():
    assert str(GpunetError("a\nb\x1b[31m\u202e\udcff ü 猫")) == "a\\nb\\x1b[31m\\u202e\\udcff ü 猫"
    text = str(GpunetError("a" * 5000 + "end"))
    assert len(text) < 2000 and text.startswith("aaa") and " ... " in text and text.endswith("aend")
    assert str(GpunetError("kernels/x.cu: g++:", "line 1\nline 2")) == "kernels/x.cu: g++:\nline 1\nline 2"


@pytest.mark.parametrize(
    "value", [["normal", -1], ["he", "normal", "x"], ["uniform", 1e308], ["constant", np.nan], ["normal", None]]
)
def test_first_values_are_drawn_with_finite_numbers(value):
    with pytest.raises(GpunetError, match=r"^init: \w+: \w+: expected a number"):
        nn.Linear(3, weight_init=value)


@pytest.mark.parametrize("outputs", [0, -1, 2.0, True, "3", 2**31, None])
def test_the_outputs_of_a_linear_layer(outputs):
    with pytest.raises(GpunetError, match="^Linear: outputs: expected a whole number from 1 to "):
        nn.Linear(outputs)
