"""A network written as a list of layers: data that a recipe holds, so that a net of one's own needs no code."""

import inspect
import re
import sys
from difflib import get_close_matches

from gpunet import nn
from gpunet.errors import GpunetError
from gpunet.nn import Graph, Input

# What a list may name: gpunet's own layers, but for blocks, and for fused ones, which a backend puts in by itself.
KINDS = {
    name: kind
    for name, kind in ((name, getattr(nn, name)) for name in nn.__all__)
    if inspect.isclass(kind)
    and issubclass(kind, nn.Layer)
    and kind is not nn.Layer
    and not issubclass(kind, nn.Block)
    and kind.__module__ != nn.BatchNormReLU.__module__
}
PAIRS = ("size", "stride", "padding", "dilation")  # whole numbers that may be two, of (y, x)
OWN = ("layer", "name", "inputs")  # keys of an entry that are no arguments of its layer
NAME = re.compile(r"[\w/+-][\w/+.-]{0,199}")  # what a layer may be called: "conv1", "inception_3a/5x5"


def layers(input_shape=(32, 32, 3), classes=10, layers=()):
    """A network of your own, as a list of gpunet.nn's layers and their arguments.

    [model]
    name = "layers"
    layers = [
        {layer = "Conv2d", name = "conv1", outputs = 32, size = 5, weight_init = ["normal", 1e-2], bias_rate = 2},
        {layer = "ReLU"},
        {layer = "MaxPool", name = "pool1", size = 3, stride = 2, ceil = true},
        {layer = "Conv2d", name = "conv2", outputs = 32, size = 3},
        {layer = "Add", inputs = ["pool1", "conv2"]},
        {layer = "Linear", name = "head"},
    ]

    layer is a class of gpunet.nn, name is its name, and all other keys are the arguments of its constructor. A layer
    reads the one before it, or what `inputs` names: layers further up, or "input", the images. The last one's output
    is the network's; a Linear there has as many outputs as there are classes unless it is told.
    """
    if not isinstance(layers, list | tuple) or not layers:
        raise GpunetError(
            f'model layers: layers: expected a list of tables such as {{layer = "Linear"}}, got {layers!r}'
        )
    nodes, before = {"input": Input(input_shape)}, "input"
    readers = set()
    for number, entry in enumerate(layers, 1):
        place = _place(number, entry)
        kind = _kind(place, entry)
        arguments = {key: value for key, value in entry.items() if key not in OWN}
        if number == len(layers) and "outputs" in inspect.signature(kind).parameters:
            arguments.setdefault("outputs", classes)
        _check_arguments(place, kind, arguments)
        inputs = _inputs(place, kind, entry, before, nodes)
        readers.update(inputs)
        name, key = entry.get("name"), entry.get("name", number)
        nodes[key] = _made(place, kind, name, arguments)(*(nodes[i] for i in inputs))
        before = key
    _check_read(layers, [key for key in nodes if key not in readers and key != before])
    try:
        graph = Graph(nodes["input"], nodes[before])
    except GpunetError as error:
        raise GpunetError(f"model layers: {error}") from None
    if graph.output_shape != (classes,):
        raise GpunetError(
            f"model layers: expected an output of shape ({classes},), one value a class, got {graph.output_shape} from "
            f"the last layer, {graph.output.path}"
        )
    return graph


def _place(number, entry):
    """Return how messages name an entry, which they check to be one."""
    if not isinstance(entry, dict):
        raise GpunetError(f'model layers: layer {number}: expected a table such as {{layer = "ReLU"}}, got {entry!r}')
    name = entry.get("name")
    if "name" in entry and (not isinstance(name, str) or not NAME.fullmatch(name) or name == "input"):
        raise GpunetError(
            f"model layers: layer {number}: name: expected letters, digits and _ / + . - but not 'input', got {name!r}"
        )
    return f"model layers: layer {number}" + (f" '{name}'" if name else "")


def _kind(place, entry):
    kind = entry.get("layer")
    if not isinstance(kind, str) or kind not in KINDS:
        what = f"unknown layer {kind!r}; " if "layer" in entry else "'layer' is missing; "
        by_case = {name.lower(): name for name in KINDS}
        close = get_close_matches(str(kind).lower(), by_case, 1)
        hint = f"did you mean '{by_case[close[0]]}'? " if close else ""
        raise GpunetError(f"{place}: {what}{hint}known: {', '.join(KINDS)}")
    return KINDS[kind]


def _check_arguments(place, kind, arguments):
    """Hold names to the constructor's signature, and values to the type of its defaults."""
    known = {name: p.default for name, p in inspect.signature(kind).parameters.items() if name != "name"}
    for key, value in arguments.items():
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            keys = ", ".join([*known, *OWN])
            raise GpunetError(f"{place}: unknown key '{key}' of {kind.__name__}; {hint}known: {keys}")
        if expected := _unfit(key, value, known[key]):
            raise GpunetError(f"{place}: {key}: expected {expected}, got {value!r}")
    missing = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise GpunetError(f"{place}: {kind.__name__} needs {', '.join(missing)}")


def _unfit(key, value, default):
    """Return what a value should have been, by its key and the default that it replaces, or None where it is that."""
    if key.endswith("_init"):
        named = value if isinstance(value, str) else value[0] if isinstance(value, list | tuple) and value else None
        return None if isinstance(named, str) else 'a name, or a list such as ["normal", 0.01]'
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, float):
        return None if _number(value, int | float) and abs(value) <= sys.float_info.max else "a finite number"
    if isinstance(default, int) or default is inspect.Parameter.empty:
        if key in PAIRS and isinstance(value, list | tuple) and len(value) == 2:
            return None if all(_number(v, int) for v in value) else "whole numbers"
        return None if _number(value, int) else "a whole number" + ", or two of them" * (key in PAIRS)
    return None


def _number(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _inputs(place, kind, entry, before, nodes):
    """Return the keys of what an entry reads."""
    named = entry.get("inputs", [])
    named = [named] if isinstance(named, str) else named
    texts = isinstance(named, list | tuple) and all(isinstance(name, str) for name in named)
    if not texts or ("inputs" in entry and not named):
        raise GpunetError(f"{place}: inputs: expected names of layers, got {named!r}")
    for name in named:
        if name not in nodes:
            known = get_close_matches(name, [key for key in nodes if isinstance(key, str)], 5, 0) or ["input"]
            raise GpunetError(f"{place}: inputs: '{name}' is no layer before this one; nearest: {', '.join(known)}")
    if entry.get("name") in nodes:
        raise GpunetError(f"{place}: a layer before it has this name, too")
    takes = inspect.signature(kind.setup).parameters.values()
    if all(p.kind is not p.VAR_POSITIONAL for p in takes) and len(named) > len(takes) - 1:
        raise GpunetError(f"{place}: inputs: {kind.__name__} reads {len(takes) - 1}, got {len(named)}")
    return list(named) or [before]


def _made(place, kind, name, arguments):
    """Return the layer; whatever its constructor refuses, this entry is named."""
    try:
        return kind(**arguments, name=name)
    except (GpunetError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise GpunetError(f"{place}: {error}") from None


def _check_read(layers, unread):
    """Refuse what nobody reads, which is a mistake in the list."""
    for key in unread:
        if key == "input":
            raise GpunetError("model layers: no layer reads the images, 'input'")
        number = key if isinstance(key, int) else [entry.get("name") for entry in layers].index(key) + 1
        raise GpunetError(f"{_place(number, layers[number - 1])}: no layer reads it, and it is not the last")
