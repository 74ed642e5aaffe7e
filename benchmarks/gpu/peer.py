"""The peer: the same net, optimizer, augmentation and batch in PyTorch, on the same device.

A step is all of it: images and labels gathered from a set that lies on the device, crop, flip and normalisation, the
forward and backward passes, the update. The images are padded once; a batch is one indexed read of the padded set.
"""

import importlib.metadata
import operator
import time
from collections import Counter

import numpy as np

from gpu import nets
from gpu.bench import Skip
from gpu.training import DECAY, MOMENTUM, RATE
from gpunet.errors import GpunetError
from gpunet.nn import (
    GELU,
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    ReLU,
    Scale,
)

PEERS = {  # gpunet's type: what PyTorch has beside it
    "float32": {
        "eager contiguous": {"channels_last": False},
        "eager channels_last": {},
    },
    "tf32": {"eager channels_last TF32": {"tf32": True}},
    "float16": {"AMP float16 channels_last": {"amp": "float16"}},
    "bfloat16": {"AMP bfloat16 channels_last": {"amp": "bfloat16"}},
}


def torch_of(options):
    """Return (torch, its device), or raise Skip with the reason why there is no peer."""
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise Skip("no peer: PyTorch is not installed") from None
    name = options.torch_device
    if name == "none":
        raise Skip("no peer: it runs on a GPU, beside --backend cuda")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise Skip(f"no peer: PyTorch {torch.__version__} sees no GPU")
    torch.backends.cudnn.benchmark = True
    return torch, torch.device(name)


def module_of(torch, graph):
    """Return the same network in PyTorch, as straight code: a call a node."""
    code, parts, values = torch.fx.Graph(), {}, {}
    readers = Counter(source for node in graph.nodes for source in node.inputs)
    values[graph.input] = code.placeholder("x")
    for number, node in enumerate(graph.nodes):
        given = [values[source] for source in node.inputs]
        if isinstance(node.layer, Add):
            total = given[0]
            for other in given[1:]:
                total = code.call_function(operator.add, (total, other))
            values[node] = total
            continue
        if isinstance(node.layer, Scale):
            values[node] = code.call_function(operator.mul, (given[0], node.layer.factor))
            continue
        parts[f"n{number}"] = _layer_of(torch.nn, node, alone=readers[node.inputs[0]] == 1)
        values[node] = code.call_module(f"n{number}", (given[0],))
    code.output(values[graph.output])
    return torch.fx.GraphModule(parts, code)


def _layer_of(nn, node, alone):
    """Return PyTorch's layer for a node; alone: nobody else reads its input, so it may be overwritten."""
    layer, shape = node.layer, node.inputs[0].shape
    if isinstance(layer, Conv2d):
        sizes = layer.size, layer.stride, layer.padding, layer.dilation, layer.groups
        return nn.Conv2d(shape[-1], layer.outputs, *sizes, bias=layer.bias)
    if isinstance(layer, BatchNorm):
        norm = nn.BatchNorm2d(shape[-1], layer.eps, layer.momentum)
        norm.weight.requires_grad_(layer.scale)
        norm.bias.requires_grad_(layer.shift)
        return norm
    if isinstance(layer, MaxPool):
        return nn.MaxPool2d(layer.size, layer.stride, layer.padding, ceil_mode=layer.ceil)
    if isinstance(layer, AvgPool):
        pads = bool(layer.include_pad)
        return nn.AvgPool2d(layer.size, layer.stride, layer.padding, layer.ceil, count_include_pad=pads)
    if isinstance(layer, Linear):
        linear = nn.Linear(int(np.prod(shape)), layer.outputs, bias=layer.bias)
        return nn.Sequential(nn.Flatten(), linear) if len(shape) > 1 else linear
    made = {
        ReLU: lambda: nn.ReLU(inplace=alone),
        GELU: nn.GELU,
        GlobalAvgPool: lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        Flatten: nn.Flatten,
        Dropout: lambda: nn.Dropout(layer.rate),
    }
    if type(layer) not in made:
        raise GpunetError(f"{node.path}: the peer has no {type(layer).__name__}")
    return made[type(layer)]()


def load(torch, module, graph, tensors):
    """Give the module gpunet's weights: {name: array} with gpunet's names and layouts."""
    for number, node in enumerate(graph.nodes):
        if not node.layer.parameters:
            continue
        part = module.get_submodule(f"n{number}")
        part = part[-1] if isinstance(part, torch.nn.Sequential) else part
        known = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
        for key, parameter in node.layer.parameters.items():
            if key not in known or parameter.name not in tensors:
                continue
            values = np.array(tensors[parameter.name], np.float32)
            values = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T
            with torch.no_grad():
                getattr(part, known[key]).copy_(torch.tensor(values.copy()))


class Resident:
    """The images and labels of a gpunet Source on PyTorch's device: padded, pixels last as they are."""

    def __init__(self, torch, source, device):
        pad = ((0, 0), (nets.PAD, nets.PAD), (nets.PAD, nets.PAD), (0, 0))
        self.images = torch.from_numpy(np.pad(source.split.images, pad)).to(device)
        self.labels = torch.from_numpy(source.labels.astype(np.int64)).to(device)
        self.order = torch.randperm(len(self.labels), device=device)


class Peer:
    """A training step in PyTorch. amp: the type of autocast; mode: that of torch.compile, None is eager."""

    def __init__(self, torch, graph, data, batch, device, *, channels_last=True, tf32=False, amp=None, mode=None):
        self.torch, self.data, self.batch, self.device = torch, data, batch, device
        self.tf32, self.channels_last, self.compiled = tf32, channels_last, mode is not None
        self.amp = getattr(torch, amp) if amp else None
        net = module_of(torch, graph).to(device).train()
        trained = [p for p in net.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        if count != graph.size:
            raise GpunetError(f"the peer is another net: expected {graph.size} weights, got {count}")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.call = torch.compile(self.net, mode=mode) if mode else self.net
        self.optimizer = torch.optim.SGD(
            trained, RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type) if amp == "float16" else None
        self.across = torch.arange(nets.SHAPE[1], device=device)
        self.at = 0

    def inputs(self):
        """Return (x, labels) of the next batch: gathered, cropped, flipped, normalised."""
        torch, n, device = self.torch, self.batch, self.device
        self.at = self.at + n if self.at + 2 * n <= len(self.data.order) else 0
        chosen = self.data.order[self.at : self.at + n]
        down, right = torch.randint(0, 2 * nets.PAD + 1, (2, n, 1), device=device).unbind()
        flip = torch.rand(n, 1, device=device) < 0.5
        rows = down + self.across
        columns = right + torch.where(flip, self.across.flip(0), self.across)
        x = self.data.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        x = (x.to(self.amp or torch.float32) - nets.MEAN) * nets.SCALE
        x = x.permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous(), self.data.labels[chosen]

    def run(self):
        """Do one training step."""
        torch = self.torch
        x, labels = self.inputs()
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss = torch.nn.functional.cross_entropy(self.call(x), labels)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def start(self, steps=3):
        """Do the first steps, in which cuDNN tries its algorithms and torch.compile compiles; return peak bytes."""
        on_gpu = self.device.type == "cuda"
        self._set_types()
        if on_gpu:
            self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated() if on_gpu else 0
        for _ in range(steps):
            self.run()
        self.wait()
        return self.torch.cuda.max_memory_allocated() - before if on_gpu else None

    def wait(self):
        """Wait for the device."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def time(self, count, call=None):
        """Return the milliseconds of a step (of a call), the mean of so many, by events where there is a GPU."""
        call = call or self.run
        self._set_types()
        call()
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                call()
            return 1e3 * (time.perf_counter() - start) / count
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / count

    def _set_types(self):
        """Allow TF32 or not; AMP leaves nothing in float32 that would ask."""
        if self.amp is None:
            self.torch.backends.cuda.matmul.allow_tf32 = self.tf32
            self.torch.backends.cudnn.allow_tf32 = self.tf32

    def predict(self, images):
        """Return the net's output in inference for images (n, h, w, c) as it takes them."""
        torch = self.torch
        self._set_types()
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        self.net.eval()
        with torch.no_grad():
            output = self.net(x).float().cpu().numpy()
        self.net.train()
        return output
