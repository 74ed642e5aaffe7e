"""The batches of a source, drawn as training draws them but without a network: to look at, and to measure."""

from gpunet.core.arenas import Arenas
from gpunet.core.backend import Types
from gpunet.core.params import Layout
from gpunet.core.replay import Replay
from gpunet.core.state import STATE, new_state
from gpunet.core.trace import Share, Trace
from gpunet.errors import GpunetError


class Batches:
    """Batch `number` of a source, counted over all epochs: the same images and targets that a Step with this seed gets.

    augment: as for training, or as for evaluation. backend: an object.
    """

    def __init__(self, source, batch, *, seed=0, augment=True, backend=None, dtype="float32", replicas=1):
        from gpunet.backends.numpy import Backend  # the floor above: only a default needs it

        if not 1 <= batch <= len(source):
            raise GpunetError(f"batch: expected 1 to {len(source)}, the images of {source.name}, got {batch}")
        if source.held(batch) < len(source):
            raise GpunetError(f"source {source.name}: window: expected none here, got {source.window}")
        self.source, self.batch, self.seed, self.augment = source, batch, seed, augment
        self.backend, self.types = backend or Backend(), Types.of(dtype)
        self._arenas = Arenas(self.backend, min(replicas, batch))
        for name, (shape, dtype, content) in source.arenas(self.types.wide, batch).items():
            adopt = name in ("images", "targets")
            self._arenas.declare(f"{source.name}.{name}", shape, dtype, content, shared=True, adopt=adopt)
        self._arenas.declare("state", (), STATE, new_state)
        self._replay = Replay(self.backend, self._arenas, self._trace)
        self._epoch = None

    def __len__(self):
        """Batches of an epoch."""
        return self.source.batches(self.batch)

    def draw(self, number):
        """Have a batch computed; it stays on the device."""
        state, epoch = new_state(), number // len(self)
        state["batch"], state["epoch"] = number, epoch
        self._arenas.set("state", state)
        count = min(self.batch, len(self.source) - number % len(self) * self.batch)
        keys = [("order",)] * (self._epoch != epoch)
        self._epoch = epoch
        self._replay.run([*keys, ("batch", count)])

    def read(self, number):
        """Return (x, targets) of a batch as a network gets them; the last of an epoch may be smaller."""
        self.draw(number)
        return self._replay.read("x"), self._replay.read("targets")

    def close(self):
        """End the replicas' threads."""
        self._replay.close()

    def _trace(self, key, replica):
        n = key[1] if key[0] == "batch" else self.batch
        active = min(self._arenas.replicas, n)
        share = Share.of(n, min(replica, active - 1), active)
        layouts = {"weights": Layout(()), "statistics": Layout(())}
        t = Trace(self.types, share, layouts, self._arenas, training=True, engine=self.backend.engine(self.types),
                  parts=self.backend.parts, seed=self.seed, keep=("x", "targets"))  # fmt: skip
        if key[0] == "order":
            if share.index == 0:
                self.source.trace_order(t, "state")
            t.barrier()
        else:
            with t.at("batch"):
                x, targets = self.source.trace_batch(t, "state", self.batch, self.augment)
            t.mark("x", x)
            t.mark("targets", targets)
        return t, None if replica < active else ()
