"""Golden values from PyTorch in float64: local response normalisation, and two SGD steps of cifar10_full.

    python tests/golden/make_lrn.py      # needs torch; writes lrn.npz beside itself

The file at hand was made with torch 2.13.0 (CPU). As in make_golden.py, `draw` gives inputs and weights.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests import this from, too

from golden.make_golden import FOLDER, draw, fingerprint, nchw, plain, rows, starting

from gpunet.models import cifar10_full

CASES = {  # size, alpha, beta, k, region, shape of an image
    "across": (5, 0.9, 0.75, 2.0, "across", (3, 4, 7)),
    "across_one": (1, 2.0, 0.5, 1.0, "across", (2, 3, 5)),
    "across_wider": (9, 3.0, 1.2, 0.7, "across", (4, 3, 6)),
    "within": (3, 0.9, 0.75, 1.0, "within", (6, 5, 3)),
    "within_wider": (7, 5.0, 0.6, 2.0, "within", (4, 9, 5)),
}
STEPS, BATCH, LR, MOMENTUM, DECAY = 2, 5, 1e-5, 0.9, 0.004


def images_of(name, shape, n=3):
    """Return a batch (n, *shape), from -2 to 2."""
    return 2 * draw(f"lrn/{name}/x", n, *shape)


def labels():
    """Return the labels of the network's batch."""
    return ((draw("lrn/labels", BATCH) + 1) * 5).astype(np.int64)


def main():
    """Write the file."""
    import torch
    import torch.nn.functional as F

    def lrn(x, size, alpha, beta, k, region):
        if region == "across":
            return F.local_response_norm(x, size, alpha, beta, k)
        return x / (k + alpha * F.avg_pool2d(x * x, size, 1, size // 2)) ** beta

    def conv(x, w, name):
        return F.conv2d(x, w[f"{name}.weight"].permute(3, 2, 0, 1), w[f"{name}.bias"], padding=2)

    def full(x, w):
        caffe, norm = {"kernel_size": 3, "stride": 2, "ceil_mode": True}, (3, 5e-5, 0.75, 1.0, "within")
        x = lrn(F.relu(F.max_pool2d(conv(x, w, "conv1"), **caffe)), *norm)
        x = lrn(F.avg_pool2d(F.relu(conv(x, w, "conv2")), **caffe), *norm)
        x = F.avg_pool2d(F.relu(conv(x, w, "conv3")), **caffe)
        return rows(x) @ w["ip1.weight"] + w["ip1.bias"]

    torch.set_num_threads(1)
    out = {}
    for name, (*settings, shape) in CASES.items():
        x = torch.tensor(images_of(name, shape), requires_grad=True)
        y = lrn(nchw(x), *settings).permute(0, 2, 3, 1)
        (y * torch.tensor(draw(f"lrn/{name}/dy", *y.shape))).sum().backward()
        out |= {f"{name}/y": y.detach().numpy(), f"{name}/dx": x.grad.numpy()}
    graph = cifar10_full()
    w = {plain(p.name): torch.tensor(starting(p.name, p.shape), requires_grad=True) for p in graph.parameters()}
    groups = [
        {"params": [w[n]], "lr": LR * rate, "weight_decay": DECAY * decay}
        for n, rate, decay in zip(w, (1, 2, 1, 2, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1, 250, 0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)
    losses, x = [], torch.tensor(64 * images_of("net", (32, 32, 3), BATCH))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(full(nchw(x), w), torch.tensor(labels()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out |= {"net/losses": np.array(losses), **{f"net/{n}": fingerprint(v.detach().numpy()) for n, v in w.items()}}
    np.savez_compressed(FOLDER / "lrn.npz", **out)
    print(f"{FOLDER / 'lrn.npz'}: {len(out)} arrays, torch {torch.__version__}, losses {losses}")


if __name__ == "__main__":
    main()
