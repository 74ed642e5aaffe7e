"""Ctrl-C and SIGTERM as flags that a loop looks at between two steps."""

import signal
import threading


class Signals:
    """Notes Ctrl-C and SIGTERM instead of obeying at once; a second one is obeyed. Only the main thread gets them."""

    KINDS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.caught = 0
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._note) for kind in self.KINDS}
        return self

    def _note(self, number, frame):
        self.caught = number
        self._restore()

    def _restore(self):
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def __exit__(self, *error):
        self._restore()

    @property
    def status(self):
        """How the training ended."""
        return f"interrupted by {signal.Signals(self.caught).name}" if self.caught else "finished"

    def end(self):
        """Raise what the signal would have raised."""
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught:
            raise SystemExit(128 + self.caught)
