"""Ctrl-C, SIGTERM and SIGHUP as flags that a loop looks at between two steps."""

import signal
import threading


class Signals:
    """Notes Ctrl-C, SIGTERM and SIGHUP instead of obeying at once; a second one is obeyed.

    SIGHUP is sent when the terminal is closed, often twice, by the kernel and the shell: so after one the others are
    ignored. Where it is ignored anyhow, as nohup has it, it stays so. Only the main thread gets signals.
    """

    KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self.caught = 0
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            heard = [kind for kind in self.KINDS if signal.getsignal(kind) is not signal.SIG_IGN]
            self._before = {kind: signal.signal(kind, self._note) for kind in heard}
        return self

    def _note(self, number, frame):
        self.caught = number
        self._restore()
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)

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
