"""Programs planned, bound to memory and replayed in all replicas.

A program is known by a key; `trace(key, replica)` makes one replica's list. All share one scratch memory a replica,
as large as the largest plan: nothing in it outlives a replay. Debugging is a mode of replay: with `observers` the same
calls are made, and between them the observers look (gpunet.core.observe).
"""

from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np

from gpunet.core.arenas import room
from gpunet.core.observe import COLLECTIVES, Output
from gpunet.core.plan import Plan, plan
from gpunet.core.replicas import Team
from gpunet.core.trace import Base, Tensor, Trace


@dataclass
class Program:
    """One replica's list and its plan. `idle` names arenas to clear instead, where a batch has no image for it."""

    trace: Trace
    plan: Plan
    idle: tuple | None


@dataclass
class Bound:
    """One replica's calls of a program, the entry (or None) that each belongs to, and the views of what it keeps."""

    calls: list
    entries: list
    kept: dict


class Replay:
    """Runs programs by key; traces, plans and binds each when it is first needed."""

    def __init__(self, backend, arenas, trace):
        self.backend, self.arenas = backend, arenas
        self._trace = trace
        self._programs, self._bound, self._graphs = {}, {}, {}
        self._scratch = []
        self._workspaces = []
        self._team = None
        self._kept = [{}] * arenas.replicas
        self.observers = ()

    def program(self, key):
        """Return every replica's program, traced and planned but bound to no memory."""
        if key not in self._programs:
            traced = [self._trace(key, r) for r in range(self.arenas.replicas)]
            self._programs[key] = [Program(t, plan(t.entries, t.kept.values()), idle) for t, idle in traced]
        return self._programs[key]

    def scratch_bytes(self):
        """Return the scratch memory that one replica needs for the programs known so far."""
        return max((p.plan.nbytes for programs in self._programs.values() for p in programs), default=0)

    def run(self, keys):
        """Replay programs one after another in every replica, in one go."""
        self._kept = [{}] * self.arenas.replicas  # what it names is about to be overwritten
        for key in keys:
            self.program(key)
        needed = self.scratch_bytes()
        if not self._scratch or self._scratch[0].nbytes < needed:
            self._bound, self._graphs, self._scratch = {}, {}, []  # freed before the larger one is taken
            with room(f"scratch of {needed:,} bytes a replica"):
                self._scratch = [self.backend.allocate(needed) for _ in range(self.arenas.replicas)]
        if self._team is None:
            with room(f"{self.arenas.replicas} replicas"):
                self._workspaces = [self.backend.workspace() for _ in range(self.arenas.replicas)]
                self._team = Team(self.arenas.replicas, self.backend.blas)
        bound = [self._bind(key) for key in keys]
        if self.observers:
            self._team.run(self._observed(keys, bound))
        else:
            lists = [[call for b in bound for call in b[r].calls] for r in range(self.arenas.replicas)]
            self._team.run(self._as_graph(tuple(keys), lists) if self.backend.graphs else lists)
        self._kept = [{k: v for b in bound for k, v in b[r].kept.items()} for r in range(self.arenas.replicas)]

    def _as_graph(self, keys, lists):
        """Return the lists themselves the first time, then one launch of a graph captured from them."""
        if keys not in self._graphs:
            self._graphs[keys] = None
            return lists
        if self._graphs[keys] is None:
            self._graphs[keys] = [[self.backend.capture(calls)] for calls in lists]
        return self._graphs[keys]

    def _observed(self, keys, bound):
        """Return the lists with calls of the observers around each entry; an entry is done before `after` is called.

        A graph's calls are made one by one then, each waited for.
        """
        self.backend.synchronize()
        for observer in self.observers:
            observer.begin(self, keys)
        return [
            [
                call
                for key, replicas in zip(keys, bound, strict=True)
                for call in self._around(key, replicas[r], self._programs[key][r], r)
            ]
            for r in range(self.arenas.replicas)
        ]

    def _around(self, key, bound, program, replica):
        """Yield the calls of one program in one replica, and the observers' around each entry."""
        outputs = self._outputs(program, replica)
        pairs = zip(bound.entries, bound.calls, strict=True)
        for _, group in groupby(pairs, lambda pair: id(pair[0])):
            entry, calls = (group := list(group))[0][0], [call for _, call in group]
            if entry is None:
                yield from calls
                continue
            yield from (partial(o.before, key, entry, replica) for o in self.observers)
            yield from calls
            yield self.backend.synchronize
            yield from (partial(o.after, key, entry, outputs[entry], replica) for o in self.observers)

    def _outputs(self, program, replica):
        """Return {entry: [Output]}: what is whole then, and read afterwards.

        Workspace that an engine declares is never read. What launches of one kernel write by parts (concat_forward) is
        whole after the last of them.
        """
        read, found, writer = {t.base for t in program.trace.kept.values()}, {}, {}
        for entry in reversed(program.plan.entries):
            found[entry] = [
                Output(name, t.shape, t.dtype, partial(self._fetch, program, replica, t))
                for name, t in zip(_output_names(entry), entry.writes, strict=True)
                if t.base.arena is not None or (t.base in read and writer.get(t.base) != entry.name)
            ]
            writer.update({t.base: entry.name for t in entry.writes if entry.kind == "launch"})
            writer.update(dict.fromkeys((t.base for t in entry.reads), None))
            read.update(t.base for t in entry.reads)
        return found

    def _fetch(self, program, replica, tensor):
        """Return a host copy of a tensor, also of one whose elements do not follow each other."""
        if tensor.contiguous:
            return self.backend.download(self._view(program, replica, tensor))
        span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)) + 1
        flat = Tensor(tensor.base, (span,), tensor.dtype, tensor.offset)
        host = self.backend.download(self._view(program, replica, flat))
        return np.lib.stride_tricks.as_strided(host, tensor.shape, [s * host.itemsize for s in tensor.strides])

    def spoil(self):
        """Fill the scratch memory with NaN, of whatever type it is read as."""
        for memory in self._scratch:
            nbytes = self.scratch_bytes()
            view = self.backend.view(memory, 0, Tensor(Base(nbytes), (nbytes,), np.dtype(np.uint8)))
            self.backend.upload(view, np.uint8(0xFF))

    def largest(self, count=5):
        """Return [(bytes, path)] of the largest tensors in the largest program known so far."""
        programs = [p for programs in self._programs.values() for p in programs]
        plan = max(programs, key=lambda p: p.plan.nbytes).plan
        bases = sorted(plan.spans, key=lambda base: -base.nbytes)
        return [(base.nbytes, base.path) for base in bases[:count]]

    def kept(self):
        """Return the names of the tensors that the last run left readable."""
        return sorted({name for views in self._kept for name in views})

    def read(self, name):
        """Return a kept tensor of the last run, the replicas' images one after another."""
        parts = [self.backend.download(views[name]) for views in self._kept if name in views]
        return np.concatenate(parts) if parts[0].ndim else parts[0]

    def close(self):
        """End the replicas' threads."""
        if self._team is not None:
            self._team.close()
            self._team = None
            self._bound, self._graphs = {}, {}

    def _bind(self, key):
        if key not in self._bound:
            programs = self.program(key)
            launches = [e for p in programs for e in p.plan.entries if e.kind == "launch"]
            self.backend.prepare([(e.kernel, e.arguments) for e in launches])
            self._bound[key] = [self._bind_replica(programs, r) for r in range(len(programs))]
        return self._bound[key]

    def _bind_replica(self, programs, replica):
        program, calls, owners = programs[replica], [], []
        entries = program.plan.entries
        if program.idle is not None:
            for arena in program.idle:
                view = self.arenas.view(arena, replica)
                calls.append(lambda view=view: self.backend.upload(view, np.zeros((), view.dtype)))
            entries = [e for e in entries if e.kind in COLLECTIVES]
            calls += [self._team.wait] * len(entries)
            return Bound(calls, [None] * len(calls), {})
        for i, entry in enumerate(entries):
            if entry.kind in COLLECTIVES:
                calls.append(self._team.wait)
            if entry.kind == "reduce":
                calls.append(self._bind_reduce(programs, replica, i))
            elif entry.kind != "barrier":
                calls.append(self._bind_entry(program, replica, entry))
            owners += [entry] * (len(calls) - len(owners))
        return Bound(calls, owners, {name: self._view(program, replica, t) for name, t in program.trace.kept.items()})

    def _bind_entry(self, program, replica, entry):
        views = [self._view(program, replica, a) if hasattr(a, "base") else a for a in entry.arguments]
        workspace = self._workspaces[replica]
        if entry.kind == "launch":
            return self.backend.bind_launch(entry.kernel, views, workspace)
        if entry.kind == "matmul":
            return self.backend.bind_matmul(*views, entry.options["accumulate"], entry.options["compute"], workspace)
        return self.backend.bind_call(entry.name, views, entry.options, workspace)

    def _bind_reduce(self, programs, replica, index):
        entry = programs[replica].plan.entries[index]
        given, out = entry.arguments
        others = [(r, p) for r, p in enumerate(programs) if p.idle is None]
        if given is out:  # this replica's part of everybody's arena
            views = [self._view(programs[replica], r, given) for r, _ in others]
        else:
            views = [self._view(p, r, p.plan.entries[index].arguments[0]) for r, p in others]
        return self.backend.bind_reduce(entry.name, views, self._view(programs[replica], replica, out))

    def _view(self, program, replica, tensor):
        base = tensor.base
        if base.arena is not None:
            return self.backend.view(self.arenas.memory(base.arena, replica), 0, tensor)
        return self.backend.view(self._scratch[replica], program.plan.offsets[base], tensor)


def _output_names(entry):
    """Return the name of each tensor that an entry writes: the kernel's argument, or what there is to say."""
    if entry.kind == "launch":
        return [a.name for a in entry.kernel.arguments if a.output]
    return ["out", *(f"out {number}" for number in range(2, len(entry.writes) + 1))][: len(entry.writes)]
