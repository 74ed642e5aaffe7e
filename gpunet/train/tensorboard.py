"""Metrics as TensorBoard's event files, through tensorboardX, which is an extra. Knows rows, not the run."""

import importlib.util
from pathlib import Path

from gpunet.errors import GpunetError
from gpunet.train.plots import COUNTERS


def check_board():
    """Raise GpunetError where tensorboardX is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise GpunetError('run.tensorboard = true: tensorboardX is missing; pip install "gpunet[tensorboard]"')


class Board:
    """Writes rows of metrics.jsonl as scalars over updates, each split into its own subfolder.

    So TensorBoard draws one split over the other: tag "loss" of train, validation and test is one chart. A row of a
    layer has its name before the tags: "stem.conv.weight/mean".
    """

    def __init__(self, folder):
        self.folder, self._writers, self._update = Path(folder), {}, 0

    def add(self, rows):
        """Write rows and flush them. The first row of a split hides what older files have from its update on."""
        for row in rows:
            self._update = row.get("update", self._update)
            layer = f"{row['name']}/" if "name" in row else ""
            for name, value in row.items():
                if name not in COUNTERS and isinstance(value, int | float):
                    self._writer(row["split"]).add_scalar(layer + name, value, self._update)
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, split):
        if split not in self._writers:
            import tensorboardX

            place = str(self.folder / split)
            self._writers[split] = tensorboardX.SummaryWriter(place, purge_step=self._update)
        return self._writers[split]

    def close(self):
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
