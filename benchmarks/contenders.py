"""The contenders of a step on the CPU, each doing the same on one batch: gpunet's engines, and PyTorch in its ways.

A contender has `step()`, forward, backward and an SGD update (momentum .9, decay 5e-4) in float32; `forward()`, the
network in inference; and `layers(steps)`, {(layer, part): seconds a step}.
"""

import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
from gpu.peer import load, module_of

from gpunet import models
from gpunet.backends.numpy import Backend
from gpunet.core.observe import Profile
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Add, SoftmaxCrossEntropy
from gpunet.optim import SGD

NETS = {
    "resnet9": {"widths": (32, 64, 128, 256)},
    "cifar10_quick": {"init": "he"},  # a batch of noise, not of raw pixels
    "resnet20": {},
    "airbench94": {"widths": (32, 128, 128)},
}
RATE, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4


class Unfolding(Backend):
    """The NumPy backend whose convolutions are the portable engine's: the whole unfolded input is in memory."""

    def engine(self, types):
        """Return that engine."""
        return "unfold"


GPUNET = {
    "gpunet numba": lambda: Backend(numba=True),
    "gpunet": lambda: Backend(numba=False),
    "gpunet unfold": lambda: Unfolding(numba=False),
}
TORCH = {
    "torch": {"channels_last": False},
    "torch channels_last": {"channels_last": True},
    "torch compile": {"channels_last": True, "compiled": True},
}
TIMED = ("gpunet numba", "gpunet", *TORCH)
MEASURED = ("gpunet unfold", "gpunet", "gpunet numba", "torch channels_last")  # their memory


def build(net):
    """Return the gpunet graph of a name in NETS."""
    return models.build(net, **NETS[net])


def batch_of(graph, count):
    """Return (x, labels): noise, as a network takes it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *graph.input_shape)).astype(np.float32)
    return x, rng.integers(0, graph.output_shape[-1], count)


def make(name, graph, batch, threads):
    """Return the contender of a name; raises GpunetError with the reason where it cannot run here."""
    kind = Gpunet if name in GPUNET else Torch
    return kind(name, graph, batch, threads)


class Gpunet:
    """A Step on one of gpunet's engines."""

    def __init__(self, name, graph, batch, threads):
        backend = GPUNET[name]()
        if backend.numba:
            try:
                import numba  # noqa: F401 - the engine imports it later, and says less
            except ImportError as error:
                raise GpunetError(f"{name}: {error}") from None
        self.x, self.y = batch_of(graph, batch)
        optimizer = SGD(RATE, MOMENTUM, DECAY)
        self.made = Step(graph, SoftmaxCrossEntropy(), optimizer, batch=batch, replicas=threads, backend=backend)

    def step(self):
        self.made.gradient(self.x, self.y)
        self.made.update()

    def forward(self):
        return self.made.predict(self.x)

    def layers(self, steps):
        seen, own = Profile(), {node.path for node in self.made.graph.nodes}
        with self.made.observed(seen):
            for _ in range(steps):
                self.step()
        found = defaultdict(float)
        for event in seen.events:
            part = event.phase if event.entry.path in own else ""
            found[event.entry.path, part] += (event.stop - event.start) / steps / self.made.replicas
        return dict(found)

    def close(self):
        self.made.close()


class Torch:
    """The same network in PyTorch, with the same first weights."""

    def __init__(self, name, graph, batch, threads):
        try:
            import torch
        except ImportError as error:
            raise GpunetError(f"{name}: {error}") from None
        options, self.torch, self.graph = TORCH[name], torch, graph
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        x, labels = batch_of(graph, batch)
        self.x = torch.tensor(x.transpose(0, 3, 1, 2).copy()).to(memory_format=layout)
        self.labels, self.loss_of = torch.tensor(labels), torch.nn.CrossEntropyLoss()
        net = module_of(torch, graph)
        first = Step(graph, batch=1, replicas=1)
        load(torch, net, graph, first.weights)
        first.close()
        for number, node in enumerate(graph.nodes):
            if any(p.frozen for p in node.layer.parameters.values()):
                net.get_submodule(f"n{number}").weight.requires_grad_(False)
        trained = [p for p in net.parameters() if p.requires_grad]
        expected, found = first.layouts["weights"], sum(p.numel() for p in trained)
        if found != sum(p.size for p in expected.parameters.values()):
            raise GpunetError(f"{name}: the peer is another net")
        self.net = net.to(memory_format=layout)
        self.optimizer = torch.optim.SGD(trained, RATE, MOMENTUM, weight_decay=DECAY)
        self.call = self._compiled(name) if options.get("compiled") else self.net

    def _compiled(self, name):
        call = self.torch.compile(self.net)
        try:
            self.loss_of(call(self.x), self.labels).backward()
            self.net.eval()
            with self.torch.no_grad():
                call(self.x)
            self.net.train()
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise GpunetError(f"{name}: does not compile here: {lines[0]}") from None
        return call

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_of(self.call(self.x), self.labels).backward()
        self.optimizer.step()

    def forward(self):
        self.net.eval()
        with self.torch.no_grad():
            output = self.call(self.x)
        self.net.train()
        return output.numpy()

    def layers(self, steps):
        """A layer's backward lasts from its output's gradient until the next one's: on a CPU one follows another."""
        found = defaultdict(float)
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            marks = []
            output = _timed(self.torch, self.net, self.graph, found, marks)(self.x)
            loss = _add(found, ("loss", ""), lambda output=output: self.loss_of(output, self.labels))
            marks.clear()
            loss.backward()
            marks.append((None, time.perf_counter()))
            for (path, start), (_, stop) in pairwise(marks):
                found[path, "backward"] += stop - start
            _add(found, ("optimizer", ""), self.optimizer.step)
        return {key: seconds / steps for key, seconds in found.items()}

    def close(self):
        """Nothing runs on."""


def _timed(torch, net, graph, found, marks):
    """Return a call of the network that adds each node's time to `found`; backward puts (path, time) into `marks`."""
    paths = [n.path for n in graph.nodes for _ in range(len(n.inputs) - 1 if isinstance(n.layer, Add) else 1)]
    nodes = [n for n in net.graph.nodes if n.op not in ("placeholder", "output")]
    path_of = dict(zip(nodes, paths, strict=True))

    class Timed(torch.fx.Interpreter):
        def run_node(self, n):
            if n not in path_of:
                return super().run_node(n)
            result = _add(found, (path_of[n], "forward"), lambda: super(Timed, self).run_node(n))
            if result.requires_grad:
                result.register_hook(lambda _: marks.append((path_of[n], time.perf_counter())))
            return result

    return Timed(net).run


def _add(found, key, call):
    started = time.perf_counter()
    result = call()
    found[key] += time.perf_counter() - started
    return result
