"""Golden values from PyTorch in float64 for other kinds of convolutions, losses and networks; as make_golden.py.

    cd tests; python -m golden.make_kinds      # needs torch; writes kinds.npz beside itself

The file at hand was made with torch 2.13.0 (CPU).
"""

import numpy as np
from golden import make_golden as base
from golden.make_golden import FOLDER, LABELS, LOGITS, Case, N, Net, conv, dense_targets, linear, logits_of, norm, rows

from gpunet.models import airbench94, nin
from gpunet.nn import ConvTranspose2d, DepthwiseConv2d, LocallyConnected2d, Scale, Sequential

F = torch = None  # set by main


def depthwise(shape, layer, **options):
    return Case(shape, layer, lambda x, w: conv(x, w, groups=shape[2], **options))


def transposed(shape, layer, **options):
    def form(x, w):
        return F.conv_transpose2d(x, w["layer.weight"].permute(3, 2, 0, 1), w.get("layer.bias"), **options)

    return Case(shape, layer, form)


def local(shape, layer, **options):
    def form(x, w):
        weight = w["layer.weight"]
        oh, ow, kh, kw, c, outputs = weight.shape
        patches = F.unfold(x, (kh, kw), **options)
        filters = weight.permute(0, 1, 4, 2, 3, 5).reshape(oh * ow, c * kh * kw, outputs)
        y = torch.einsum("ndp,pdo->npo", patches, filters)
        if "layer.bias" in w:
            y = y + w["layer.bias"].reshape(oh * ow, outputs)
        return y.reshape(-1, oh, ow, outputs).permute(0, 3, 1, 2)

    return Case(shape, layer, form)


CASES = {
    "depthwise": depthwise((7, 9, 5), DepthwiseConv2d(3, **N), padding=1),
    "depthwise_multiplier": depthwise((6, 5, 3), DepthwiseConv2d(3, 2, bias=False, **N), padding=1),
    "depthwise_stride": depthwise((9, 8, 6), DepthwiseConv2d((3, 2), 3, 2, (2, 1), **N), stride=2, padding=(2, 1)),
    "depthwise_dilated": depthwise(
        (9, 11, 4), DepthwiseConv2d(3, 1, (1, 2), 3, (2, 3), **N), stride=(1, 2), padding=3, dilation=(2, 3)
    ),
    "depthwise_shared": Case(
        (5, 7, 4),
        lambda image: (lambda layer: layer(layer(image)))(DepthwiseConv2d(3, **N)),
        lambda x, w: conv(conv(x, w, padding=1, groups=4), w, padding=1, groups=4),
    ),
    "transpose": transposed((5, 6, 4), ConvTranspose2d(3, 3, **N)),
    "transpose_same": transposed((5, 6, 3), ConvTranspose2d(4, 3, 1, 1, **N), padding=1),
    "transpose_double": transposed((4, 5, 3), ConvTranspose2d(5, 4, 2, 1, bias=False, **N), stride=2, padding=1),
    "transpose_output_padding": transposed(
        (4, 3, 2), ConvTranspose2d(3, (3, 2), (2, 3), (1, 0), (1, 2), **N),
        stride=(2, 3), padding=(1, 0), output_padding=(1, 2),
    ),
    "transpose_groups": transposed(
        (4, 5, 6), ConvTranspose2d(4, 3, 2, 1, 1, 2, **N), stride=2, padding=1, output_padding=1, groups=2
    ),
    "transpose_dilated": transposed(
        (4, 5, 3), ConvTranspose2d(2, (2, 3), 2, 1, 1, 1, (3, 2), **N),
        stride=2, padding=1, output_padding=1, dilation=(3, 2),
    ),
    "transpose_pointwise": transposed((4, 5, 3), ConvTranspose2d(4, 1, **N)),
    "local": local((5, 6, 3), LocallyConnected2d(4, 3, **N), padding=1),
    "local_stride": local(
        (7, 8, 2), LocallyConnected2d(3, (3, 2), 2, (0, 1), bias=False, **N), stride=2, padding=(0, 1)
    ),
    "local_dilated": local((8, 7, 3), LocallyConnected2d(2, 3, 1, 1, 2, **N), padding=1, dilation=2),
    "scale": Case((3, 5, 2), Sequential(Scale(-0.3), Scale(7.0)), lambda x, w: x * -0.3 * 7),
}  # fmt: skip


# Losses: the name in LOSSES, its arguments, whether its targets are labels, PyTorch's sum over images.


def hinge(x, t, margin=1.0, p=1):
    """multi_margin_loss divides by the classes."""
    return x.shape[1] * F.multi_margin_loss(x, torch.as_tensor(LABELS), p=p, margin=margin, reduction="sum")


def crammer_singer(x, t):
    own = x.gather(1, torch.as_tensor(LABELS)[:, None])
    others = x.masked_fill(F.one_hot(torch.as_tensor(LABELS), x.shape[1]).bool(), -torch.inf)
    return F.relu(others.amax(1, keepdim=True) - own + 1).sum()


def bce(x, t):
    return F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum()


def focal(x, t, gamma=2.0, alpha=0.25):
    """By probabilities, as the paper writes it; for shares t the two terms weigh t and 1 - t."""
    log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
    here, away = alpha * t * log_q.exp() ** gamma * log_p, (1 - alpha) * (1 - t) * log_p.exp() ** gamma * log_q
    return -(here + away).sum()


def of_labels(x):
    return F.one_hot(torch.as_tensor(LABELS), x.shape[1]).double()


LOSS_CASES = {
    "hinge": ("hinge", {}, True, hinge),
    "hinge_margin": ("hinge", {"margin": 0.5}, True, lambda x, t: hinge(x, t, 0.5)),
    "hinge_squared": ("hinge", {"squared": True, "margin": 2.0}, True, lambda x, t: hinge(x, t, 2.0, 2)),
    "hinge_crammer_singer": ("hinge", {"crammer_singer": True}, True, crammer_singer),
    "bce": ("bce", {}, True, lambda x, t: bce(x, of_labels(x))),
    "bce_dense": ("bce", {}, False, bce),
    "focal": ("focal", {}, True, lambda x, t: focal(x, of_labels(x))),
    "focal_dense": ("focal", {"gamma": 0.7, "alpha": 0.6}, False, lambda x, t: focal(x, t, 0.7, 0.6)),
}


# Networks: four steps of SGD, as in make_golden.


def torch_nin(x, w):
    """Network in Network, straight."""

    def block(x, name, padding):
        x = F.relu(conv(x, w, f"{name}.conv1", padding=padding))
        return conv(F.relu(conv(x, w, f"{name}.conv2")), w, f"{name}.conv3")

    caffe = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    x = F.max_pool2d(F.relu(block(x, "block1", 2)), **caffe)
    x = F.avg_pool2d(F.relu(block(x, "block2", 2)), **caffe)
    return block(x, "block3", 1).mean((2, 3))


def torch_airbench(x, w):
    """airbench94, straight."""
    options = {"momentum": 0.4, "eps": 1e-12}
    x = F.gelu(conv(x, w, "whiten"))
    for group in ("group1", "group2", "group3"):
        x = F.max_pool2d(conv(x, w, f"{group}.conv1", padding=1), 2)
        x = F.gelu(norm(x, w, f"{group}.norm1", **options))
        x = conv(x, w, f"{group}.conv2", padding=1)
        x = F.gelu(norm(x, w, f"{group}.norm2", **options))
    return linear(F.max_pool2d(x, 3), w, "head") / 9


NETS = {
    "nin": Net(lambda: nin((14, 17, 3), dropout=0.0), torch_nin, (14, 17, 3)),
    "airbench94": Net(lambda: airbench94(widths=(8, 12, 16)), torch_airbench),
}


def make_layers():
    """Output, loss and gradients of every case."""
    out = {}
    for name, case in CASES.items():
        w = base.leaves(base.graph_of(case))
        x = torch.tensor(base.images_of(name, case.shape), requires_grad=True)
        y = rows(case.torch(base.nchw(x), w))
        targets = torch.tensor(base.targets_of(name, y.shape[1]))
        loss = F.mse_loss(y, targets, reduction="none").mean(1).sum()
        loss.backward()
        out.update({f"{name}/output": y, f"{name}/loss": loss, f"{name}/input": x.grad})
        out.update({f"{name}/{key}": value.grad for key, value in w.items()})
    return out


def make_losses():
    """Loss and gradient of every loss at every size."""
    out = {}
    for size in LOGITS:
        for name, (*_, loss) in LOSS_CASES.items():
            x = torch.tensor(logits_of(size), requires_grad=True)
            value = loss(x, torch.tensor(dense_targets()))
            value.backward()
            out.update({f"{name}/{size}/loss": value, f"{name}/{size}/gradient": x.grad})
    return out


def make_nets():
    """Losses of four steps, then each weight's fingerprint and each statistic."""
    out = {}
    for name, net in NETS.items():
        graph = net.graph()
        for p in graph.parameters():
            p.rate *= not p.frozen
        losses, w = base.train(net, name, graph)
        out[f"{name}/losses"] = np.array(losses)
        out.update({f"{name}/{key}": base.fingerprint(value.detach()) for key, value in w.items()})
    return out


def main():
    """Write the file."""
    global F, torch
    import torch
    import torch.nn.functional as F

    base.F, base.torch = F, torch
    torch.set_num_threads(1)
    made = {**make_layers(), **make_losses(), **make_nets()}
    arrays = {k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in made.items()}
    path = FOLDER / "kinds.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
