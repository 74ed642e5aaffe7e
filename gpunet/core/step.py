"""Step: a network's programs at a fixed batch size, replayed.

The Trainer, custom training loops and tests use this class and nothing below it:

    step = Step(graph, loss, optimizer, batch=128, source=source)
    step()                              # gradient, update, advance: one training step
    step.gradient(x, y); step.update(); step.advance()  # the same on the caller's own arrays
    step.predict(x); step.read("stage1.conv.weight:gradient")
"""

from contextlib import contextmanager, nullcontext

import numpy as np

from gpunet.core.arenas import Arenas, Tensors, room
from gpunet.core.backend import ENGINES, Types
from gpunet.core.params import BLOCK, Layout
from gpunet.core.replay import Replay
from gpunet.core.state import LOSS_SCALE, STATE, new_state
from gpunet.core.trace import Share, Trace
from gpunet.core.window import Window
from gpunet.errors import GpunetError

# The columns of the table, then a stamp.
METRICS = ("loss", "accuracy", "count", "norm", "rate", "scale", "penalty", "applied", "batch")
APPLIED = METRICS.index("applied")
LONG = 32  # batches that one launch of a graph takes at most
ROWS = 4096  # updates the metrics table remembers


class Step:
    """Training and inference programs of `graph` at a fixed batch size.

    loss: traces d(prediction) from prediction and targets. optimizer: traces the update. rates: learning rate of each
    update, the last one holds on. dtype: what activations are stored in and products computed from, "float32", "tf32",
    "float64", "float16" or "bfloat16"; weights stay float32 (float64). replicas: CPU threads, one a core unless told.
    source: where `gradient()` draws its batches. keep: patterns of tensors that `read` returns after a replay, such
    as "stage1.*:output", "head:output_gradient" or "input:gradient". backend: an object, or a name ("auto": the GPU
    where there is one); one that fuses layers keeps no outputs between those. What is kept is read after `gradient`
    or `predict`: an `update` behind it may use the same memory. average: traces an average of the weights behind the
    optimizer; `predict`, `evaluate` and checkpoints then take it in place of the weights. engine: what computes
    convolutions, "unfold", "blocked", "winograd" or "direct", where it can (`engines` tells); None or "auto": the
    backend's choice.
    """

    def __init__(self, graph, loss=None, optimizer=None, *, batch, dtype="float32", backend="numpy", replicas=None,
                 seed=0, source=None, rates=None, keep=(), average=None, engine=None):  # fmt: skip
        self.backend = _named(backend) if isinstance(backend, str) else backend
        self.graph = graph.fused() if self.backend.fuses else graph
        self.loss, self.optimizer, self.average = loss, optimizer, average
        self.batch, self.seed, self.source, self.keep = batch, seed, source, tuple(keep)
        self.engine = None if engine == "auto" else engine
        self._check(batch, source)
        self.slots = (*getattr(optimizer, "slots", ()), *["average"] * (average is not None))
        if len(set(self.slots)) < len(self.slots):
            raise GpunetError(f"average: {type(optimizer).__name__} keeps an average itself; expected None")
        self.types = Types.of(dtype)
        self.replicas = max(1, min(replicas or self.backend.replicas, batch))
        parameters = graph.parameters()
        self.layouts = {
            "weights": Layout(p for p in parameters if p.trainable and not p.frozen),
            "statistics": Layout(p for p in parameters if not p.trainable and not p.frozen),
        }
        if any(p.frozen for p in parameters):
            self.layouts["frozen"] = Layout(p for p in parameters if p.frozen)
        rates = rates if rates is not None else getattr(optimizer, "lr", 0.0)
        self.rates = np.atleast_1d(np.asarray(rates, np.float64))
        self._arenas = Arenas(self.backend, self.replicas)
        self._replay = Replay(self.backend, self._arenas, self._trace)
        self._sources, self._windows = {}, {}
        self._ordered = None  # epoch whose order is drawn
        self._batch = 0  # state["batch"], known without asking the device
        self._declare()

    def _check(self, batch, source):
        if batch < 1:
            raise GpunetError(f"batch: expected at least 1, got {batch}")
        if self.engine is not None and self.engine not in ENGINES:
            raise GpunetError(f"engine: expected one of auto, {', '.join(ENGINES)}, got {self.engine!r}")
        if source is None:
            return
        if source.shape != self.graph.input_shape:
            raise GpunetError(f"{source.name}: expected images of shape {self.graph.input_shape}, got {source.shape}")
        if batch > len(source):
            raise GpunetError(f"batch: expected at most {len(source)}, the images of {source.name}, got {batch}")
        columns = self.graph.output_shape[-1]
        if source.width != columns:
            raise GpunetError(
                f"{source.name}: expected targets of {columns} columns, as the network's output has, got {source.width}"
            )

    # Programs

    def __call__(self, accumulate=1, steps=1):
        """Do training steps, each on the source's next `accumulate` batches: gradient and advance of each, one update.

        On a backend with graphs all that one call does is one launch, and it returns before the device is done.
        """
        keys = []
        for number in range(1, steps * accumulate + 1):
            self._enter(self.source, self._batch, keys)
            keys += self._next_gradient(number % accumulate != 1 % accumulate)
            keys += [("update",)] * (number % accumulate == 0) + [("advance", self.source.name)]
            self._batch += 1
            if accumulate > LONG:  # a graph of a whole epoch's batches would be too large
                self._run(keys)
                keys = []
        self._run(keys)

    def gradient(self, x=None, y=None, *, accumulate=False):
        """Compute loss and gradients of x (n, h, w, c) and y, labels (n,) or targets (n, k), or of the next batch.

        x: floats as the network takes them, or uint8 pixels of the source. accumulate: add to the gradients that are
        there. No weight, statistic or counter changes.
        """
        if x is None:
            keys = self._next_gradient(accumulate)
            self._enter(self.source, self._batch, [])
            self._run(keys)
            return
        x, y = self._check_inputs(np.asarray(x), np.asarray(y))
        self._scatter("input", self._normalised(x))
        self._scatter("targets", y)
        self._replay.run([("gradient", len(x), bool(accumulate), True)])

    def update(self):
        """Apply the optimizer to the gradients that are there and blend the batch statistics into the running ones."""
        self._replay.run([("update",)])

    def advance(self):
        """Move to the source's next batch; without a source only draws depend on it."""
        self._replay.run([("advance", self.source.name if self.source else None)])
        self._batch += 1

    def predict(self, x):
        """Return the network's output for x (n, h, w, c): floats as it takes them, or uint8 pixels of the source.

        It is float32 where activations have 16 bits.
        """
        x = np.asarray(x)
        if x.ndim != 4 or x.shape[1:] != self.graph.input_shape:
            expected = ", ".join(map(str, self.graph.input_shape))
            raise GpunetError(f"predict: x: expected shape (n, {expected}), got {x.shape}")
        with room(f"predict: a batch of {self.batch:,} images"):
            output = np.empty((len(x), *self.graph.output_shape), self.types.wide)
            fixed = np.zeros((self.batch, *x.shape[1:]), self.types.real)
        for start in range(0, len(x), self.batch):
            part = self._normalised(x[start : start + self.batch])
            fixed[: len(part)] = part
            self._scatter("input", fixed)
            self._replay.run([("predict",)])
            output[start : start + len(part)] = self._replay.read("prediction")[: len(part)]
        return output

    def evaluate(self, source):
        """Return dict(loss, accuracy, count) of the network in inference on all images of a source."""
        self._add_source(source)
        before = self.state
        self._arenas.set(_state_of(self, source), new_state())
        self._arenas.set("evaluation", np.zeros(4))
        try:
            self._replay.run(self._order(source))
            for number in range(source.batches(self.batch)):
                self._enter(source, number, [])
                self._replay.run([("evaluate", source.name), ("advance", source.name)])
        finally:
            if source is self.source:
                self.state = before
        return _means(self._arenas.sum("evaluation"))

    def estimate(self, batches=50):
        """Set the running statistics to their means over so many of the source's batches, at the averaged weights.

        Those that training follows are of other weights. Does nothing without an average or without such statistics.
        """
        if self.averages is None or not self.layouts["statistics"].parameters:
            return
        batches, before = min(batches, len(self.source) // self.batch), self.state
        record = new_state()
        record["apply"] = 1
        self._arenas.set("state", record)
        try:
            self._replay.run(self._order(self.source))
            for number in range(batches):
                self._enter(self.source, number, [])
                self._replay.run([("statistics", number > 0), ("advance", self.source.name)])
            self._arenas.set("evaluation", np.array([0.0, 0, 0, batches]))
            self._replay.run([("estimate",)])
        finally:
            self.state = before

    # What can be read and set

    @property
    def weights(self):
        """Weights by name, the frozen ones too; assigning copies."""
        return self._tensors("weights", lambda p: p.trainable)

    @property
    def statistics(self):
        """Running statistics by name, the frozen ones too."""
        return self._tensors("statistics", lambda p: not p.trainable)

    @property
    def optimizer_state(self):
        """{slot: {parameter: array}}: what the optimizer keeps between updates."""
        layout = self.layouts["weights"]
        return {
            slot: Tensors(self._arenas, slot, dict.fromkeys(layout.parameters, (slot, layout))) for slot in self.slots
        }

    @property
    def averages(self):
        """The averaged weights by name and the frozen ones, or None where no average is kept."""
        if "average" not in self.slots:
            return None
        return self._tensors("averages", lambda p: p.trainable, {"weights": "average"})

    def _tensors(self, kind, belongs, instead=()):
        """Return the parameters for which `belongs` holds, in the network's order, from whichever arena has them.

        instead: arenas to take in the place of others.
        """
        instead = dict(instead)
        places = {
            name: (instead.get(arena, arena), layout)
            for arena, layout in self.layouts.items()
            for name in layout.parameters
        }
        named = {p.name: places[p.name] for p in self.graph.parameters() if belongs(p)}
        return Tensors(self._arenas, kind, named)

    @property
    def state(self):
        """A copy of the State record; assign a changed one to set it in all replicas."""
        return self._arenas.get("state")

    @state.setter
    def state(self, record):
        self._arenas.set("state", record)
        self._ordered, self._batch = None, int(record["batch"])
        table = self._arenas.get("metrics")
        table[table[:, -1] > record["update"]] = 0  # updates that, by this state, have not been
        self._arenas.set("metrics", table)

    @property
    def batches(self):
        """Batches in an epoch of the source, its tail counted."""
        return self.source.batches(self.batch)

    def losses(self):
        """Return dict(loss, accuracy, count) of the gradients since the last update."""
        return _means(self._arenas.sum("sums"))

    def metrics(self, since=0):
        """Return one row (METRICS) an update from update number `since` on, as far back as the table remembers.

        Waits for nothing: the rows are those of the updates that the device has done by now.
        """
        table, updates = self._finished()
        return table[np.arange(max(since, updates - ROWS), updates) % ROWS, :-1]

    @property
    def halted(self):
        """Whether an update has met a loss or gradient that is not finite (state["halt"] tells the batch)."""
        return bool((self._arenas.peek("metrics")[:, APPLIED] < 0).any())

    def read(self, name):
        """Return a kept tensor of the last replay, or (until the next update) "<parameter>:gradient", as it is.

        That is in its own type, and a gradient times state["loss_scale"], which is not 1 in float16.
        """
        parameter = name.removesuffix(":gradient")
        if name.endswith(":gradient") and parameter in self.layouts["weights"].parameters:
            return self.layouts["weights"].slice(self._arenas.sum("gradient"), parameter)
        known = self._replay.kept()
        if name not in known:
            raise GpunetError(f"read: {name!r} is not kept; kept by the last replay: {', '.join(known) or 'nothing'}")
        return self._replay.read(name)

    def memory(self):
        """Return {arena: bytes} of all that training and inference allocate, without allocating anything."""
        if self.source is not None and self.loss is not None and self.optimizer is not None:
            for n in {self.batch, len(self.source) % self.batch} - {0}:
                self._replay.program(("gradient", n, False, False))
            self._replay.program(("update",))
            self._replay.program(("evaluate", self.source.name))
        self._replay.program(("predict",))
        return {**self._arenas.sizes(), "scratch": self.replicas * self._replay.scratch_bytes()}

    def engines(self):
        """Return {convolution's path: the engine that computes it}."""
        entries = self._replay.program(("predict",))[0].trace.entries
        calls = {e.path: e.name.partition("_")[0] for e in entries if e.kind == "call"}
        return calls | {e.path: "unfold" for e in entries if e.name in ("unfold", "fold")}

    def passes(self):
        """Return the entries of one replica's gradient that an engine of the backend's own computes, a pass each."""
        program = self._replay.program(("gradient", self.batch, False, False))[0]
        return [entry for entry in program.plan.entries if entry.kind == "call"]

    def wait(self):
        """Wait until the device has done all steps that it was given."""
        self.backend.synchronize()

    def largest(self, count=5):
        """Return [(bytes, layer)] of the largest tensors of the largest program, once `memory` was asked for."""
        return self._replay.largest(count)

    def close(self):
        """End the replicas' threads; the next replay starts them again."""
        self._replay.close()

    # Looking inside

    @contextmanager
    def observed(self, *observers):
        """Let observers (gpunet.core.observe) look at every entry of what is replayed inside the `with` block.

        The numbers are the same. Nothing is captured there, and on a GPU each entry is waited for.
        """
        before = self._replay.observers
        self._replay.observers = (*before, *observers)
        try:
            yield
        finally:
            self._replay.observers = before

    def again(self, batch, count, *observers):
        """Compute the gradient of `count` of the source's batches, from number `batch` on, once more under observers.

        Draws and order are those of that batch; weights are those of now. State and metrics are put back, so that
        nothing but gradients, batch statistics and `losses` is another's afterwards.
        """
        state, metrics = self.state, self._arenas.get("metrics")
        record = state.copy()
        record["batch"], record["epoch"] = batch, batch // self.batches
        try:
            self.state = record
            with self.observed(*observers):
                for number in range(count):
                    if number:
                        self.advance()
                    self.gradient(accumulate=number > 0)
        finally:
            self.state = state
            self._arenas.set("metrics", metrics)

    # Inside: arenas and inputs

    def _declare(self):
        """Declare every arena but the sources'."""
        wide, real, declare = self.types.wide, self.types.real, self._arenas.declare
        for name, layout in self.layouts.items():
            declare(name, (layout.size,), wide, lambda layout=layout: layout.initial(self.seed, wide), shared=True)
            if name != "frozen":
                declare(f"{name}.table", (layout.blocks,), np.int32, layout.table, shared=True)
        for name, column, dtype, factor in (
            ("weights", "rate", wide, 1),
            ("weights", "decay", wide, getattr(self.optimizer, "weight_decay", 0.0)),
            ("weights", "group", np.int32, 1),
            ("statistics", "rate", wide, 1),
        ):
            with np.errstate(over="ignore"):  # an infinite rate or decay: the first update says so
                values = self.layouts[name].rows(column, dtype) * np.dtype(dtype).type(factor)
            declare(f"{name}.{column}", values.shape, dtype, lambda values=values: values, shared=True)
        declare("gradient", (self.layouts["weights"].size,), wide)
        declare("batch_statistics", (self.layouts["statistics"].size,), wide)
        for slot in self.slots:
            declare(slot, (self.layouts["weights"].size,), wide, shared=True)
        if probe := getattr(self.optimizer, "probe", None):
            declare("probe", (self.layouts["weights"].size,), wide, shared=True)
            declare(*({*probe} - {"gradient"}), (self.layouts["weights"].size,), wide)
        tables = self.optimizer.tables(self.layouts["weights"]) if hasattr(self.optimizer, "tables") else {}
        for name, values in tables.items():
            values = values.astype(wide) if values.dtype.kind == "f" else values
            declare(f"weights.{name}", values.shape, values.dtype, lambda values=values: values, shared=True)
        if self.averages is not None:
            follows = (self.layouts["statistics"].rows("rate", wide) > 0).astype(wide)
            declare("statistics.follows", follows.shape, wide, lambda: follows, shared=True)
        declare("rates", self.rates.shape, wide, lambda: self.rates, shared=True)
        declare("state", (), STATE, lambda: new_state(LOSS_SCALE if self.types.scaled else 1))
        declare("sums", (4,), np.float64)
        declare("evaluation", (4,), np.float64)
        declare("metrics", (ROWS, len(METRICS) + 1), np.float64, open=True)
        images = -(-self.batch // self.replicas)
        declare("input", (images, *self.graph.input_shape), real)
        declare("targets", (images, *self.graph.output_shape), real)
        if self.source is not None:
            self._add_source(self.source)

    def _add_source(self, source):
        known = self._sources.setdefault(source.name, source)
        if known is not source:
            raise GpunetError(f"source: the name {source.name!r} is taken by another; give this one a name of its own")
        if f"{source.name}.images" not in self._arenas:
            windowed = source.held(self.batch) < len(source)
            for name, (shape, dtype, content) in source.arenas(self.types.wide, self.batch).items():
                adopt = name in ("images", "targets") and not windowed
                self._arenas.declare(f"{source.name}.{name}", shape, dtype, content, shared=True, adopt=adopt)
            if windowed:
                self._windows[source.name] = Window(self.backend, self._arenas, source, self.batch, self.seed)
            if source is not self.source:
                self._arenas.declare(_state_of(self, source), (), STATE, new_state)

    def _scatter(self, arena, values):
        """Copy a batch to the replicas, each its share."""
        active = min(self.replicas, len(values))
        for r in range(active):
            share = Share.of(len(values), r, active)
            view = self._arenas.view(arena, r)
            self.backend.upload(view[: share.size], values[share.first : share.first + share.size])

    def _normalised(self, x):
        """Return images as the network takes them: uint8 pixels as the source's would be, floats as they are."""
        if x.dtype != np.uint8 or self.source is None:
            return x
        if self.source.split.images.dtype != np.uint8:
            raise GpunetError(
                f"{self.source.name}: x: expected floats as the network takes them, for its images are floats and no "
                "pixels; got uint8; a Predictor takes raw pixels"
            )
        return self.source.normalise(x)

    def _check_inputs(self, x, y):
        """Return (x, dense targets); labels become one-hot rows."""
        columns = self.graph.output_shape[-1]
        if x.ndim != 4 or x.shape[1:] != self.graph.input_shape or not 1 <= len(x) <= self.batch:
            expected = ", ".join(map(str, self.graph.input_shape))
            raise GpunetError(f"gradient: x: expected shape (1 to {self.batch}, {expected}), got {x.shape}")
        if y.ndim == 1 and y.dtype.kind in "iu":
            if len(y) and not 0 <= y.min() <= y.max() < columns:
                raise GpunetError(f"gradient: y: expected labels 0 to {columns - 1}, got {y.min()} to {y.max()}")
            y = np.eye(columns)[y]
        if y.shape != (len(x), columns):
            raise GpunetError(
                f"gradient: y: expected labels ({len(x)},) or targets ({len(x)}, {columns}), got {y.shape}"
            )
        return x, y

    # Inside: what each program traces. A key is (kind, ...).

    def _run(self, keys):
        """Replay; after a failure every replica is at the batch it was at, and the order is drawn again.

        A failure within `update` may leave some weights updated: go back to a checkpoint then. A GPU is not asked for
        its state at every step: where it fails, nothing on it can be read again.
        """
        if not keys:
            return
        before = None if self.backend.graphs else self.state
        try:
            self._replay.run(keys)
        except BaseException:
            if before is not None:
                self.state = before
            raise

    def _finished(self):
        """Return (a copy of the table of metrics, the number of updates that are in it).

        A row is stamped last, and its stamp is removed before it is written again: so a row whose stamp was read
        after its verdict is whole.
        """
        table = self._arenas.peek("metrics")
        applied, stamps = table[:, APPLIED].copy(), table[:, -1].copy()
        return table.copy(), int(stamps[applied > 0].max(initial=0))

    def _next_gradient(self, accumulate):
        """Return the keys that compute the gradient of the next batch, the order first if it is due."""
        if self.source is None:
            raise GpunetError("gradient: this step has no source; pass x and y")
        epoch, place = divmod(self._batch, self.batches)
        n = min(self.batch, len(self.source) - place * self.batch)
        key = ("gradient", n, bool(accumulate), False)
        if self._ordered == epoch:
            return [key]
        self._ordered = epoch
        return [*self._order(self.source), key]

    def _order(self, source):
        """Return the key that draws a source's order; the host does it for a windowed one."""
        return [] if source.name in self._windows else [("order", source.name)]

    def _enter(self, source, number, keys):
        """Have batch `number` of a source on the device; `keys`, which come before, run first if its window moves."""
        window = self._windows.get(source.name) if source else None
        if window is None:
            return
        epoch, batch = divmod(number, source.batches(self.batch))
        if window.crosses(epoch, batch * self.batch):
            self._run(keys)
            keys.clear()
            window.enter(epoch, batch * self.batch)

    def _trace(self, key, replica):
        """Return (trace of one program for one replica, arenas to clear instead if it has no image)."""
        kind = key[0]
        n = key[1] if kind == "gradient" else self.batch
        active = min(self.replicas, n)
        accumulate = (kind == "gradient" and key[2]) or (kind == "statistics" and key[1])
        t = Trace(
            self.types,
            Share.of(n, min(replica, active - 1), active),
            self.layouts,
            self._arenas,
            training=kind in ("gradient", "statistics"),
            engine=self.backend.engine(self.types, *([self.engine] if self.engine else [])),
            parts=self.backend.parts,
            seed=self.seed,
            accumulate=accumulate,
            keep=("prediction", *self.keep),
        )
        getattr(self, f"_trace_{kind}")(t, *key[1:])
        if replica < active:
            return t, None
        probe = getattr(self.optimizer, "probe", None) or ("gradient", "gradient")
        return t, () if accumulate else (*dict.fromkeys(probe), "sums")

    def _trace_gradient(self, t, n, accumulate, direct):
        with t.at("batch"):
            if direct:
                x, targets = self._input(t, "input"), self._input(t, "targets")
            else:
                x, targets = self.source.trace_batch(t, "state", self.batch, augment=True)
        if probe := getattr(self.optimizer, "probe", None):
            self._trace_probe(t, x, targets, accumulate, *probe)
        else:
            self._trace_passes(t, x, targets, t.arena("sums"), accumulate)
        t.barrier()  # the next program may write what a slow replica still reads: its part of a sum, the order
        unused = self.layouts["weights"].parameters.keys() - t.written
        if unused:
            raise GpunetError(
                f"{min(unused)}: a trainable weight that no layer gives a gradient; use it or make it a constant"
            )

    def _trace_passes(self, t, x, targets, sums, accumulate):
        """Trace forward, loss and backward."""
        y, saved = self.graph.forward(t, x)
        t.mark("prediction", y)
        dy = self._trace_loss(t, y, targets, "state", sums, int(accumulate))
        self.graph.backward(t, dy, saved)

    def _trace_probe(self, t, x, targets, accumulate, first, second):
        """Trace a gradient at the weights, into arena `first`, and one at the weights moved along it, into `second`.

        Loss, statistics and what is kept are those of the first.
        """
        if accumulate and first == "gradient":
            name = type(self.optimizer).__name__
            raise GpunetError(f"{name}: accumulate: expected 1: it compares gradients of a batch")
        with t.bound(**({"gradient": first} if first != "gradient" else {})):
            self._trace_passes(t, x, targets, t.arena("sums"), accumulate)
        with t.at("probe"):
            total, sums = t.reduce(t.arena(first)), t.reduce(t.arena("sums"))
            parts = self.backend.parts(total.size // BLOCK, 1)
            norms = t.empty((parts,), np.float64)
            t.launch("gradient_norm", total, norms, total.size, parts)
            start, stop = self.layouts["weights"].part(t.share.index, t.share.count)
            w, probe = (t.arena(a).slice(start, stop) for a in ("weights", "probe"))
            arguments = (norms, sums, t.arena("state"), probe, self.optimizer.radius, stop - start, parts)
            t.launch("probe_shift", w, total.slice(start, stop), *arguments)
            t.barrier()  # each replica has written its part of the probe
        with t.bound(quiet=True, weights="probe", **({"gradient": second} if second != "gradient" else {})):
            self._trace_passes(t, x, targets, t.empty((4,), np.float64), False)

    def _trace_evaluate(self, t, name):
        source = self._sources[name]
        with t.at("batch"):
            x, targets = source.trace_batch(t, _state_of(self, source), self.batch, augment=False)
        with self._averaged(t):
            y, _ = self.graph.forward(t, x)
        self._trace_loss(t, y, targets, _state_of(self, source), t.arena("evaluation"), 1)

    def _trace_predict(self, t):
        with self._averaged(t):
            y, _ = self.graph.forward(t, self._input(t, "input"))
        t.mark("prediction", y)

    def _averaged(self, t):
        """Return the context in which a program takes the averaged weights, where there are any."""
        return t.bound(weights="average") if "average" in self.slots else nullcontext()

    def _trace_statistics(self, t, accumulate):
        with t.at("batch"):
            x, _ = self.source.trace_batch(t, "state", self.batch, augment=True)
        with self._averaged(t):
            self.graph.forward(t, x)
        t.barrier()

    def _trace_estimate(self, t):
        layout, names = self.layouts["statistics"], ("statistics", "batch_statistics", "statistics.table")
        if t.share.index == 0:
            arenas = [t.arena(name) for name in (*names, "statistics.follows", "evaluation", "state")]
            t.launch("statistics_update", *arenas, len(layout.parameters), layout.size)
        t.barrier()

    def _trace_loss(self, t, y, targets, state, sums, accumulate):
        """Trace the loss; `sums` is added to where `accumulate` is 1."""
        if self.loss is None:
            raise GpunetError("this step has no loss; it can only predict")
        n = t.share.size
        with t.at("loss"):
            losses, hits = t.empty((n,), t.wide), t.empty((n,), np.int32)
            dy = self.loss.trace(t, y, targets, losses, hits, t.arena(state))
            t.launch("metrics_sum", losses, hits, sums, accumulate, n)
        return dy

    def _trace_update(self, t):
        """Every replica updates its part of the weights; each moves its own State, and all agree."""
        if self.optimizer is None:
            raise GpunetError("update: this step has no optimizer")
        state = t.arena("state")
        whole = getattr(self.optimizer, "whole", False)
        start, stop = self.layouts["weights"].part(t.share.index, t.share.count, whole)
        with t.at("gradient_finish"):
            parts = self.backend.parts(self.layouts["weights"].size // (BLOCK * t.share.count), 1)
            sums, norms = t.reduce(t.arena("sums")), t.empty((parts,), np.float64)
            gradient = t.arena("gradient").slice(start, stop)
            t.reduce_part(gradient)
            t.launch("gradient_norm", gradient, norms, stop - start, parts)
            norms, penalties = t.gather(norms), self._trace_penalties(t, start, stop, parts)
            clip = getattr(self.optimizer, "clip", 0.0)
            sizes = (norms.size, penalties.size, len(self.rates), ROWS)
            arenas = (t.arena("rates"), t.arena("metrics"), state)
            t.launch("gradient_finish", norms, penalties, sums, *arenas, clip, int(self.types.scaled), *sizes)
        with t.at("optimizer"):
            self.optimizer.trace(t, start, stop)
        if self.average is not None:
            with t.at("average"):
                self.average.trace(t, start, stop)
        layout = self.layouts["statistics"]
        with t.at("statistics"):
            if t.share.index == 0 and layout.parameters:
                arenas = (
                    t.arena(a)
                    for a in ("statistics", "batch_statistics", "statistics.table", "statistics.rate", "sums")
                )
                t.launch("statistics_update", *arenas, state, len(layout.parameters), layout.size)
            t.launch("state_update", state)
        t.barrier()

    def _trace_penalties(self, t, start, stop, parts):
        """Return the parts of what L2 and L1 add to the mean loss; none where the optimizer has neither."""
        if not getattr(self.optimizer, "penalised", False):
            return t.empty((0,), np.float64)
        penalties, decay, l1 = t.empty((parts,), np.float64), t.arena("weights.decay"), t.arena("weights.l1")
        weights, table = t.arena("weights").slice(start, stop), t.arena("weights.table")
        table, decoupled = table.slice(start // BLOCK, stop // BLOCK), int(self.optimizer.decoupled)
        t.launch("penalty_sum", weights, table, decay, l1, penalties, decoupled, l1.size, stop - start, parts)
        return t.gather(penalties)

    def _trace_advance(self, t, name):
        if name is None:
            t.launch("state_advance", t.arena("state"), 1)
            return
        source = self._sources[name]
        t.launch("state_advance", t.arena(_state_of(self, source)), source.batches(self.batch))

    def _trace_order(self, t, name):
        source = self._sources[name]
        if t.share.index == 0:
            source.trace_order(t, _state_of(self, source))
        t.barrier()

    def _input(self, t, arena):
        """Return this share's rows of an input arena."""
        whole = t.arena(arena)
        size = t.share.size * (whole.size // whole.shape[0])
        return whole.reshape(-1).slice(0, size).reshape(t.share.size, *whole.shape[1:])


def _named(backend):
    from gpunet.backends import backend as named  # the floor above: only a name needs it

    return named(backend)


def _state_of(step, source):
    """Return the arena of the State that counts a source's batches."""
    return "state" if source is step.source else f"{source.name}.state"


def _means(sums):
    loss, hits, count, _ = sums.tolist()
    return {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "count": int(count)}
