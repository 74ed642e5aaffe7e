"""Golden values from PyTorch in float64: fifty updates of a small network by each rule that torch.optim has, too.

    python tests/golden/make_optimizers.py      # needs torch; writes optimizers.npz beside itself

The file at hand was made with torch 2.13.0 (CPU). The tests import this file for its table, so torch is loaded
by `main` only. Inputs and first weights are not stored: `draw` gives the same numbers everywhere.
"""

from pathlib import Path

import numpy as np

try:
    from golden.make_golden import draw
except ImportError:  # run as a script
    from make_golden import draw

FOLDER = Path(__file__).parent
STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 50, 6, 5, 7, 3
SHAPES = {
    "net.one.weight": (INPUTS, HIDDEN),
    "net.one.bias": (HIDDEN,),
    "net.two.weight": (HIDDEN, CLASSES),
    "net.two.bias": (CLASSES,),
}

DECAY = {"weight_decay": 0.01}
RULES = {  # case: gpunet's name and settings, torch's name and settings
    "sgd": ("sgd", {"lr": 0.1, "momentum": 0.0}, "SGD", {"lr": 0.1}),
    "sgd momentum": (
        "sgd", {"lr": 0.1, "momentum": 0.9, **DECAY}, "SGD", {"lr": 0.1, "momentum": 0.9, **DECAY},
    ),
    "sgd nesterov": (
        "sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, **DECAY},
        "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, **DECAY},
    ),
    "adagrad": ("adagrad", {"lr": 0.1}, "Adagrad", {"lr": 0.1}),
    "adagrad decay": ("adagrad", {"eps": 1e-3, **DECAY}, "Adagrad", {"eps": 1e-3, **DECAY}),
    "adadelta": ("adadelta", {}, "Adadelta", {}),
    "adadelta decay": (
        "adadelta", {"rho": 0.8, "eps": 1e-4, **DECAY}, "Adadelta", {"rho": 0.8, "eps": 1e-4, **DECAY},
    ),
    "rmsprop": ("rmsprop", {"lr": 0.01}, "RMSprop", {"lr": 0.01}),
    "rmsprop momentum": (
        "rmsprop", {"momentum": 0.8, "alpha": 0.9, **DECAY},
        "RMSprop", {"lr": 1e-3, "momentum": 0.8, "alpha": 0.9, **DECAY},
    ),
    "rmsprop centered": (
        "rmsprop", {"centered": True, "momentum": 0.5, "eps": 1e-4},
        "RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.5, "eps": 1e-4},
    ),
    "rprop": ("rprop", {}, "Rprop", {}),
    "rprop limits": (
        "rprop", {"up": 1.5, "down": 0.4, "step_min": 1e-3, "step_max": 0.05},
        "Rprop", {"etas": (0.4, 1.5), "step_sizes": (1e-3, 0.05)},
    ),
    "adam": ("adam", {}, "Adam", {}),
    "adam decay": (
        "adam", {"lr": 0.01, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4, **DECAY},
        "Adam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, **DECAY},
    ),
    "adamw": ("adamw", {}, "AdamW", {}),
    "adamw decay": ("adamw", {"lr": 0.02, "weight_decay": 0.3}, "AdamW", {"lr": 0.02, "weight_decay": 0.3}),
    "asgd": ("asgd", {"lr": 0.01}, "ASGD", {}),
    "asgd averaging": (
        "asgd", {"lr": 0.3, "lambd": 0.05, "alpha": 0.6, "t0": 7.0, **DECAY},
        "ASGD", {"lr": 0.3, "lambd": 0.05, "alpha": 0.6, "t0": 7.0, **DECAY},
    ),
}  # fmt: skip


def first(name):
    """Return the first value of a weight."""
    return draw(f"optimizers/{name}", *SHAPES[name])


def batch(number):
    """Return (x, labels) of one of three batches, taken in turn."""
    x = 2 * draw(f"optimizers/x{number % 3}", BATCH, INPUTS)
    return x, ((draw(f"optimizers/labels{number % 3}", BATCH) + 1) / 2 * CLASSES).astype(np.int64)


def main():
    """Train by each rule and write the losses before each update and the last weights (and averages)."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # in which ASGD keeps its rate
    out = {}
    for case, (_, _, name, settings) in RULES.items():
        w = {key: torch.tensor(first(key), requires_grad=True) for key in SHAPES}
        optimizer = getattr(torch.optim, name)(w.values(), **settings)
        losses = []
        for number in range(STEPS):
            x, labels = (torch.tensor(a) for a in batch(number))
            hidden = torch.tanh(x @ w["net.one.weight"] + w["net.one.bias"])
            loss = F.cross_entropy(hidden @ w["net.two.weight"] + w["net.two.bias"], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        out[f"{case}/losses"] = np.array(losses)
        for key, value in w.items():
            out[f"{case}/{key}"] = value.detach().numpy()
            if name == "ASGD":
                out[f"{case}/average {key}"] = optimizer.state[value]["ax"].numpy()
    path = FOLDER / "optimizers.npz"
    np.savez_compressed(path, **out)
    print(f"{path}: {len(out)} arrays, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
