"""Fused layers, and `fuse`, which puts them where a graph has the chains that they compute. Knows no backend."""

from collections import Counter
from dataclasses import replace

from gpunet.nn.activation import ReLU
from gpunet.nn.batchnorm import BatchNorm, matrix_size
from gpunet.nn.elementwise import Add
from gpunet.nn.graph import LayerError, Node


class BatchNormReLU(BatchNorm):
    """max(BatchNorm(x), 0). Backward finds the sign from x again, so that nothing but x is kept."""

    def forward(self, t, x):
        """Trace the statistics, and normalisation and maximum in one launch."""
        given, y = self._given(t, x), t.over(x)
        t.launch("batchnorm_relu_forward", *given, y, *matrix_size(x))
        return y, given

    def backward(self, t, dy, saved):
        """Trace dgamma, dbeta and dx; each launch masks dy itself."""
        sums = self._sums(t, "batchnorm_relu_backward_sums", dy, *saved)
        return self._dx(t, "batchnorm_relu_backward", dy, *saved, sums)


class BatchNormAddReLU(BatchNorm):
    """max(BatchNorm(x) + residual, 0), called on (x, residual): the end of a residual block."""

    def setup(self, shape, residual):
        """The inputs' common shape."""
        if shape != residual:
            raise LayerError(f"expected two inputs of one shape, got {shape}, {residual}")
        return super().setup(shape)

    def forward(self, t, x, residual):
        """Trace the statistics, and normalisation, sum and maximum in one launch."""
        given, y = self._given(t, x), t.over(residual)  # backward reads x
        t.launch("batchnorm_add_relu_forward", *given, residual, y, *matrix_size(x))
        return y, (given, y)

    def backward(self, t, dy, saved):
        """Trace the residual's gradient, which is also that of the normalised value, and BatchNorm's on it."""
        given, y = saved
        d = t.over(dy)
        t.launch("relu_backward", dy, y, d, d.size)
        return super().backward(t, d, given), d


def fuse(graph):
    """Return a graph in which chains BatchNorm -> ReLU and BatchNorm -> Add -> ReLU are one layer each.

    The values between are read by nobody else; a layer called more than once stays. The given graph keeps its nodes;
    parameters are the same objects with the same names in the same order, and every node keeps its path. The fused one
    has the ReLU's.
    """
    chains = {nodes[-1]: (kind, nodes) for kind, nodes in find_chains(graph)}
    inside = {node for _, nodes in chains.values() for node in nodes[:-1]}
    made, nodes = {graph.input: graph.input}, []
    for node in graph.nodes:
        if node in inside:
            continue
        new = _fused(*chains[node]) if node in chains else node
        made[node] = replace(new, inputs=tuple(made[source] for source in new.inputs))
        nodes.append(made[node])
    return graph.rewired(nodes, made[graph.output])


def find_chains(graph):
    """Return [(fused layer's class, nodes of the chain)] of what `fuse` replaces, in call order."""
    readers = Counter(source for node in graph.nodes for source in node.inputs)
    calls = Counter(node.layer for node in graph.nodes)

    def inner(node, kind):
        return type(node.layer) is kind and calls[node.layer] == readers[node] == 1

    chains = []
    for relu in graph.nodes:
        if type(relu.layer) is ReLU and calls[relu.layer] == 1:
            (end,) = relu.inputs
            add = (end,) if inner(end, Add) and len(end.inputs) == 2 else ()
            norms = [node for node in (end.inputs if add else (end,)) if inner(node, BatchNorm)]
            if norms:
                chains.append((BatchNormAddReLU if add else BatchNormReLU, (norms[0], *add, relu)))
    return chains


def _fused(kind, nodes):
    """Return the node of a fused layer on what the chain reads; it stands where the ReLU stood."""
    norm, *_, relu = nodes
    old = norm.layer
    layer = kind(old.momentum, old.eps, old.scale, old.shift, old.name)
    layer.parameters = old.parameters
    others = [source for add in nodes[1:-1] for source in add.inputs if source is not norm]
    return Node(layer, (*norm.inputs, *others), relu.scopes, relu.path, relu.shape)
