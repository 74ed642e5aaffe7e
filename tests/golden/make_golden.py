"""Golden values from PyTorch in float64: every layer, every loss, and four SGD steps of two whole networks.

    python tests/golden/make_golden.py      # needs torch; writes layers.npz, losses.npz and nets.npz beside itself

The files at hand were made with torch 2.13.0 (CPU). The tests import this file for its tables, so torch is loaded
by `main` only. Inputs and weights are not stored: `draw` gives the same numbers everywhere.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpunet.core.random import philox
from gpunet.models import cifar10_quick, resnet9
from gpunet.models.resnet import resnet
from gpunet.nn import (
    GELU,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Input,
    LeakyReLU,
    Linear,
    MaxPool,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
)  # fmt: skip

FOLDER = Path(__file__).parent
F = torch = None  # set by main
IMAGES = 3  # a batch, which two replicas cut unevenly


def draw(name, *shape):
    """Return uniform numbers in [-1, 1), multiples of 2^-23, so that float32 holds them too."""
    size = int(np.prod(shape))
    words = philox(zlib.crc32(name.encode()), 0, 0, 0, -(-size // 4))[:size]
    return ((words >> 40) * 2.0**-23 - 1).reshape(shape)


def plain(name):
    """Return a parameter's name without the scopes of nameless blocks."""
    return ".".join(part for part in name.split(".") if not part.startswith("sequential"))


def starting(name, shape):
    """Return a weight or statistic to start from, He's variance for matrices: away from ones and zeros everywhere."""
    u = draw(plain(name), *shape)
    if name.endswith("weight"):
        return (u * np.sqrt(6 / np.prod(shape[:-1]))).astype(np.float32).astype(np.float64)
    return {"gamma": 1 + u / 4, "variance": 1 + u / 2}.get(name.rpartition(".")[2], u / 4)


# Layers: input shape, the layer on a node, PyTorch's form of it on (n, c, h, w) and weights in gpunet's layout.


@dataclass
class Case:
    """`build` gives the output node for the image's, `torch` the output for x and weights."""

    shape: tuple
    build: object
    torch: object


def conv(x, w, name="layer", **options):
    """F.conv2d on a weight (kh, kw, in / groups, out)."""
    return F.conv2d(x, w[f"{name}.weight"].permute(3, 2, 0, 1), w.get(f"{name}.bias"), **options)


def rows(x):
    """Return (n, values) in (height, width, channel) order."""
    return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def linear(x, w, name="layer"):
    """F.linear on a weight (in, out)."""
    return F.linear(rows(x), w[f"{name}.weight"].T, w.get(f"{name}.bias"))


def norm(x, w, name="layer", training=True, **options):
    """F.batch_norm; moves the running statistics among the weights."""
    named = (w[f"{name}.{key}"] for key in ("mean", "variance", "gamma", "beta"))
    return F.batch_norm(x, *named, training=training, **options)


def average(**options):
    return lambda x, w: F.avg_pool2d(x, **options)


def maximum(**options):
    return lambda x, w: F.max_pool2d(x, **options)


def conv_case(shape, layer, **options):
    return Case(shape, layer, lambda x, w: conv(x, w, **options))


def two_convs(image):
    shared = Conv2d(4, 3, name="layer")
    return shared(ReLU()(shared(image)))


def branches(image):
    left, right = Conv2d(3, 1, name="left")(image), Conv2d(5, 3, name="right")(image)
    return Concat()(left, image, right)


def residual(image):
    hidden = Conv2d(4, 3, name="layer")(image)
    return Add()(image, hidden, Tanh()(hidden))


N = {"name": "layer"}
CASES = {
    "conv3": conv_case((7, 9, 4), Conv2d(6, 3, **N), padding=1),
    "conv5_nobias": conv_case((5, 11, 3), Conv2d(4, 5, bias=False, **N), padding=2),
    "conv_even": conv_case((7, 9, 3), Conv2d(5, (2, 4), padding=(1, 0), **N), padding=(1, 0)),
    "conv_stride": conv_case((7, 9, 4), Conv2d(6, 3, 2, **N), stride=2, padding=1),
    "conv_stride_uneven": conv_case((8, 11, 3), Conv2d(4, (3, 5), (2, 3), (0, 2), **N), stride=(2, 3), padding=(0, 2)),
    "conv_far_padding": conv_case((5, 7, 3), Conv2d(4, 3, padding=4, **N), padding=4),
    "conv_dilated": conv_case((9, 11, 3), Conv2d(5, 3, dilation=2, **N), padding=2, dilation=2),
    "conv_dilated_stride": conv_case(
        (11, 9, 4), Conv2d(4, (3, 2), 2, (1, 2), dilation=(3, 2), **N), stride=2, padding=(1, 2), dilation=(3, 2)
    ),
    "conv_groups": conv_case((7, 5, 6), Conv2d(9, 3, groups=3, **N), padding=1, groups=3),
    "conv_depthwise_stride": conv_case((9, 7, 5), Conv2d(5, 3, 2, groups=5, **N), stride=2, padding=1, groups=5),
    "conv_groups_pointwise": conv_case((5, 7, 4), Conv2d(6, 1, groups=2, **N), groups=2),
    "conv_pointwise": conv_case((5, 7, 6), Conv2d(4, 1, **N)),
    "conv_pointwise_stride": conv_case((7, 9, 5), Conv2d(6, 1, 2, 0, **N), stride=2),
    "conv_whole_image": conv_case((5, 7, 3), Conv2d(4, (5, 7), padding=0, **N)),
    "conv_shared": Case(
        (5, 7, 4), two_convs, lambda x, w: conv(F.relu(conv(x, w, padding=1)), w, padding=1)
    ),
    "linear": Case((3, 5, 2), Linear(7, **N), linear),
    "linear_nobias": Case((1, 1, 9), Linear(4, bias=False, **N), linear),
    "linear_shared": Case(
        (1, 2, 3), lambda i: (lambda f: f(ReLU()(f(i))))(Linear(6, **N)), lambda x, w: linear(F.relu(linear(x, w)), w)
    ),
    "maxpool": Case((7, 9, 3), MaxPool(2), maximum(kernel_size=2)),
    "maxpool_overlap": Case((7, 9, 3), MaxPool(3, 2, 1), maximum(kernel_size=3, stride=2, padding=1)),
    "maxpool_caffe": Case((6, 8, 3), MaxPool(3, 2, ceil=True), maximum(kernel_size=3, stride=2, ceil_mode=True)),
    "maxpool_caffe_pad": Case(
        (5, 10, 2), MaxPool((3, 2), (3, 3), (1, 1), ceil=True),
        maximum(kernel_size=(3, 2), stride=3, padding=1, ceil_mode=True),
    ),
    "maxpool_dense": Case((5, 11, 2), MaxPool((3, 5), 1), maximum(kernel_size=(3, 5), stride=1)),
    "avgpool": Case((7, 9, 3), AvgPool(2), average(kernel_size=2)),
    "avgpool_overlap": Case((7, 9, 3), AvgPool(3, 2, 1), average(kernel_size=3, stride=2, padding=1)),
    "avgpool_overlap_inside": Case(
        (7, 9, 3), AvgPool(3, 2, 1, include_pad=False),
        average(kernel_size=3, stride=2, padding=1, count_include_pad=False),
    ),
    "avgpool_caffe": Case((6, 8, 3), AvgPool(3, 2, ceil=True), average(kernel_size=3, stride=2, ceil_mode=True)),
    "avgpool_caffe_pad": Case(
        (8, 11, 2), AvgPool(3, 2, 1, ceil=True), average(kernel_size=3, stride=2, padding=1, ceil_mode=True)
    ),
    "avgpool_caffe_pad_inside": Case(
        (8, 11, 2), AvgPool((3, 4), 2, (1, 2), ceil=True, include_pad=False),
        average(kernel_size=(3, 4), stride=2, padding=(1, 2), ceil_mode=True, count_include_pad=False),
    ),
    "global_average": Case((5, 7, 4), GlobalAvgPool(), lambda x, w: x.mean((2, 3))),
    "batchnorm": Case((5, 7, 4), BatchNorm(**N), norm),
    "batchnorm_rows": Case((1, 1, 6), lambda i: BatchNorm(**N)(Flatten()(i)), lambda x, w: norm(rows(x), w)),
    "batchnorm_momentum": Case((3, 5, 2), BatchNorm(0.3, 1e-2, **N), lambda x, w: norm(x, w, momentum=0.3, eps=1e-2)),
    "batchnorm_behind_conv": Case(
        (5, 7, 3), lambda i: ReLU()(BatchNorm(**N)(Conv2d(4, 3, bias=False, name="conv")(i))),
        lambda x, w: F.relu(norm(conv(x, w, "conv", padding=1), w)),
    ),
    "relu": Case((5, 7, 3), ReLU(), lambda x, w: F.relu(x)),
    "leaky_relu": Case((5, 7, 3), LeakyReLU(0.2), lambda x, w: F.leaky_relu(x, 0.2)),
    "sigmoid": Case((5, 7, 3), Sigmoid(), lambda x, w: F.sigmoid(x)),
    "tanh": Case((5, 7, 3), Tanh(), lambda x, w: F.tanh(x)),
    "gelu": Case((5, 7, 3), GELU(), lambda x, w: F.gelu(x)),
    "silu": Case((5, 7, 3), SiLU(), lambda x, w: F.silu(x)),
    "add": Case((5, 7, 4), residual, lambda x, w: (lambda h: x + h + F.tanh(h))(conv(x, w, padding=1))),
    "add_itself": Case((3, 5, 2), lambda i: Add()(i, i), lambda x, w: x + x),
    "concat": Case(
        (5, 7, 2), branches,
        lambda x, w: torch.cat([conv(x, w, "left"), x, conv(x, w, "right", padding=1)], 1),
    ),
}  # fmt: skip
INFERENCE = ("batchnorm", "batchnorm_behind_conv")  # also with running statistics: only the output


def graph_of(case):
    """Return the graph of a case, its output flat."""
    image = Input(case.shape)
    output = case.build(image)
    return Graph(image, output if len(Graph(image, output).output_shape) == 1 else Flatten()(output))


def images_of(name, shape, n=IMAGES):
    """Return the batch of a case: (n, *shape), from -2 to 2."""
    return 2 * draw(f"{name}/x", n, *shape)


def targets_of(name, width, n=IMAGES):
    """Return the targets (n, width) of a case's mean squared error."""
    return draw(f"{name}/targets", n, width)


# Losses: predictions and targets, and PyTorch's sum over images.

LOGITS = {"ordinary": 2.0, "large": 256.0}
LABELS = np.array([3, 0, 6, 6, 1])
LOSSES = {
    "labels": lambda x, t: F.cross_entropy(x, torch.as_tensor(LABELS), reduction="sum"),
    "smoothed": lambda x, t: F.cross_entropy(x, torch.as_tensor(LABELS), reduction="sum", label_smoothing=0.1),
    "dense": lambda x, t: F.cross_entropy(x, t, reduction="sum"),
    "mse": lambda x, t: F.mse_loss(x, t, reduction="none").mean(1).sum(),
}


def logits_of(size):
    """Return predictions (5, 7) of a size."""
    return draw("logits", 5, 7) * LOGITS[size]


def dense_targets():
    """Return targets (5, 7): rows that sum to something else than 1 too."""
    return (draw("dense targets", 5, 7) + 1) / 7


# Networks: four steps of SGD on two batches, taken in turn.

STEPS, BATCH = 4, 6
SGD = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
WIDTHS = (8, 12, 16, 24)


def torch_resnet9(x, w):
    """Page's ResNet-9, straight."""

    def block(x, name):
        return F.relu(norm(conv(x, w, f"{name}.conv", padding=1), w, f"{name}.norm"))

    x = block(x, "stem")
    x = F.max_pool2d(block(x, "stage1.conv"), 2)
    x = x + block(block(x, "stage1.residual.body1"), "stage1.residual.body2")
    x = F.max_pool2d(block(x, "stage2.conv"), 2)
    x = F.max_pool2d(block(x, "stage3.conv"), 2)
    x = x + block(block(x, "stage3.residual.body1"), "stage3.residual.body2")
    return linear(F.max_pool2d(x, 4), w, "head")


def torch_quick(x, w):
    """Caffe's cifar10_quick, straight."""
    caffe = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    x = F.relu(F.max_pool2d(conv(x, w, "conv1", padding=2), **caffe))
    x = F.avg_pool2d(F.relu(conv(x, w, "conv2", padding=2)), **caffe)
    x = F.avg_pool2d(F.relu(conv(x, w, "conv3", padding=2)), **caffe)
    return linear(linear(x, w, "ip1"), w, "ip2")


def torch_resnet8(x, w):
    """ResNet-8 of He et al., straight."""

    def block(x, name, stride=1, project=False):
        y = F.relu(norm(conv(x, w, f"{name}.body1.conv", padding=1, stride=stride), w, f"{name}.body1.norm"))
        y = norm(conv(y, w, f"{name}.conv2", padding=1), w, f"{name}.norm2")
        if project:
            x = norm(conv(x, w, f"{name}.project", stride=stride), w, f"{name}.project_norm")
        return F.relu(x + y)

    x = F.relu(norm(conv(x, w, "stem.conv", padding=1), w, "stem.norm"))
    x = block(x, "stage1_block1")
    x = block(x, "stage2_block1", 2, True)
    x = block(x, "stage3_block1", 2, True)
    return linear(x.mean((2, 3)), w, "head")


@dataclass
class Net:
    """A model's graph, the same network in PyTorch, the learning rate; parameters' multipliers are the graph's."""

    graph: object
    torch: object
    shape: tuple = (32, 32, 3)
    lr: float = 0.02


NETS = {
    "resnet9": Net(lambda: resnet9(widths=WIDTHS), torch_resnet9),
    "resnet8": Net(lambda: resnet((15, 17, 3), depth=8), torch_resnet8, (15, 17, 3)),
    "cifar10_quick": Net(lambda: cifar10_quick(bias_rate=2.0), torch_quick, lr=2e-4),
}


def batch_of(name, number, shape=(32, 32, 3)):
    """Return (images, labels) of one of the two batches."""
    x = 2 * draw(f"{name}/batch{number}", BATCH, *shape)
    return x, ((draw(f"{name}/labels{number}", BATCH) + 1) * 5).astype(np.int64)


def fingerprint(array):
    """Return 48 fixed elements and the norm of a tensor."""
    flat = np.asarray(array, np.float64).reshape(-1)
    return np.append(flat[np.linspace(0, flat.size - 1, 48).astype(int)], np.sqrt(np.square(flat).sum()))


# PyTorch


def leaves(graph):
    """Return {parameter: double tensor}, weights wanting gradients."""
    return {
        plain(p.name): torch.tensor(starting(p.name, p.shape), requires_grad=p.trainable) for p in graph.parameters()
    }


def nchw(x):
    return x.permute(0, 3, 1, 2)


def make_layers(cases=CASES):
    """Output, loss, gradients and moved statistics of every case."""
    out = {}
    for name, case in cases.items():
        graph = graph_of(case)
        w = leaves(graph)
        x = torch.tensor(images_of(name, case.shape), requires_grad=True)
        if name in INFERENCE:
            still = {k: v.detach() for k, v in w.items()}
            with torch.no_grad():
                y = norm(nchw(x), still, training=False) if name == "batchnorm" else F.relu(
                    norm(conv(nchw(x), still, "conv", padding=1), still, training=False)
                )
            out[f"{name}/inference"] = rows(y)
        y = rows(case.torch(nchw(x), w))
        loss = F.mse_loss(y, torch.tensor(targets_of(name, y.shape[1])), reduction="none").mean(1).sum()
        loss.backward()
        out.update({f"{name}/output": y, f"{name}/loss": loss, f"{name}/input": x.grad})
        out.update({f"{name}/{k}": v if v.grad is None else v.grad for k, v in w.items()})
    return out


def make_losses():
    """Loss and gradient of every loss at every size."""
    out = {}
    for size in LOGITS:
        for name, loss in LOSSES.items():
            x = torch.tensor(logits_of(size), requires_grad=True)
            value = loss(x, torch.tensor(dense_targets()))
            value.backward()
            out.update({f"{name}/{size}/loss": value, f"{name}/{size}/gradient": x.grad})
    return out


def train(net, name, graph):
    """Return (losses, weights and statistics) after four steps."""
    w, losses = leaves(graph), []
    groups = [
        {"params": [w[plain(p.name)]], "lr": net.lr * p.rate} for p in graph.parameters() if p.trainable
    ]
    optimizer = torch.optim.SGD(groups, lr=net.lr, **SGD)
    for step in range(STEPS):
        x, labels = batch_of(name, step % 2, net.shape)
        optimizer.zero_grad()
        loss = F.cross_entropy(net.torch(nchw(torch.tensor(x)), w), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, w


def make_nets():
    """Losses of four steps, then each weight's fingerprint and each statistic."""
    out = {}
    for name, net in NETS.items():
        losses, w = train(net, name, net.graph())
        out[f"{name}/losses"] = np.array(losses)
        for key, value in w.items():
            out[f"{name}/{key}"] = fingerprint(value.detach())
    return out


def main():
    """Write the three files."""
    global F, torch
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    for file, make in (("layers", make_layers), ("losses", make_losses), ("nets", make_nets)):
        arrays = {k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in make().items()}
        path = FOLDER / f"{file}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
