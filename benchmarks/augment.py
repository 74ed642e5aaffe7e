"""What each transform of a batch costs on the CPU, as a share of a training step of cifar10_quick.

    python benchmarks/augment.py [--batch 100] [--rounds 7] [--only rotate elastic] [--write]

The step is forward, backward and an SGD update in float32 on one thread, on a fixed batch; what is beside it makes a
batch from 10,000 resident images of 32x32x3 uint8. Each round times everything once, printed are medians over rounds.
Demanded of flip and crop, the plain path: at most 3 %. Other processes make all of this larger, and shares wrong.
"""

import argparse
import os
import statistics
import time
from contextlib import closing

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

import numpy as np
from results import machine, store

from gpunet import models
from gpunet.core.augmentation import AUGMENTATIONS, Augmentation
from gpunet.core.batches import Batches
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.nn import SoftmaxCrossEntropy
from gpunet.optim import SGD
from gpunet.train.text import columns

DEMANDED = 0.03
IMAGES, SECONDS = 10_000, 0.2  # a round of a transform

LINES = {
    "nothing": {},
    "flip and crop": {"flip": True, "crop": 4},
    "alternate and crop": {"alternate": True, "crop": 4},
    **{name: transform.example for name, transform in AUGMENTATIONS.items() if name not in ("flip", "crop")},
    **{f"rotate, {name}": {"rotate": 25.0, "interpolation": name} for name in ("nearest", "area", "cubic")},
    "all colours": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1, "lighting": 0.1},
    "flip, crop, cutout": {"flip": True, "crop": 4, "cutout": 16},
}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(LINES), metavar="LINE", default=list(LINES))
    parser.add_argument("--write", action="store_true", help="store the figures in results/")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8), rng.integers(0, 10, IMAGES).astype(np.int32))
    step = step_of(given.batch, split)
    calls = {name: batches_of(given.batch, split, LINES[name]) for name in given.only}
    times = {name: [] for name in ("step", *calls)}
    with closing(step):
        for _ in range(given.rounds):
            for name, call in {"step": lambda _: step(), **calls}.items():
                times[name].append(mean(call))
    medians = {name: statistics.median(found) for name, found in times.items()}
    if given.write:
        figures = {name: {"median_ms": 1e3 * medians[name], "min_ms": 1e3 * min(found), "max_ms": 1e3 * max(found)}
                   for name, found in times.items()}  # fmt: skip
        store("augment", "cifar10_quick", {**machine(), "batch": given.batch, "rounds": given.rounds, "times": figures})
    whole = medians.pop("step")
    rows = [("a batch of cifar10_quick", "ms", "of a step"), ("the step", f"{whole * 1e3:.2f}", "")]
    rows += [(name, f"{found * 1e3:.2f}", f"{found / whole:.1%}") for name, found in medians.items()]
    print(columns(rows, 1))
    if (share := medians.get("flip and crop", 0) / whole) > DEMANDED:
        print(f"flip and crop: {share:.1%} of a step, more than the {DEMANDED:.0%} that is demanded")


def step_of(batch, split):
    """Return the network's Step on a source that changes nothing."""
    source = Source(split, 120.0, 1 / 60, classes=10, order="stored")
    graph = models.build("cifar10_quick")
    return Step(graph, SoftmaxCrossEntropy(), SGD(1e-3, 0.9, 5e-4), batch=batch, replicas=1, source=source)


def batches_of(batch, split, keys):
    """Return a call that makes batch number i."""
    return Batches(Source(split, 120.0, 1 / 60, classes=10, augmentation=Augmentation(**keys)), batch).draw


def mean(call):
    """Return the mean seconds of calls with 0, 1, 2 ...; the first, which binds, is not counted."""
    call(0)
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS or count < 2:
        count += 1
        call(count)
    return passed / count


if __name__ == "__main__":
    main()
