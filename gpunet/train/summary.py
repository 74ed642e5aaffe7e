"""What a recipe comes to before anything runs: layers, sizes, work, and the memory that is planned. Reads no image."""

from gpunet.backends import backend as named
from gpunet.errors import GpunetError
from gpunet.nn.fuse import find_chains
from gpunet.train.build import build_graph, build_source, build_step, outline, resident
from gpunet.train.text import columns, quantity, size

LARGEST = 2**16  # images in a batch; nobody asks for more


class Plan:
    """The network of a config, and what memory it will hold."""

    def __init__(self, config, backend=None, data=None, graph=None):
        self.config, self.backend = config, backend or named(config.train.backend)
        self.data = resident(config, data or outline(config))
        self.graph = graph or build_graph(config, self.data.train.images.shape[1:], len(self.data.classes))

    def _step(self, batch=None):
        config = self.config.model_copy(deep=True)
        config.train.batch = batch or config.train.batch
        return build_step(config, self.graph, build_source(config, "train", self.data, 0.0, 1.0), self.backend)

    def memory(self, batch=None):
        """Return {what: bytes} of all that training and evaluation hold; activations: the largest plan of all."""
        step = self._step(batch)
        sizes = {name: n for name, n in step.memory().items() if not name.startswith("train.")}
        slots = step.optimizer_state
        held = {
            "weights": sizes.pop("weights") + sizes.pop("frozen", 0),
            "gradients": sum(sizes.pop(name, 0) for name in ("gradient", *(step.optimizer.probe or ()), "probe")),
            "optimizer": sum(sizes.pop(slot) for slot in slots),
            "activations": sizes.pop("scratch") + sizes.pop("input") + sizes.pop("targets"),
            "workspace": step.replicas * step.backend.workspace_bytes,
            "images": sum(self._held(step, name) for name in self.data.splits),
        }
        return {**held, "tables": sum(sizes.values())}

    def _held(self, step, name):
        """Return the bytes of a split on the device."""
        split, source = self.data.splits[name], build_source(self.config, name, self.data, 0.0, 1.0)
        return (split.images.nbytes + split.targets.nbytes) * source.held(step.batch) // len(split)

    def check(self):
        """Raise GpunetError where a device has not the memory that the plan needs, before anything is allocated."""
        known = self.backend.memory()
        if known is None or (needed := sum((plan := self.memory()).values())) <= known[0]:
            return
        free, total = known
        step = self._step()
        step.memory()
        batch = self.largest_batch(free)
        fits = f"a batch of {batch} fits: --set train.batch={batch}" if batch else "no batch fits"
        room = (free - needed + plan["images"]) // sum(s.images[0].nbytes + 8 for s in self.data.splits.values())
        if room >= 2 * step.batch:
            fits += f", or all images but {room:,} of a split stay on the host: --set train.window={room}"
        largest = ", ".join(f"{path} {size(nbytes)}" for nbytes, path in step.largest())
        raise GpunetError(
            f"backend {self.backend.name}: batch {self.config.train.batch} needs {size(needed)}, but {size(free)} of "
            f"{size(total)} are free; {fits}; its largest tensors: {largest}; {self.backend.holders()}"
        )

    def largest_batch(self, limit):
        """Return the largest batch whose plan fits into `limit` bytes; 0 if none does."""
        most = min(len(self.data.train), LARGEST, (self.config.train.window or 2 * LARGEST) // 2)
        low, high = 0, 1
        while low < high <= most:
            if sum(self.memory(high).values()) <= limit:
                low, high = high, min(2 * high, most)
            else:
                break
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self.memory(middle).values()) <= limit else (low, middle)
        return low

    def fusions(self):
        """Return a line for each chain of layers that `fuse` replaces: "stem.norm + stem.relu -> BatchNormReLU"."""
        return [f"{' + '.join(n.path for n in nodes)} -> {kind.__name__}" for kind, nodes in find_chains(self.graph)]

    def engines(self):
        """Return {convolution's path: the engine that computes it here}."""
        return self._step().engines()

    def __str__(self):
        layers = self.graph.summary()
        rows = [("layer", "kind", "output", "weights", "FLOPs")]
        for row in layers:
            weights = f"{row.parameters:,}" if row.parameters else ""
            rows.append((row.path, row.kind, " x ".join(map(str, row.shape)), weights, quantity(row.flops)))
        total = quantity(sum(row.flops for row in layers))
        return f"{columns(rows, 3)}\n\n{self.graph.size:,} weights, {total}FLOPs an image forward"
