"""What a user sees of a running training: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import suppress

from tqdm import tqdm

from gpunet.train.text import clock

QUIET = 30  # seconds without a line after which one is printed off a terminal


class Progress:
    """Counts images of the whole run. `epoch` moves the bar, or prints now and then where there is none."""

    def __init__(self, images, epochs, show=True, stream=None, labelled=True):
        self._stream = stream or sys.stderr
        self._labelled = labelled  # else a hit means nothing
        self._show = show
        self._bar = self._stream.isatty() and show
        self._tqdm = tqdm(
            total=images, unit="img", unit_scale=True, file=self._stream, disable=not self._bar, smoothing=0.05,
            dynamic_ncols=True, leave=False,
        )  # fmt: skip
        self._images, self._epochs = images, epochs
        self._done, self._start = 0, time.perf_counter()
        self._spoken = self._start
        self._epoch = self._count = self._before = 0

    def begin(self, epoch, count, done):
        """Begin in the middle: `count` images of the epoch at hand, `done` in all; times are of what comes after."""
        self._epoch, self._count, self._done, self._before = epoch, int(count), int(done), int(done)
        self._tqdm.n = self._tqdm.initial = self._done

    def epoch(self, epoch, totals):
        """Show an epoch's sums of loss, hits and images so far."""
        loss, hits, count = totals
        if not count:
            return
        images, self._count = count - (self._count if epoch == self._epoch else 0), count
        self._epoch = epoch
        self._done += images
        text = f"loss {loss / count:.4f}" + (f", accuracy {hits / count:.2%}" if self._labelled else "")
        if self._bar:
            self._tqdm.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
            self._tqdm.set_postfix_str(text, refresh=False)
            self._tqdm.update(images)
        elif time.perf_counter() - self._spoken > QUIET:
            self.line(f"epoch {epoch}/{self._epochs}: {text}, {self.left}")

    def compiling(self, done, count):
        """Show how many kernel files are compiled; off a terminal now and then."""
        text = f"kernels {done}/{count}"
        if self._bar:
            self._tqdm.set_description(text)
        elif time.perf_counter() - self._spoken > QUIET:
            self.line(f"compiling {text}")

    @property
    def left(self):
        """The time that the rest should take."""
        elapsed = time.perf_counter() - self._start
        return f"{clock(elapsed * (self._images - self._done) / max(self._done - self._before, 1))} left"

    def line(self, text):
        """Print a line that stays; a terminal that was closed, or a full disk under a log, ends no training."""
        self._spoken = time.perf_counter()
        with suppress(OSError):
            if self._bar:
                self._tqdm.write(text, file=self._stream)
            elif self._show:
                print(text, file=self._stream, flush=True)

    def close(self):
        """Remove the bar."""
        self._tqdm.close()
