"""Update rules and learning-rate schedules."""

from gpunet.optim.sgd import SGD

OPTIMIZERS = {"sgd": SGD}

__all__ = ["OPTIMIZERS", "SGD"]
