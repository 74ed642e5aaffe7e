"""Layers, the graph they form, losses and initial values."""

from gpunet.nn import data_init, init
from gpunet.nn.activation import ELU, GELU, Hardswish, LeakyReLU, ReLU, Sigmoid, SiLU, Softplus, Tanh
from gpunet.nn.batchnorm import BatchNorm
from gpunet.nn.conv import Conv2d
from gpunet.nn.conv_kinds import ConvTranspose2d, DepthwiseConv2d, LocallyConnected2d
from gpunet.nn.dropconnect import DropConnect
from gpunet.nn.dropout import Dropout, Dropout2d
from gpunet.nn.elementwise import Add, Concat, Flatten, Scale
from gpunet.nn.fuse import BatchNormAddReLU, BatchNormReLU, fuse
from gpunet.nn.graph import Block, Graph, Input, Layer, Node, Sequential
from gpunet.nn.groupnorm import GroupNorm, LayerNorm
from gpunet.nn.linear import Linear
from gpunet.nn.loss import LOSSES, BinaryCrossEntropy, Hinge, MeanSquaredError, SigmoidFocal, SoftmaxCrossEntropy
from gpunet.nn.lrn import LRN
from gpunet.nn.maxout import Maxout
from gpunet.nn.pool import AvgPool, GlobalAvgPool, MaxPool
from gpunet.nn.prelu import PReLU
from gpunet.nn.softmax import Softmax
from gpunet.nn.stochastic_pool import StochasticPool

__all__ = [
    "ELU",
    "GELU",
    "LOSSES",
    "LRN",
    "Add",
    "AvgPool",
    "BatchNorm",
    "BatchNormAddReLU",
    "BatchNormReLU",
    "BinaryCrossEntropy",
    "Block",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "DropConnect",
    "Dropout",
    "Dropout2d",
    "Flatten",
    "GlobalAvgPool",
    "Graph",
    "GroupNorm",
    "Hardswish",
    "Hinge",
    "Input",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LocallyConnected2d",
    "MaxPool",
    "Maxout",
    "MeanSquaredError",
    "Node",
    "PReLU",
    "ReLU",
    "Scale",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SigmoidFocal",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Softplus",
    "StochasticPool",
    "Tanh",
    "data_init",
    "fuse",
    "init",
]
