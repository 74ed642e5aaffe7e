"""Networks by name: functions (input_shape, classes, **arguments) -> Graph."""

import difflib
import inspect

from gpunet.errors import GpunetError
from gpunet.models.airbench import airbench94
from gpunet.models.cuda_convnet import cuda_convnet
from gpunet.models.layers import layers
from gpunet.models.lenet import lenet
from gpunet.models.mlp import mlp
from gpunet.models.nin import nin
from gpunet.models.quick import cifar10_full, cifar10_quick
from gpunet.models.resnet import resnet, resnet9
from gpunet.models.vgg import vgg


def _depth(n):
    def build(input_shape=(32, 32, 3), classes=10, widths=(16, 32, 64)):
        return resnet(input_shape, classes, depth=n, widths=widths)

    build.__doc__ = f"ResNet-{n} for CIFAR-10 (He et al. 2016, section 4.2)."
    return build


MODELS = {
    "mlp": mlp,
    "lenet": lenet,
    "cifar10_quick": cifar10_quick,
    "cifar10_full": cifar10_full,
    "resnet9": resnet9,
    **{f"resnet{n}": _depth(n) for n in (20, 32, 44, 56, 110)},
    "vgg": vgg,
    "nin": nin,
    "cuda_convnet": cuda_convnet,
    "airbench94": airbench94,
    "layers": layers,
}


def build(name, input_shape=(32, 32, 3), classes=10, **arguments):
    """Return the Graph of model `name`; raise GpunetError for an unknown name or argument."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(MODELS)
        raise GpunetError(f"model: unknown name {name!r}; {hint}known: {known}; --ops FILE.py adds your own")
    known = [p for p in inspect.signature(MODELS[name]).parameters if p not in ("input_shape", "classes")]
    for argument in arguments:
        if argument not in known:
            raise GpunetError(f"model {name}: unknown argument {argument!r}; known: {', '.join(known) or 'none'}")
    return MODELS[name](tuple(input_shape), classes, **arguments)
