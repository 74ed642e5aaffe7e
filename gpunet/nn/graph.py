"""Layers, and the graph that calling them on nodes builds.

    image = Input((32, 32, 3))
    x = Sequential(Conv2d(32, 3), BatchNorm(), ReLU(), name="stem")(image)
    net = Graph(image, Linear(10)(GlobalAvgPool()(x)))

A graph is a flat list of nodes in call order. Names are paths: "stem.conv1". Sizes are inferred when the graph is made.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field
from numbers import Integral

from gpunet.errors import GpunetError


class Layer:
    """A function with parameters. Subclasses give `setup`, `forward` and `backward`.

    `parameters` maps names to gpunet.core.params.Parameter; `setup` fills it on the first call. A layer may be called
    more than once: all calls share its parameters.
    """

    def __init__(self, name=None):
        self.name = name
        self.parameters = {}

    @property
    def kind(self):
        """The word that names it where it has no name of its own."""
        return type(self).__name__.lower()

    def setup(self, *shapes):
        """Return the output's shape, without the batch axis, for the inputs' shapes, or raise LayerError."""
        raise NotImplementedError

    def forward(self, t, *xs):
        """Trace the layer; return (y, saved), where `saved` is whatever backward needs."""
        raise NotImplementedError

    def backward(self, t, dy, saved):
        """Trace the gradients: weights' by t.gradient, and return dx, a tuple of them for several inputs."""
        raise NotImplementedError

    def flops(self, shapes, output):
        """Multiplications and additions for one image in the forward pass; 0 where they are not worth counting."""
        return 0

    def __call__(self, *nodes):
        """Return the node of this layer on other nodes."""
        for node in nodes:
            if not isinstance(node, Node):
                raise GpunetError(f"{self.name or self.kind}: a layer is called on nodes, got {type(node).__name__}")
        return Node(self, nodes)


class LayerError(GpunetError):
    """What a layer's `setup` expected and got; the graph adds path and producer."""


def width(value, what):
    """Return a whole number from 1 on that a kernel's sizes can be, or raise GpunetError that names `what`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value < 2**31:
        raise GpunetError(f"{what}: expected a whole number from 1 to 2**31 - 1, got {value!r}")
    return int(value)


def spatial(shape):
    """Return (h, w, c) or raise LayerError."""
    if len(shape) != 3:
        raise LayerError(f"expected an input of shape (height, width, channels), got {shape}")
    return shape


@dataclass(eq=False)
class Node:
    """One call of a layer. `scopes` are the blocks around it, outermost first."""

    layer: Layer | None
    inputs: tuple = ()
    scopes: list = field(default_factory=list)
    path: str = ""
    shape: tuple = ()


def Input(shape):
    """Return the node where images of shape (height, width, channels) enter."""
    return Node(None, (), [], "input", tuple(int(s) for s in shape))


class Block(Layer):
    """Layers wired together by `connect(*nodes)`, which returns the output node. Gone once the graph is built."""

    def connect(self, *nodes):
        """Return the output node."""
        raise NotImplementedError

    def __call__(self, *nodes):
        """Wire the block's layers to the nodes, and put this block's name before theirs."""
        output = self.connect(*nodes)
        pending, seen = [output], set(nodes)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                node.scopes.insert(0, self)
                pending.extend(node.inputs)
        return output


class Sequential(Block):
    """Layers one after another."""

    def __init__(self, *layers, name=None):
        super().__init__(name)
        self.layers = layers

    def connect(self, node):
        """Call each on the one before."""
        for layer in self.layers:
            node = layer(node)
        return node


@dataclass(frozen=True)
class Row:
    """One line of a summary: path, kind, output shape, parameters, forward FLOPs an image."""

    path: str
    kind: str
    shape: tuple
    parameters: int
    flops: int


class Graph:
    """The network from `input` to `output`: nodes in call order, with paths, shapes and parameters."""

    def __init__(self, input, output):
        self.input, self.output = input, output
        self.nodes = _in_order(input, output)
        _name(self.nodes)
        self._parameters = {}
        for node in self.nodes:
            self._setup(node)
        self.input_shape, self.output_shape = input.shape, output.shape

    def _setup(self, node):
        shapes = [i.shape for i in node.inputs]
        try:
            node.shape = tuple(int(s) for s in node.layer.setup(*shapes))
        except LayerError as error:
            producers = " and ".join(f"{i.path} of shape {i.shape}" for i in node.inputs)
            raise GpunetError(f"{node.path}: {error} from {producers}") from None
        if any(s < 1 for s in node.shape):
            raise GpunetError(
                f"{node.path}: output would have shape {node.shape} for {shapes[0]} from {node.inputs[0].path}"
            )
        for key, parameter in node.layer.parameters.items():
            if parameter not in self._parameters:
                name = f"{node.path}.{key}"
                if parameter.name not in ("", name):
                    raise GpunetError(f"{name}: in another graph it is {parameter.name}; give its layer a name")
                parameter.name = self._parameters[parameter] = name

    def rewired(self, nodes, output):
        """Return a graph of these nodes, which have paths and shapes, over this one's parameters and input."""
        graph = copy.copy(self)
        graph.nodes, graph.output = nodes, output
        return graph

    def fused(self):
        """Return this network with chains of layers replaced by fused ones; it is left as it is (gpunet.nn.fuse)."""
        from gpunet.nn.fuse import fuse  # it builds on this module

        return fuse(self)

    def parameters(self):
        """All parameters, each once, in call order."""
        return list(self._parameters)

    def forward(self, t, x):
        """Trace all layers; return (y, saved)."""
        values, saved = {self.input: x}, []
        for node in self.nodes:
            with t.at(node.path):
                values[node], keep = node.layer.forward(t, *(values[i] for i in node.inputs))
                t.mark(f"{node.path}:output", values[node])
            saved.append(keep)
        return values[self.output], saved

    def backward(self, t, dy, saved):
        """Trace all layers' gradients in reverse; where a value was read more than once, its gradients add."""
        gradients = {self.output: dy}
        for node, keep in zip(reversed(self.nodes), reversed(saved), strict=True):
            with t.at(node.path):
                dy = gradients.pop(node)
                t.mark(f"{node.path}:output_gradient", dy)
                dxs = node.layer.backward(t, dy, keep)
                for source, dx in zip(node.inputs, dxs if isinstance(dxs, tuple) else (dxs,), strict=True):
                    if source in gradients:
                        total = t.over(gradients[source])
                        t.launch("add_forward", gradients[source], dx, total, total.size)
                        dx = total
                    gradients[source] = dx
        t.mark("input:gradient", gradients[self.input])

    def summary(self):
        """Return a Row a node; shared parameters count where they are first used."""
        rows, seen = [], set()
        for node in self.nodes:
            new = [p for p in node.layer.parameters.values() if p.trainable and p not in seen]
            seen.update(new)
            flops = node.layer.flops([i.shape for i in node.inputs], node.shape)
            rows.append(Row(node.path, type(node.layer).__name__, node.shape, sum(p.size for p in new), flops))
        return rows

    @property
    def size(self):
        """Trainable weights."""
        return sum(p.size for p in self._parameters if p.trainable)


def _in_order(input, output):
    """Return the nodes from input to output, each after what it reads (depth first, in argument order)."""
    order, state, pending = [], {input: "done"}, [output]
    while pending:
        node = pending[-1]
        if node in state:
            pending.pop()
            if state[node] == "open":
                state[node] = "done"
                order.append(node)
            continue
        if node.layer is None:
            raise GpunetError(f"graph: a second Input of shape {node.shape} is read, but only one was given")
        state[node] = "open"
        pending.extend(reversed(node.inputs))
    return order


def _name(nodes):
    """Give each node its path: names of the blocks around it and its own, numbered by kind where there is none."""
    names, counters, taken = {}, {}, Counter()
    for node in nodes:
        scope = ()
        for layer in (*node.scopes, node.layer):
            key = (scope, layer)
            if key not in names:
                counter = counters.setdefault(scope, Counter())
                counter[layer.kind] += 1
                names[key] = layer.name or f"{layer.kind}{counter[layer.kind]}"
            scope = (*scope, names[key])
        path = ".".join(scope)
        taken[path] += 1
        if taken[path] > 1 and not any(n.path == path and n.layer is node.layer for n in nodes):
            raise GpunetError(f"{path}: two layers have this name; name them apart")
        node.path = path if taken[path] == 1 else f"{path}@{taken[path]}"
