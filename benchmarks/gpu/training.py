"""A net's training step as the report takes it apart: what one call of Step replays, launch by launch.

It looks inside Step and Replay; nobody else in benchmarks does.
"""

import numpy as np

from gpu import nets
from gpunet.core.step import Step
from gpunet.nn import SoftmaxCrossEntropy
from gpunet.optim import SGD

SETTLE = 12  # steps at most until a half-precision run has found its loss scale
RATE, MOMENTUM, DECAY = 1e-4, 0.9, 5e-4  # a rate so small that weights stay as they are while they are measured


class Training:
    """Step of a net on random images, trained by SGD with Nesterov's momentum; `keys` are one step's programs."""

    def __init__(self, bench, net, batch, dtype, images):
        self.bench = bench
        self.source = nets.source(images)
        self.step = Step(
            nets.build(net, bench.quick),
            SoftmaxCrossEntropy(),
            SGD(RATE, MOMENTUM, DECAY, nesterov=True),
            batch=batch,
            dtype=dtype,
            backend=bench.backend,
            source=self.source,
        )
        self.planned = sum(self.step.memory().values())  # asked for first: it traces, so nothing is allocated twice
        self._replay = self.step._replay
        self._spare = None
        self.keys = self.evaluation = self.order = ()

    def start(self):
        """Do the first steps, which compile and bind, until updates are applied; return the Training."""
        first, second = self._seen(self.step), self._seen(self.step)
        self.keys = second[-1]
        self.order = [key for key in first[-1] if key not in self.keys]
        for _ in range(SETTLE):
            if self.applied:
                break
            self.run()
        return self

    @property
    def applied(self):
        """Whether the last update was applied: in half precision one whose gradient overflows is not."""
        return bool(self.step.state["apply"])

    def start_evaluation(self):
        """Evaluate the images once and remember the programs."""
        self.evaluation = self._seen(lambda: self.step.evaluate(self.source))[-1]

    def _seen(self, call):
        """Return the lists of keys that a call has replayed."""
        seen, run = [], self._replay.run

        def spy(keys):
            seen.append(list(keys))
            run(keys)

        self._replay.run = spy
        try:
            call()
        finally:
            del self._replay.run
        return seen

    def run(self):
        """Replay one step: batch, gradient, update, advance; as Step does, but never a new epoch's order."""
        self._replay.run(self.keys)

    def names(self):
        """Return the kernels of all programs known so far."""
        programs = self._replay._programs.values()
        return {e.name for p in programs for e in p[0].plan.entries if e.kind == "launch"}

    def entries(self, kind):
        """Return the entries of a kind of all programs known so far."""
        return [e for p in self._replay._programs.values() for e in p[0].plan.entries if e.kind == kind]

    def bound(self, key):
        """Return [(entry, call)] of a program."""
        calls = self._replay._bind(key)[0].calls
        return list(zip(self._replay.program(key)[0].plan.entries, calls, strict=True))

    def walk(self, keys, wanted=lambda entry: True, rounds=3):
        """Return [(entry, milliseconds)] of the wanted entries of programs, which run entry by entry, in order.

        A wanted one is repeated where it stands, so that it reads what it would read. What it writes is put back
        afterwards and it runs once more: to those behind it nothing has happened, also where it works in place.
        """
        found = []
        with np.errstate(all="ignore"):  # as in a replay
            for key in keys:
                for entry, call in self.bound(key):
                    if not wanted(entry):
                        call()
                        continue
                    kept = self._outputs(key, entry)
                    self._copy_outputs(kept)
                    found.append((entry, self.bench.measure(call, rounds)))
                    self._copy_outputs(kept, back=True)
                    call()
                self.bench.backend.synchronize()
        return found

    def _outputs(self, key, entry):
        """Return [(address, bytes)] of what an entry writes."""
        program, found = self._replay.program(key)[0], []
        for tensor in entry.writes:
            view = self._replay._view(program, 0, tensor)
            steps = zip(view.shape, view.element_strides, strict=True)
            span = 1 + sum((n - 1) * step for n, step in steps) if view.size else 0
            found.append((view.pointer, span * view.dtype.itemsize))
        return found

    def _copy_outputs(self, outputs, back=False):
        """Copy outputs to spare memory, or back from it."""
        needed = sum(nbytes for _, nbytes in outputs)
        if self._spare is None or self._spare.nbytes < needed:
            self._spare = self.bench.backend.allocate(needed)
        place = self._spare.pointer
        for pointer, nbytes in outputs:
            self.bench.copy(*((pointer, place) if back else (place, pointer)), nbytes)
            place += nbytes
