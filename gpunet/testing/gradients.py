"""Gradients held to central differences, through the public Step: for gpunet's layers and for a user's own.

    check_gradients(MyLayer(), (5, 7, 3))
"""

import numpy as np

from gpunet.core.step import Step
from gpunet.nn import Flatten, Graph, Input, MeanSquaredError

STEPS = (1e-4, 1e-5, 1e-6)  # distances of the difference quotients; two neighbours must agree
NOISE = 1e-3  # gradients below this share of the loss are compared as if they were as large


def check_gradients(network, input_shape=None, *, loss=None, batch=3, seed=0, samples=24, tolerance=1e-6,
                    replicas=1, backend="numpy"):  # fmt: skip
    """Compare d(loss)/d(weight) and d(loss)/d(input) with (L(v + h) - L(v - h)) / 2h in float64, element by element.

    network: a Graph, or a Layer of one input of `input_shape` (height, width, channels). loss: the mean squared
    error unless given; its targets are random rows that sum to 1. Weights are their initial values, moved a little,
    so that ones and zeros hide nothing. Of each tensor at most `samples` elements are checked; where the difference
    quotients do not settle (a kink of a ReLU or a maximum lies within reach) another element is taken.

    Returns the largest error, relative to the largest gradient in its tensor. Raises AssertionError that names
    layer, tensor, element, expected and got where one is above `tolerance`.
    """
    graph = _flat(network, input_shape)
    rng = np.random.default_rng(seed)
    step = Step(graph, loss or MeanSquaredError(), batch=batch, dtype="float64", backend=backend, replicas=replicas,
                seed=seed, keep=("input:gradient",))  # fmt: skip
    try:
        for name, value in step.weights.items():
            step.weights[name] = value + rng.normal(0, 0.1, value.shape)
        x = rng.normal(0, 1, (batch, *graph.input_shape))
        return _Check(step, x, rng.dirichlet(np.ones(graph.output_shape[0]), batch), tolerance).all(samples, rng)
    finally:
        step.close()


def _flat(network, input_shape):
    """Return a Graph with one row an image, as losses take it."""
    if isinstance(network, Graph):
        image, output, shape = network.input, network.output, network.output_shape
    else:
        image = Input(input_shape)
        output = network(image)
        shape = Graph(image, output).output_shape
    return Graph(image, output if len(shape) == 1 else Flatten()(output))


class _Check:
    """One network on one batch: its gradients, and its loss at moved values."""

    def __init__(self, step, x, targets, tolerance):
        self.step, self.x, self.targets, self.tolerance = step, x, targets, tolerance
        self.loss = self.value()
        self.gradients = {name: step.read(f"{name}:gradient") for name in step.weights}
        self.gradients["input"] = step.read("input:gradient")

    def value(self):
        """Return the sum of the images' losses."""
        self.step.gradient(self.x, self.targets)
        means = self.step.losses()
        return means["loss"] * means["count"]

    def all(self, samples, rng):
        """Check every tensor; return the largest error."""
        return max(self.tensor(name, samples, rng) for name in self.gradients)

    def tensor(self, name, samples, rng):
        """Check `samples` elements of one tensor; return the largest error."""
        gradient, checked, largest = self.gradients[name], 0, 0.0
        scale = max(np.abs(gradient[np.isfinite(gradient)]).max(initial=0), NOISE * abs(self.loss))
        for flat in rng.permutation(gradient.size):
            index = np.unravel_index(flat, gradient.shape)
            expected = self.quotient(name, index, scale)
            if expected is None:
                continue
            error = abs(gradient[index] - expected) / max(scale, abs(expected))
            if not error <= self.tolerance:
                layer, _, tensor = name.rpartition(".")
                place = f"{layer}: {tensor}" if layer else tensor
                raise AssertionError(
                    f"{place}[{', '.join(map(str, index))}]: expected gradient {expected:.9g}, as central differences "
                    f"give it, got {gradient[index]:.9g}; relative error {error:.2g}, at most {self.tolerance:g}"
                )
            checked, largest = checked + 1, max(largest, error)
            if checked == samples:
                break
        if not checked:
            raise AssertionError(f"{name}: the loss has a kink at every element; the gradient could not be checked")
        return largest

    def quotient(self, name, index, scale):
        """Return the central difference quotient at one element, or None at a kink.

        On a smooth piece two neighbouring distances agree, and the second difference falls with the distance.
        """
        enough, before = self.tolerance * scale / 4, None
        for h in STEPS:
            up, down = self.moved(name, index, h), self.moved(name, index, -h)
            slope, bend = (up - down) / (2 * h), (up - 2 * self.loss + down) / h
            if before and abs(slope - before[0]) <= enough and abs(bend) <= abs(before[1]) / 3 + enough:
                return slope
            before = slope, bend
        return None

    def moved(self, name, index, h):
        """Return the loss with one element moved by h."""
        if name == "input":
            was = self.x[index]
            self.x[index] = was + h
            loss = self.value()
            self.x[index] = was
            return loss
        weight = self.step.weights[name]
        was = weight[index]
        weight[index] = was + h
        self.step.weights[name] = weight
        loss = self.value()
        weight[index] = was
        self.step.weights[name] = weight
        return loss
