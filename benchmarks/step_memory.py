"""How much memory a contender's training steps take, beyond what its imports took: one number of bytes, on stdout.

    python benchmarks/step_memory.py 'torch channels_last' resnet9 100 2

A process of its own for each, for memory that was once touched is not given back. step_cpu.py starts it.
"""

import re
import sys
from pathlib import Path

import contenders

STEPS = 3


def status(key, text=None):
    """Return bytes of this process: VmRSS, what is held now, or VmHWM, the most that ever was."""
    text = Path("/proc/self/status").read_text() if text is None else text
    return 1024 * int(re.search(rf"^{key}:\s*(\d+) kB$", text, re.M)[1])


def growth(name, net, batch, threads):
    """Return the most bytes that some steps held at a time, without those from before them."""
    if name in contenders.TORCH:
        import torch  # noqa: F401
    elif contenders.GPUNET[name]().numba:
        import numba  # noqa: F401
    graph, before = contenders.build(net), status("VmRSS")
    contender = contenders.make(name, graph, batch, threads)
    for _ in range(STEPS):
        contender.step()
    contender.close()
    return status("VmHWM") - before


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
