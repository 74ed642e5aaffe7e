"""A trained network with what its images went through: evaluates splits and predicts pictures. Needs no data set."""

import tomllib
from dataclasses import dataclass

import numpy as np

from gpunet.errors import GpunetError
from gpunet.train.build import build_graph, build_step, pick_split
from gpunet.train.config import parse_config


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, share of right answers, images. confusion[i, j]: images of class i taken for j; None for values."""

    loss: float
    accuracy: float
    count: int
    confusion: np.ndarray | None = None


class Predictor:
    """Step, normalisation and class names together; x = (pixel - mean) * scale."""

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
        """Return probabilities (n, classes) for raw images; the output itself where the loss is no cross entropy."""
        outputs = self.outputs(images)
        return np.exp(_log_softmax(outputs)) if self.loss == "cross_entropy" else outputs

    def evaluate(self, dataset, name="test"):
        """Return the Evaluation on a split of a DataSet, without augmentation or label smoothing."""
        split = pick_split(dataset, name)
        if dataset.classes != self.classes:
            mine, other = (", ".join(names[:5]) or "values" for names in (self.classes, dataset.classes))
            raise GpunetError(f"{dataset.name}: expected the classes of the training ({mine} ...), got {other} ...")
        outputs = self.outputs(split.images).astype(np.float64)
        classes = outputs.shape[1]
        targets = np.eye(classes)[split.labels] if split.labels is not None else split.values
        if self.loss == "cross_entropy":
            losses = -(targets * _log_softmax(outputs)).sum(axis=1)
        else:
            losses = np.square(outputs - targets).mean(axis=1)
        answers, right = outputs.argmax(axis=1), targets.argmax(axis=1)
        confusion = None
        if split.labels is not None:
            confusion = np.bincount(right * classes + answers, minlength=classes**2).reshape(classes, classes)
        accuracy = float((answers == right).mean()) if classes > 1 else 0.0
        return Evaluation(float(losses.mean()), accuracy, len(split), confusion)


def _log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
