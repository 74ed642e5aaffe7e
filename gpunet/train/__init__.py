"""Recipes, the training loop, checkpoints, run directories."""

from gpunet.train.checkpoint import Checkpoint
from gpunet.train.config import Config, load_config, parse_config
from gpunet.train.evaluation import Evaluation
from gpunet.train.predictor import Predictor
from gpunet.train.trainer import Trainer

__all__ = ["Checkpoint", "Config", "Evaluation", "Predictor", "Trainer", "load_config", "parse_config"]
