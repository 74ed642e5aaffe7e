"""Update rules and learning-rate schedules."""

from gpunet.optim.adaptive import Adadelta, Adagrad, Adam, AdamW, Lion, NaturalGradient, RMSProp, WindowedAdagrad
from gpunet.optim.average import EMA, SWA
from gpunet.optim.layerwise import LARS, VSGD, Muon
from gpunet.optim.optimizer import Optimizer
from gpunet.optim.sgd import ASGD, SGD, Rprop, SignSGD

OPTIMIZERS = {
    "sgd": SGD,
    "signsgd": SignSGD,
    "asgd": ASGD,
    "rprop": Rprop,
    "adagrad": Adagrad,
    "windowed_adagrad": WindowedAdagrad,
    "adadelta": Adadelta,
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
    "lion": Lion,
    "natural_gradient": NaturalGradient,
    "lars": LARS,
    "vsgd": VSGD,
    "muon": Muon,
}

AVERAGES = {"ema": EMA, "swa": SWA}

__all__ = ["AVERAGES", "EMA", "OPTIMIZERS", "SWA", "Optimizer", *sorted(rule.__name__ for rule in OPTIMIZERS.values())]
