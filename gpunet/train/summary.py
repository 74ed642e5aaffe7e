"""What a recipe comes to before anything runs: layers, sizes, work, and the memory that is planned. Reads no image."""

from gpunet.train.build import build_graph, build_source, build_step, outline
from gpunet.train.text import columns, quantity

LARGEST = 2**16  # images in a batch; nobody asks for more


class Plan:
    """The network of a config, and what memory it will hold."""

    def __init__(self, config):
        self.config = config
        self.data = outline(config)
        self.graph = build_graph(config, self.data.train.images.shape[1:], len(self.data.classes))

    def memory(self, batch=None):
        """Return {what: bytes} of all that training and evaluation hold; activations: the largest plan of all."""
        config = self.config.model_copy(deep=True)
        config.train.batch = batch or config.train.batch
        step = build_step(config, self.graph, build_source(config, "train", self.data, 0.0, 1.0))
        sizes = {name: n for name, n in step.memory().items() if not name.startswith("train.")}
        slots = step.optimizer_state
        held = {
            "weights": sizes.pop("weights"),
            "gradients": sizes.pop("gradient"),
            "optimizer": sum(sizes.pop(slot) for slot in slots),
            "activations": sizes.pop("scratch") + sizes.pop("input") + sizes.pop("targets"),
            "workspace": step.replicas * step.backend.workspace_bytes,
            "images": sum(s.images.nbytes + s.targets.nbytes for s in self.data.splits.values()),
        }
        return {**held, "tables": sum(sizes.values())}

    def largest_batch(self, limit):
        """Return the largest batch whose plan fits into `limit` bytes; 0 if none does."""
        most = min(len(self.data.train), LARGEST)
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

    def __str__(self):
        layers = self.graph.summary()
        rows = [("layer", "kind", "output", "weights", "FLOPs")]
        for row in layers:
            weights = f"{row.parameters:,}" if row.parameters else ""
            rows.append((row.path, row.kind, " x ".join(map(str, row.shape)), weights, quantity(row.flops)))
        total = quantity(sum(row.flops for row in layers))
        return f"{columns(rows, 3)}\n\n{self.graph.size:,} weights, {total}FLOPs an image forward"
