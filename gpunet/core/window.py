"""A set that is larger than the device: a window of two halves, one in use while the other is filled.

Place p of an epoch always lies at p % window, so the traced program never changes; which image that is, is decided by
what the host copies there. The host draws by the same bits as kernels/order.cu.
"""

import numpy as np

from gpunet.core.trace import Base, Tensor


class Window:
    """Fills the halves of one windowed source ahead of the batches that are drawn from it."""

    def __init__(self, backend, arenas, source, batch, seed):
        self.backend, self.arenas, self.source, self.seed = backend, arenas, source, seed
        self.half = source.held(batch) // 2
        self._holds = [None, None]  # (epoch, chunk) of each half
        self._ready = [None, None]  # the event of its copy
        self._current = None
        self._buffers = None
        self._order = None, None  # an epoch, and its images in order
        _, wide = arenas[f"{source.name}.mean"]
        self._contents = source.split.images, source.targets(wide)

    def enter(self, epoch, place):
        """Have the half that holds `place` on the device for what is launched next; begin to copy the one behind it.

        What was launched before may still read the other half: its copy waits for that on the device.
        """
        chunk = epoch, place // self.half
        if chunk == self._current:
            return
        half, other = chunk[1] % 2, 1 - chunk[1] % 2
        launched = self.backend.mark()
        if self._holds[half] != chunk:
            self._fill(half, chunk, launched)
        self.backend.wait(self._ready[half])
        self._current = chunk
        behind = self._behind(chunk)
        if behind[1] % 2 == other and self._holds[other] != behind:
            self._fill(other, behind, launched)

    def crosses(self, epoch, place):
        """Return whether `place` lies in another chunk than the last one entered."""
        return (epoch, place // self.half) != self._current

    def _behind(self, chunk):
        epoch, number = chunk
        last = (number + 1) * self.half >= len(self.source)
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _fill(self, half, chunk, after):
        """Gather a chunk in host memory and copy it to a half, once `after` has come on the device."""
        if self._buffers is None:
            self._buffers = [self._pair(h, self.backend.allocate_shared) for h in (0, 1)]
        if self._ready[half] is not None:
            self.backend.finish(self._ready[half])  # the buffer may still be read
        start = chunk[1] * self.half
        chosen = self._images(chunk[0])[start : start + self.half]
        pairs = []
        for (buffer, view), array in zip(self._buffers[half], self._contents, strict=True):
            np.take(array, chosen, axis=0, out=buffer[: len(chosen)], mode="clip")  # else it is copied once more
            pairs.append((view[: len(chosen)], buffer[: len(chosen)]))
        self._ready[half] = self.backend.stage(pairs, after)
        self._holds[half] = chunk

    def _pair(self, half, allocate):
        """Return (host buffer, view of the half in the arena) for images and for targets."""
        rows = self.half
        found = []
        for name in ("images", "targets"):
            view = self.arenas.view(f"{self.source.name}.{name}")
            shape = (rows, *view.shape[1:])
            nbytes = int(np.prod(shape, dtype=np.int64)) * view.dtype.itemsize
            buffer = self.backend.view(allocate(nbytes), 0, Tensor(Base(nbytes), shape, view.dtype))
            found.append((self.backend.peek(buffer), view[half * rows : (half + 1) * rows]))
        return found

    def _images(self, epoch):
        if self._order[0] != epoch:
            self._order = epoch, self.source.images_of(self.seed, epoch)
        return self._order[1]
