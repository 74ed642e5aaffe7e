"""Losses: one value an image, and the gradient by the prediction. Targets are dense rows (n, k).

Arguments by name only are what a config may set; their annotations are its limits.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Lt

from gpunet.errors import GpunetError


class _Loss:
    """Traces kernel `op`: sums of losses become means in the update, which knows the count.

    soft: targets are shares of classes, such as smoothed labels; else only the largest counts. link: what makes
    probabilities of the network's outputs, "softmax" or "sigmoid"; None: they are none.
    """

    op, soft, link = "", True, None

    def scalars(self, k):
        """Return the kernel's own numbers, for rows of k."""
        return ()

    def trace(self, t, prediction, targets, losses, hits, state):
        """Return d(sum of losses)/d(prediction); write each image's loss and whether it is a hit."""
        n, k = prediction.shape[0], prediction.size // prediction.shape[0]
        gradient = t.empty(prediction.shape)
        t.launch(self.op, prediction, targets, gradient, losses, hits, state, *self.scalars(k), n, k)
        return gradient


class SoftmaxCrossEntropy(_Loss):
    """-sum_j t_j log softmax(x)_j. Label smoothing is in the targets."""

    op, link = "softmax_cross_entropy", "softmax"


class MeanSquaredError(_Loss):
    """mean_j (x_j - t_j)^2."""

    op = "mean_squared_error"


class Hinge(_Loss):
    """sum over j != y of max(0, x_j - x_y + margin), y the class of the largest target (Weston & Watkins 1999).

    squared: the sum of their squares. crammer_singer: only of the largest x_j (Crammer & Singer 2001). Outputs are
    scores, no probabilities.
    """

    op, soft = "multiclass_hinge", False

    def __init__(self, *, margin: Annotated[float, Gt(0)] = 1.0, squared: bool = False, crammer_singer: bool = False):
        _check("Hinge: margin", margin, "above 0", 0 < margin < float("inf"))
        self.margin, self.squared, self.crammer_singer = margin, squared, crammer_singer

    def scalars(self, k):
        """Return the kernel's own numbers."""
        return self.margin, int(self.squared), int(self.crammer_singer)


class BinaryCrossEntropy(_Loss):
    """-mean_j (t_j log p_j + (1 - t_j) log(1 - p_j)), p = sigmoid(x): k answers that do not exclude each other.

    A hit: the largest output is one of the row's largest targets; of a single output, that p is above 1/2 as the target
    is; where no target is above 0, that no p is above 1/2.
    """

    op, link = "sigmoid_cross_entropy", "sigmoid"

    def scalars(self, k):
        """Return the weights of t and 1 - t, and the power 0."""
        return 1 / k, 1 / k, 0.0


class SigmoidFocal(_Loss):
    """-sum_j (alpha t_j (1 - p_j)^gamma log p_j + (1 - alpha) (1 - t_j) p_j^gamma log(1 - p_j)), p = sigmoid(x).

    What is answered well already weighs little (Lin et al. 2017, section 3; gamma 2 and alpha .25 are theirs). gamma 0
    and alpha .5 are half the sum of which BinaryCrossEntropy is the mean; hits are as there.
    """

    op, link = "sigmoid_cross_entropy", "sigmoid"

    def __init__(self, *, gamma: Annotated[float, Ge(0)] = 2.0, alpha: Annotated[float, Gt(0), Lt(1)] = 0.25):
        _check("SigmoidFocal: gamma", gamma, "0 or more", 0 <= gamma < float("inf"))
        _check("SigmoidFocal: alpha", alpha, "above 0 and below 1", 0 < alpha < 1)
        self.gamma, self.alpha = gamma, alpha

    def scalars(self, k):
        """Return the weights of t and 1 - t, and the power."""
        return self.alpha, 1 - self.alpha, self.gamma


def _check(what, value, expected, good):
    if not good:
        raise GpunetError(f"{what}: expected a number {expected}, got {value}")


LOSSES = {
    "cross_entropy": SoftmaxCrossEntropy,
    "mse": MeanSquaredError,
    "hinge": Hinge,
    "bce": BinaryCrossEntropy,
    "focal": SigmoidFocal,
}
