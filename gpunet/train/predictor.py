"""A trained network with what its images went through: evaluates splits and predicts pictures. Needs no data set."""

import numpy as np

from gpunet.data.preprocess import Preprocess
from gpunet.errors import GpunetError
from gpunet.nn import LOSSES
from gpunet.train.build import build_graph, build_step, pick_split
from gpunet.train.config import parse_config, read_toml
from gpunet.train.evaluation import evaluate, mean_output, probabilities
from gpunet.train.views import Views


class Predictor:
    """Step, class names and what images go through: x = (preprocess(pixel) - mean) * scale.

    loss: the name of the training's.
    """

    def __init__(self, step, mean, scale, classes, loss, preprocess=None):
        self.step, self.mean, self.scale, self.classes, self.loss = step, mean, scale, tuple(classes), loss
        self.preprocess = preprocess or Preprocess()

    @classmethod
    def load(cls, checkpoint, backend=None):
        """Return the network of a Checkpoint; a backend given here replaces that of the training."""
        about, given, place = checkpoint.about, checkpoint.input, checkpoint.place
        missing = [key for key in ("config", "classes", "input_shape", "outputs") if key not in about]
        missing += [f"input/{key}" for key in ("mean", "scale") if key not in given]
        if missing:
            raise GpunetError(f"{place}: expected a checkpoint to predict with; it has no {', '.join(missing)}")
        config = parse_config(read_toml(about["config"], place), place)
        config.train.backend = backend or config.train.backend
        if (named := len(about["classes"])) not in (0, about["outputs"]):
            raise GpunetError(
                f"{place}: classes: expected {about['outputs']} names, one an output, or none, got {named}"
            )
        shape = tuple(about["input_shape"])
        for key in ("mean", "scale"):
            _check_affine(f"{place}: input/{key}", given[key], shape)
        try:
            graph = build_graph(config, shape, about["outputs"])
            checkpoint.check(graph)  # first: from here on as much memory is taken as the network needs
            step = build_step(config, graph)
            checkpoint.restore(step)
        except GpunetError as error:
            text = str(error)
            raise GpunetError(text if text.startswith(place) else f"{place}: {text}") from None
        preprocess = Preprocess.from_arrays(given)
        return cls(step, given["mean"], given["scale"], about["classes"], config.loss.name, preprocess)

    def outputs(self, images, views=None):
        """Return the network's output for raw images (n, h, w, c), in pieces of the step's batch.

        views: a text that gpunet.train.views.Views takes. Then it is the output whose probabilities are the mean of
        those of the views, or, where the loss has none, the mean of their outputs.
        """
        size, images = self.step.batch, np.asarray(images)
        pieces = [images[i : i + size] for i in range(0, len(images), size)]
        self.check_views(views)
        views = None if views is None else Views(views)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever uses the outputs looks whether they are finite
            return np.concatenate([self._output(piece, views) for piece in pieces])

    def check_views(self, views):
        """Raise GpunetError where images of the network's size have no such views."""
        if views is None:
            return
        whitening, shape = self.preprocess.whitening, self.step.graph.input_shape
        if whitening is not None and whitening.kind == "pca_whiten":
            raise GpunetError("views: expected an image's places; preprocess.whiten = 'pca_whiten' gives components")
        for _ in Views(views).of(np.zeros((1, *shape)), shape[:2]):
            pass

    def _ready(self, images):
        return (self.preprocess(images) - self.mean) * self.scale

    def _output(self, images, views):
        """Return what `outputs` says for a piece of the images."""
        if views is None:
            return self.step.predict(self._ready(images))
        size, channels = self.step.graph.input_shape[:2], self.step.graph.input_shape[2:]
        whole = self.mean.ndim == 3 or self.scale.ndim == 3 or self.preprocess.whitening is not None  # a value a pixel
        if whole and images.shape[1:3] != size:
            raise GpunetError(
                f"views: with a mean image or whitening, expected images of the size ({size[0]} x {size[1]}), got "
                f"{images.shape[1]} x {images.shape[2]}"
            )
        outside = 0.0 if whole else np.broadcast_to((0 - self.mean) * self.scale, channels)  # as training has it
        seen = views.of(self._ready(images), size, outside)
        return mean_output([self.step.predict(view).astype(np.float64) for view in seen], self.link)

    def predict(self, images, views=None):
        """Return probabilities (n, classes) for raw images; the output itself where the loss has none (mse, hinge).

        Those of cross_entropy sum to 1; those of bce and focal are of classes that do not exclude each other.
        views: "flip", "shift", "ten-crop" ... (gpunet.train.views), over which it is the mean. Raises GpunetError where
        an output is not finite.
        """
        outputs = self.outputs(images, views)
        if not np.isfinite(outputs).all():
            raise GpunetError(
                "predict: outputs: expected finite numbers, got NaN or infinity; the weights or the normalisation are "
                "not what the images need"
            )
        return probabilities(outputs, self.link)

    @property
    def link(self):
        """What makes probabilities of the outputs: "softmax", "sigmoid", or None where there are none."""
        return LOSSES[self.loss].link

    def evaluate(self, dataset, name="test", views=None):
        """Return the Evaluation on a split of a DataSet, without augmentation or label smoothing.

        views: as `predict` has them.
        """
        split = pick_split(dataset, name)
        if dataset.classes != self.classes:
            mine, other = (", ".join(names[:5]) or "values" for names in (self.classes, dataset.classes))
            raise GpunetError(f"{dataset.name}: expected the classes of the training ({mine} ...), got {other} ...")
        outputs = self.outputs(split.images, views)
        return evaluate(outputs, split, self.step.loss or self.loss, f"{dataset.name}: {name}")


def _check_affine(place, value, shape):
    """Check a mean or scale: one number, one a channel, or one a pixel and channel, all finite."""
    if value.shape not in ((), (1,), shape[-1:], shape):
        raise GpunetError(f"{place}: expected 1, {shape[-1]} or {shape} numbers, got shape {value.shape}")
    if not np.isfinite(value).all():
        raise GpunetError(f"{place}: expected finite numbers, got NaN or infinity")
