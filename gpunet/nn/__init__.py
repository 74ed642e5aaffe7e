"""Layers, the graph they form, losses and initial values."""

from gpunet.nn import init
from gpunet.nn.activation import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from gpunet.nn.batchnorm import BatchNorm
from gpunet.nn.conv import Conv2d
from gpunet.nn.dropout import Dropout
from gpunet.nn.elementwise import Add, Concat, Flatten
from gpunet.nn.fuse import BatchNormAddReLU, BatchNormReLU, fuse
from gpunet.nn.graph import Block, Graph, Input, Layer, Node, Sequential
from gpunet.nn.linear import Linear
from gpunet.nn.loss import LOSSES, MeanSquaredError, SoftmaxCrossEntropy
from gpunet.nn.lrn import LRN
from gpunet.nn.pool import AvgPool, GlobalAvgPool, MaxPool

__all__ = [
    "GELU",
    "LOSSES",
    "LRN",
    "Add",
    "AvgPool",
    "BatchNorm",
    "BatchNormAddReLU",
    "BatchNormReLU",
    "Block",
    "Concat",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "Graph",
    "Input",
    "Layer",
    "LeakyReLU",
    "Linear",
    "MaxPool",
    "MeanSquaredError",
    "Node",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "Tanh",
    "fuse",
    "init",
]
