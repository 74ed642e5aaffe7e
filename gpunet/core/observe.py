"""Observers: what looks into a replay, entry by entry. Knows lists and numbers; no layer, no backend.

    check = CheckFinite()
    with step.observed(check):
        step.gradient(x, y)
    print(check.fault)          # stage1.conv: forward: blocked_forward: out: 3 of 51,200 values are not finite ...

Under observers nothing is captured, and each entry is waited for; without them a replay is what it always is.
"""

import time
from dataclasses import dataclass

import numpy as np

LOSS, BATCH = "loss", "batch"  # the paths under which Step traces these
COLLECTIVES = ("reduce", "barrier")  # entries in which all replicas meet


@dataclass(frozen=True)
class Output:
    """A tensor that an entry wrote: the argument's name, shape, dtype, and `array()`, a host copy of it."""

    name: str
    shape: tuple
    dtype: np.dtype
    array: object


class Observer:
    """Called around each entry of a replay, by every replica in its own thread. Subclasses override what they need."""

    def begin(self, replay, keys):
        """Be told which programs are to run next; their memory is there."""

    def before(self, key, entry, replica):
        """Look before an entry of program `key` runs in a replica."""

    def after(self, key, entry, outputs, replica):
        """Look at the Outputs of an entry that has run."""


class Poison(Observer):
    """Fills the scratch memory with NaN before every run: what is read before it is written shows."""

    def begin(self, replay, keys):
        """Spoil it."""
        replay.spoil()


@dataclass(frozen=True)
class Fault:
    """The first entry whose output is not finite. run: number of gradients before it; index: of the first such value.

    phase: batch, forward, loss or backward in a gradient, else the kind of program.
    """

    path: str
    phase: str
    kernel: str
    argument: str
    shape: tuple
    nan: int
    inf: int
    index: tuple
    replica: int
    run: int

    def __str__(self):
        size = int(np.prod(self.shape, dtype=np.int64))
        kinds = " and ".join(f"{count:,} {kind}" for count, kind in ((self.nan, "NaN"), (self.inf, "Inf")) if count)
        where = f", the first at {list(self.index)}" if self.index else ""
        place = self.path if self.path == self.phase else f"{self.path}: {self.phase}"
        return (
            f"{place}: {self.kernel}: {self.argument}: {self.nan + self.inf:,} of {size:,} values are not finite "
            f"({kinds}){where}"
        )


class CheckFinite(Observer):
    """Finds the first entry whose output is not finite: `fault`, or None.

    A replica that found one looks no further, but runs on: the others wait for it where sums cross the batch. Of two
    replicas' faults the earlier entry's counts. Rows of padding have targets of NaN (evaluation): not for those.
    """

    def __init__(self):
        self._found, self._place, self._phases, self._run = {}, {}, {}, -1

    @property
    def fault(self):
        """The first Fault of all replicas."""
        return min(self._found.values(), key=lambda found: found[0])[1] if self._found else None

    def begin(self, replay, keys):
        """Learn which part of its program every entry is."""
        self._run += any(key[0] == "gradient" for key in keys)
        for key in keys:
            for program in replay.program(key):
                self._phases.update(phases(key, program.plan.entries))

    def after(self, key, entry, outputs, replica):
        """Look at what the entry wrote, unless something was found before."""
        met, since = self._place.get(replica, (0, 0))
        self._place[replica] = (met + 1, 0) if entry.kind in COLLECTIVES else (met, since + 1)
        if replica in self._found:
            return
        for output in outputs:
            if found := unfinite(output.array()):
                nan, inf, index = found
                about = (entry.path, self._phases[entry], entry.name, output.name)
                fault = Fault(*about, output.shape, nan, inf, index, replica, self._run)
                self._found[replica] = (*self._place[replica], replica), fault
                return


def unfinite(array):
    """Return (NaN, Inf, index of the first of them) of an array; None if it is finite, or no array of numbers."""
    if array.dtype.names or array.dtype.kind in "iub":
        return None
    finite = np.isfinite(array)
    if finite.all():
        return None
    nan = int(np.isnan(array).sum())
    index = np.unravel_index(int(np.argmin(finite)), array.shape)
    return nan, int(array.size - finite.sum()) - nan, tuple(map(int, index))


def phases(key, entries):
    """Return {entry: phase}: of a gradient batch, forward, loss or backward; elsewhere the kind of program."""
    found, phase = {}, "forward"
    for entry in entries:
        if key[0] != "gradient":
            phase = key[0]
        elif entry.path == LOSS:
            phase = "loss"
        elif phase == "loss":
            phase = "backward"
        found[entry] = BATCH if entry.path == BATCH and key[0] == "gradient" else phase
    return found


@dataclass(frozen=True)
class Event:
    """One entry that ran: from `start` to `stop` in seconds of time.perf_counter."""

    key: tuple
    entry: object
    phase: str
    replica: int
    start: float
    stop: float


class Profile(Observer):
    """Times every entry: `events`. A replica that waits for others spends that time in the entry that waits."""

    def __init__(self):
        self.events = []
        self._start, self._phases = {}, {}

    def begin(self, replay, keys):
        """Learn which part of its program every entry is."""
        for key in keys:
            for program in replay.program(key):
                self._phases.update(phases(key, program.plan.entries))

    def before(self, key, entry, replica):
        """Start the clock."""
        self._start[replica] = time.perf_counter()

    def after(self, key, entry, outputs, replica):
        """Stop it."""
        stop = time.perf_counter()
        self.events.append(Event(key, entry, self._phases[entry], replica, self._start[replica], stop))
