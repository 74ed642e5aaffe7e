"""What a network's outputs on a split come to: accuracy, likelihood, calibration, mistakes. Knows no network.

All of it is computed in float64 from the outputs, once. Where the loss is cross entropy, outputs are logits and
p = softmax(outputs); where it is binary cross entropy or focal, p = sigmoid(outputs), a class at a time; else they are
no probabilities, and what needs probabilities is None.
"""

from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from gpunet.backends.numpy import loss as definitions
from gpunet.core.state import new_state
from gpunet.errors import GpunetError
from gpunet.nn import LOSSES, MeanSquaredError

BINS = 15  # of confidence, as Guo et al. 2017 have them
TOP = 5
SHOWN = 24  # mistakes that are kept


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is in (low, high]: how many, their mean confidence, their share of right answers."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the image's place in the split, both classes, p of the answer and p of the true class."""

    image: int
    true: int
    answer: int
    confidence: float
    probability: float


@dataclass(frozen=True)
class Evaluation:
    """Measurements on `count` images. loss: the mean of the training's loss, labels not smoothed.

    With labels: accuracy, the share of images whose largest output is the true class (of equal ones the first counts);
    interval, its 95 % Wilson interval; top5, None up to 5 classes; confusion[i, j], images of class i taken for j;
    mistakes, the most confident first. With labels and probabilities:
    brier = mean of sum over k of (p[k] - [k is true])^2, 0 to 2 where p sums to 1 (Brier 1950); bins and ece (see
    `calibration`); with those of cross entropy nll = mean of -log p[true].
    With values: rmse over all of them, and r2 = 1 - squared error / variance around the mean of each, for mse.
    """

    loss: float
    accuracy: float
    count: int
    confusion: np.ndarray | None = None
    interval: tuple[float, float] | None = None
    top5: float | None = None
    nll: float | None = None
    brier: float | None = None
    ece: float | None = None
    bins: tuple[Bin, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    rmse: float | None = None
    r2: float | None = None

    def lines(self):
        """Return (what, value) pairs of texts: what of the numbers is there."""
        rows = []
        if self.rmse is None:
            interval = ""
            if self.interval:
                interval = f" (95 % interval {self.interval[0]:.2%} to {self.interval[1]:.2%}, Wilson)"
            rows.append(("accuracy", f"{self.accuracy:.2%}{interval}"))
        if self.top5 is not None:
            rows.append(("top-5 accuracy", f"{self.top5:.2%}"))
        if self.nll is not None:
            rows.append(("negative log-likelihood", f"{self.nll:.4f}"))
        else:
            rows.append(("loss", f"{self.loss:.4g}"))
        if self.brier is not None:
            rows.append(("Brier score", f"{self.brier:.4f}" + " (0 to 2)" * (self.nll is not None)))
            rows.append(("calibration error", f"{self.ece:.2%} (ECE, {BINS} equal bins of confidence)"))
        if self.rmse is not None:
            rows.append(("root mean square error", f"{self.rmse:.4g}"))
            rows.append(("R2", "the values do not vary" if self.r2 is None else f"{self.r2:.4f}"))
        return rows

    def numbers(self, classes):
        """Return all of it as JSON holds it, classes by their names too; None for what does not apply."""
        found = asdict(self) | {"confusion": None, "classes": list(classes), "per_class": None}
        if self.confusion is not None:
            found["confusion"] = self.confusion.tolist()
            found["per_class"] = [
                {"class": name, "images": int(row.sum()), "right": int(row[i])}
                | {"accuracy": int(row[i]) / int(row.sum()) if row.any() else None}
                for i, (name, row) in enumerate(zip(classes, self.confusion, strict=True))
            ]
        for mistake in found["mistakes"]:
            mistake |= {"true": classes[mistake["true"]], "answer": classes[mistake["answer"]]}
        return found


def evaluate(outputs, split, loss, place):
    """Return the Evaluation of outputs (n, k) for the images of a Split; `loss` is the training's, or its name.

    Raises GpunetError, which names `place`, where an output is not finite.
    """
    outputs, loss = np.asarray(outputs, np.float64), LOSSES[loss]() if isinstance(loss, str) else loss
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise GpunetError(
            f"{place}: outputs: expected finite numbers, got NaN or infinity for {len(bad):,} of {len(outputs):,} "
            f"images, image {bad[0]} the first; the weights or the normalisation are not what the images need"
        )
    if split.labels is None:
        return _of_values(outputs, split.values.astype(np.float64), loss)
    labels, (count, classes) = split.labels, outputs.shape
    answers, every = outputs.argmax(axis=1), np.arange(count)
    right = answers == labels
    hits = int(right.sum())
    confusion = np.bincount(labels.astype(np.int64) * classes + answers, minlength=classes**2)
    found = {
        "accuracy": hits / count,
        "count": count,
        "confusion": confusion.reshape(classes, classes),
        "interval": wilson(hits, count),
        "top5": float((ranks(outputs, labels) < TOP).mean()) if classes > TOP else None,
    }
    targets = np.eye(classes)[labels]
    likely = probabilities(outputs, loss.link)
    if loss.link == "softmax":
        found["loss"] = found["nll"] = float(0 - log_softmax(outputs)[every, labels].mean())
    else:
        found["loss"] = float(_measured(loss, outputs, targets)[0].mean())
    if loss.link:
        found["brier"] = float(np.square(likely - targets).sum(axis=1).mean())
        found["ece"], found["bins"] = calibration(likely[every, answers], right)
    return Evaluation(**found, mistakes=_mistakes(likely, labels, answers))


def _of_values(outputs, values, loss):
    """Return the Evaluation where an image has values: any for mse, else shares of the classes."""
    losses, hits = _measured(loss, outputs, values)
    accuracy, count = float((hits == 1).mean()), len(values)
    if not isinstance(loss, MeanSquaredError):
        return Evaluation(float(losses.mean()), accuracy, count)
    error = float(np.square(outputs - values).mean())
    variance = float(np.square(values - values.mean(axis=0)).mean())
    return Evaluation(error, accuracy, count, rmse=error**0.5, r2=1 - error / variance if variance else None)


def _measured(loss, outputs, targets):
    """Return (losses, hits) a row by the definition of the loss's kernel."""
    (n, k), losses, hits = outputs.shape, np.empty(len(outputs)), np.empty(len(outputs), np.int32)
    kernel = getattr(definitions, loss.op)
    kernel(outputs, targets, np.empty_like(outputs), losses, hits, new_state(), *loss.scalars(k), n, k)
    return losses, hits


def probabilities(outputs, link):
    """Return softmax or sigmoid of outputs (n, k) as `link` says; the outputs themselves for None."""
    if link == "softmax":
        return np.exp(log_softmax(outputs))
    return np.exp(-np.logaddexp(0, -outputs)) if link == "sigmoid" else outputs


def mean_output(outputs, link):
    """Return the outputs (n, k) whose probabilities are the mean of those of several; for link None their mean."""
    if link is None:
        return np.mean(outputs, axis=0)
    if link == "softmax":
        return np.logaddexp.reduce([log_softmax(x) for x in outputs]) - np.log(len(outputs))
    yes, no = (np.logaddexp.reduce([-np.logaddexp(0, sign * x) for x in outputs]) for sign in (-1, 1))
    return yes - no


def _mistakes(likely, labels, answers):
    wrong = np.flatnonzero(answers != labels)
    wrong = wrong[np.argsort(-likely[wrong, answers[wrong]], kind="stable")][:SHOWN]
    return tuple(
        Mistake(int(i), int(t), int(a), float(likely[i, a]), float(likely[i, t]))
        for i, t, a in zip(wrong, labels[wrong], answers[wrong], strict=True)
    )


def log_softmax(x):
    """log softmax(x)[i, k] = x[i, k] - log sum over j of exp x[i, j], for rows of any size."""
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def ranks(outputs, labels):
    """Return how many classes come before the true one: larger outputs, and equal ones of smaller number."""
    own = outputs[np.arange(len(labels)), labels][:, None]
    before = np.arange(outputs.shape[1]) < labels[:, None]
    return ((outputs > own) | ((outputs == own) & before)).sum(axis=1)


def wilson(hits, count, level=0.95):
    """Return (low, high) of a share: (h + z^2/2 -+ z sqrt(h (n - h) / n + z^2/4)) / (n + z^2) (Wilson 1927).

    Unlike the normal approximation it stays within 0 to 1 and has a width at 0 and 1. It takes the network as given:
    another training would differ by more.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, spread = hits + z * z / 2, z * (hits * (count - hits) / count + z * z / 4) ** 0.5
    low, high = (middle - spread) / (count + z * z), (middle + spread) / (count + z * z)
    return low if hits else 0.0, high if hits < count else 1.0  # which the roots miss by a rounding


def calibration(confidence, right):
    """Return (ECE, the Bins that hold images): ECE = sum over bins b of n_b / n |accuracy_b - confidence_b|.

    confidence is p of the answer; bins are (i/15, (i+1)/15] (Guo et al. 2017, "On Calibration of Modern Neural
    Networks", equation 3).
    """
    edges = np.arange(BINS + 1) / BINS
    place = np.searchsorted(edges[1:-1], confidence)  # a confidence on an edge belongs to the bin below it
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights, minlength=BINS) for weights in (confidence, right)]
    bins = tuple(
        Bin(float(edges[i]), float(edges[i + 1]), int(counts[i]), *(float(total[i] / counts[i]) for total in sums))
        for i in np.flatnonzero(counts)
    )
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(confidence), bins
