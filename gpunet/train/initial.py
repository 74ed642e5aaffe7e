"""Initial values by name: what [init] of a recipe says, {pattern: init}, later ones over earlier ones.

    "*" = "lsuv"
    "stem" = ["whitening", 5e-4]
    "head.weight" = ["normal", 0.01]

Patterns are those of [start]. One sets the weights of two axes or more that it matches; only where it matches none of
these, as "*.bias" does, it sets vectors. So "*" leaves biases and the scales of normalisations as they are.
"""

import numpy as np

from gpunet.errors import GpunetError
from gpunet.nn import data_init, init
from gpunet.train.start import matching

PATCHED, MEASURED = 5000, 128  # training images that whitening and LSUV look at


def begin(config, graph):
    """Give a graph's weights the inits of [init]; return {name: FromData} of those that need images, for `fit`."""
    parameters, pending = {p.name: p for p in graph.parameters()}, {}
    for pattern, value in config.init.items():
        chosen = init.named(value)
        for name in _matched(graph, pattern, chosen):
            pending.pop(name, None)
            if isinstance(chosen, init.FromData):
                pending[name] = chosen
            else:
                _try(chosen, parameters[name], pattern)
                parameters[name].initial = chosen
    return pending


def _matched(graph, pattern, chosen):
    """Return the names of weights that a pattern sets."""
    shapes = {p.name: p.shape for p in graph.parameters() if p.trainable}
    names = [name for name in matching(graph, [pattern], "[init]") if name in shapes]
    found = [name for name in names if len(shapes[name]) > 1]
    if not found and isinstance(chosen, init.FromData):
        raise GpunetError(f"[init] '{pattern}': {chosen.name}: expected a weight of two axes or more, got {names}")
    return found or names


def _try(chosen, parameter, pattern):
    """Draw once, so that an init which does not fit the weight is told with the pattern that chose it."""
    try:
        chosen(np.random.default_rng(0), parameter.shape)
    except GpunetError as error:
        raise GpunetError(f"[init] '{pattern}': {parameter.name}: {str(error).removeprefix('init: ')}") from None


def fit(graph, pending, source, seed):
    """Find the weights that need images, of a Source's as the network takes them; return a line for each kind.

    Whitening comes first, for LSUV measures what lies behind it. Nothing but the graph's initial values changes.
    """
    lines = []
    for name, chosen in pending.items():
        if chosen.name == "whitening":
            values = data_init.whitening(graph, _some(source, PATCHED), name, **chosen.arguments)
            lines.append(f"init: {name}: whitening of {len(values)} patch values, variances {values[0]:.3g} to "
                         f"{values[-1]:.3g}")  # fmt: skip
    scaled = {}
    for name, chosen in pending.items():
        if chosen.name == "lsuv":
            scaled.setdefault(tuple(chosen.arguments.items()), []).append(name)
    for arguments, names in scaled.items():
        report = data_init.lsuv(graph, _some(source, MEASURED), names, seed=seed, **dict(arguments))
        worst = max(report, key=lambda name: abs(report[name][1] - 1))
        lines.append(f"init: lsuv of {len(names)} weights; farthest from 1: variance {report[worst][1]:.4g} of "
                     f"{worst}'s outputs")  # fmt: skip
    return lines


def _some(source, count):
    """Return at most `count` images from all over a source, for a set may lie in order of its classes."""
    images = source.split.images
    places = np.arange(min(count, len(images))) * len(images) // min(count, len(images))
    return source.normalise(images[places])
