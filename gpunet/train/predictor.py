"""A trained network with what its images went through: evaluates splits and predicts pictures. Needs no data set."""

import tomllib

import numpy as np

from gpunet.errors import GpunetError
from gpunet.nn import LOSSES
from gpunet.train.build import build_graph, build_step, pick_split
from gpunet.train.config import parse_config
from gpunet.train.evaluation import evaluate, probabilities


class Predictor:
    """Step, normalisation and class names together; x = (pixel - mean) * scale. loss: the name of the training's."""

    def __init__(self, step, mean, scale, classes, loss):
        self.step, self.mean, self.scale, self.classes, self.loss = step, mean, scale, tuple(classes), loss

    @classmethod
    def load(cls, checkpoint, backend=None):
        """Return the network of a Checkpoint; a backend given here replaces that of the training."""
        config = parse_config(tomllib.loads(checkpoint.about["config"]), checkpoint.place)
        config.train.backend = backend or config.train.backend
        about = checkpoint.about
        step = build_step(config, build_graph(config, tuple(about["input_shape"]), about["outputs"]))
        checkpoint.restore(step)
        return cls(step, checkpoint.input["mean"], checkpoint.input["scale"], about["classes"], config.loss.name)

    def outputs(self, images):
        """Return the network's output for raw images (n, h, w, c), in pieces of the step's batch."""
        size = self.step.batch
        pieces = [images[i : i + size] for i in range(0, len(images), size)]
        return np.concatenate([self.step.predict((p - self.mean) * self.scale) for p in pieces])

    def predict(self, images):
        """Return probabilities (n, classes) for raw images; the output itself where the loss has none (mse, hinge).

        Those of cross_entropy sum to 1; those of bce and focal are of classes that do not exclude each other.
        """
        return probabilities(self.outputs(images), self.link)

    @property
    def link(self):
        """What makes probabilities of the outputs: "softmax", "sigmoid", or None where there are none."""
        return LOSSES[self.loss].link

    def evaluate(self, dataset, name="test"):
        """Return the Evaluation on a split of a DataSet, without augmentation or label smoothing."""
        split = pick_split(dataset, name)
        if dataset.classes != self.classes:
            mine, other = (", ".join(names[:5]) or "values" for names in (self.classes, dataset.classes))
            raise GpunetError(f"{dataset.name}: expected the classes of the training ({mine} ...), got {other} ...")
        return evaluate(self.outputs(split.images), split, self.step.loss or self.loss, f"{dataset.name}: {name}")
