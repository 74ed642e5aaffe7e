"""Golden values from PyTorch in float64 of the activations and norms that make_golden.py has not.

    python tests/golden/make_more.py      # needs torch; writes more.npz beside itself

Made as make_golden.py makes its own, with torch 2.13.0 (CPU). Tests import this file for its table.
"""

from pathlib import Path

try:
    from golden import make_golden as base
except ImportError:  # run by itself
    import make_golden as base

from gpunet.nn import (
    ELU,
    Flatten,
    GroupNorm,
    Hardswish,
    LayerNorm,
    Maxout,
    PReLU,
    Softmax,
    Softplus,
)  # fmt: skip

Case, FOLDER = base.Case, Path(__file__).parent
N = {"name": "layer"}


def on_rows(layer):
    return lambda image: layer(Flatten()(image))


def affine(w, *shape):
    """gamma and beta as PyTorch takes them for one shape."""
    return [w[f"layer.{key}"].reshape(*shape) for key in ("gamma", "beta")]


def group_norm(groups, **options):
    return lambda x, w: base.F.group_norm(x, groups, w["layer.gamma"], w["layer.beta"], **options)


def channels_norm(x, w):
    last = x.permute(0, 2, 3, 1)
    return base.F.layer_norm(last, last.shape[-1:], *affine(w, -1)).permute(0, 3, 1, 2)


def image_norm(x, w):
    """Over (c, h, w), gpunet's one weight a value laid out as (h, w, c)."""
    _, c, h, width = x.shape
    weights = [v.permute(2, 0, 1) for v in affine(w, h, width, c)]
    return base.F.layer_norm(x, x.shape[1:], *weights)


def maxout(pieces):
    """The largest of neighbouring channels."""
    return lambda x, w: x.unflatten(1, (-1, pieces)).amax(2)


CASES = {
    "elu": Case((5, 7, 3), ELU(), lambda x, w: base.F.elu(x)),
    "elu_alpha": Case((5, 7, 3), ELU(0.3), lambda x, w: base.F.elu(x, 0.3)),
    "softplus": Case((5, 7, 3), Softplus(), lambda x, w: base.F.softplus(x)),
    "hardswish": Case((5, 7, 3), Hardswish(), lambda x, w: base.F.hardswish(x)),
    "softmax": Case((5, 7, 3), Softmax(), lambda x, w: base.F.softmax(x, 1)),
    "softmax_rows": Case((3, 2, 5), on_rows(Softmax()), lambda x, w: base.F.softmax(base.rows(x), 1)),
    "prelu": Case((5, 7, 3), PReLU(**N), lambda x, w: base.F.prelu(x, w["layer.slope"])),
    "prelu_shared": Case((5, 7, 3), PReLU(shared=True, **N), lambda x, w: base.F.prelu(x, w["layer.slope"])),
    "prelu_rows": Case((2, 3, 3), on_rows(PReLU(**N)), lambda x, w: base.F.prelu(base.rows(x), w["layer.slope"])),
    "maxout": Case((5, 7, 6), Maxout(3), maxout(3)),
    "maxout_rows": Case((2, 3, 4), on_rows(Maxout(2)), lambda x, w: maxout(2)(base.rows(x), w)),
    "groupnorm": Case((5, 7, 6), GroupNorm(3, **N), group_norm(3)),
    "groupnorm_instance": Case((5, 7, 4), GroupNorm(4, 1e-2, **N), group_norm(4, eps=1e-2)),
    "groupnorm_one": Case((5, 7, 4), GroupNorm(1, **N), group_norm(1)),
    "groupnorm_rows": Case((2, 3, 4), on_rows(GroupNorm(2, **N)), lambda x, w: group_norm(2)(base.rows(x), w)),
    "layernorm": Case((5, 7, 6), LayerNorm(**N), channels_norm),
    "layernorm_image": Case((5, 7, 3), LayerNorm("image", **N), image_norm),
    "layernorm_rows": Case(
        (2, 3, 4), on_rows(LayerNorm(**N)),
        lambda x, w: base.F.layer_norm(base.rows(x), (24,), *affine(w, -1)),
    ),
}  # fmt: skip


def main():
    """Write the file."""
    import numpy as np
    import torch

    base.torch, base.F = torch, torch.nn.functional
    torch.set_num_threads(1)
    arrays = {k: v.detach().numpy() for k, v in base.make_layers(CASES).items()}
    path = FOLDER / "more.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
