"""Time of one training step on the CPU: gpunet beside PyTorch, contiguous and channels_last, interleaved in one run.

    python benchmarks/step_cpu.py [--nets resnet9 cifar10_quick resnet20] [--batch 100] [--rounds 7] [--threads 2]
                                  [--write]

A step is forward, backward and an SGD update (momentum .9, decay 5e-4) in float32 on one fixed batch. Each round times
every contender once for about a second and takes the mean; printed is the median over rounds and the ratio of medians.
Ratios on a busy machine lie (PyTorch's barriers suffer more than ours), so the load of other processes is measured
before and after, and a run above 5 % of a core is marked.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
from results import machine, store

from gpunet import models
from gpunet.core.step import Step
from gpunet.nn import SoftmaxCrossEntropy
from gpunet.optim import SGD

NETS = {"resnet9": {"widths": (32, 64, 128, 256)}, "cifar10_quick": {}, "resnet20": {}}


def gpunet_step(name, batch, threads, x, y):
    """Return a call that does one gpunet step."""
    graph = models.build(name, **NETS[name])
    step = Step(graph, SoftmaxCrossEntropy(), SGD(1e-3, 0.9, 5e-4), batch=batch, replicas=threads)
    step.gradient(x, y)

    def run():
        step.gradient(x, y)
        step.update()

    return run


def torch_step(name, batch, threads, x, y, channels_last):
    """Return a call that does the same step in PyTorch, and how many weights the net has."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = torch_net(name)
    inputs = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    if channels_last:
        net, inputs = net.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    labels = torch.tensor(y)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=5e-4)
    loss_of = torch.nn.CrossEntropyLoss()

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss_of(net(inputs), labels).backward()
        optimizer.step()

    weights = models.build(name, **NETS[name]).size
    assert sum(p.numel() for p in net.parameters()) == weights, f"{name}: the peer is another net"
    return run


def torch_net(name):
    """Return the same network in PyTorch."""
    from torch import nn

    def cbr(i, o, s=1):
        return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    class Residual(nn.Module):
        def __init__(self, body, shortcut=None, relu=False):
            super().__init__()
            self.body, self.shortcut, self.relu = body, shortcut or nn.Identity(), relu

        def forward(self, x):
            y = self.body(x) + self.shortcut(x)
            return nn.functional.relu(y, inplace=True) if self.relu else y

    if name == "cifar10_quick":
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, 1, 2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 5, 1, 2), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(32, 64, 5, 1, 2), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10),
        )  # fmt: skip
    if name == "resnet9":
        a, b, c, d = NETS[name]["widths"]
        return nn.Sequential(
            cbr(3, a), cbr(a, b), nn.MaxPool2d(2), Residual(nn.Sequential(cbr(b, b), cbr(b, b))),
            cbr(b, c), nn.MaxPool2d(2), cbr(c, d), nn.MaxPool2d(2), Residual(nn.Sequential(cbr(d, d), cbr(d, d))),
            nn.MaxPool2d(4), nn.Flatten(), nn.Linear(d, 10),
        )  # fmt: skip
    layers, width = [cbr(3, 16)], 16
    for stage in (16, 32, 64):
        for i in range(3):
            stride = 2 if i == 0 and stage > 16 else 1
            body = nn.Sequential(
                cbr(width, stage, stride), nn.Conv2d(stage, stage, 3, 1, 1, bias=False), nn.BatchNorm2d(stage)
            )
            project = nn.Sequential(nn.Conv2d(width, stage, 1, stride, bias=False), nn.BatchNorm2d(stage))
            layers.append(Residual(body, project if stride == 2 else None, relu=True))
            width = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def others_load(seconds=0.5):
    """Return the share of one core that other processes used over some seconds (0 where no /proc/stat tells)."""

    def busy():
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4]

    if not Path("/proc/stat").exists():
        return 0.0
    before, started = busy(), time.perf_counter()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - started)


def mean_time(run, seconds):
    """Return the mean time of a call over about so many seconds."""
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds or count == 0:
        run()
        count += 1
    return passed / count


def measure(name, batch, threads, rounds, seconds):
    """Return {contender: [seconds a step, one a round]}."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, batch)
    contenders = {
        "gpunet": gpunet_step(name, batch, threads, x, y),
        "torch": torch_step(name, batch, threads, x, y, False),
        "torch channels_last": torch_step(name, batch, threads, x, y, True),
    }
    for run in contenders.values():
        mean_time(run, seconds)
    times = {c: [] for c in contenders}
    for _ in range(rounds):
        for c, run in contenders.items():
            times[c].append(mean_time(run, seconds))
    return times


def main():
    """Measure, print, and with --write store JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    load = others_load()
    measured = {}
    for name in arguments.nets:
        times = measured[name] = measure(name, arguments.batch, arguments.threads, arguments.rounds, arguments.seconds)
        medians = {c: statistics.median(t) for c, t in times.items()}
        row = ", ".join(f"{c} {1e3 * m:.1f} ms" for c, m in medians.items())
        ratio = medians["gpunet"] / medians["torch channels_last"]
        print(f"{name}, batch {arguments.batch}: {row}; gpunet / channels_last = {ratio:.2f}", flush=True)
    load = max(load, others_load())
    print(f"other processes used {load:.0%} of a core: {'quiet' if load <= 0.05 else 'NOT QUIET, ratios lie'}")
    if arguments.write:
        for name, times in measured.items():
            rounds = {
                c: {"median_ms": 1e3 * statistics.median(t), "rounds_ms": [1e3 * s for s in t]}
                for c, t in times.items()
            }
            conditions = {"batch": arguments.batch, "threads": arguments.threads, "others_load": load}
            store("step_cpu", name, {**machine("torch"), **conditions, "times": rounds})


if __name__ == "__main__":
    main()
