"""Replicas over CPU threads: the main thread and persistent workers, each running its own list of calls.

BLAS is held at one thread while replicas run and given back afterwards, also after an error. A replica that fails
breaks the barrier, so that the others stop too, and its error is the one raised.
"""

import threading
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController


class Team:
    """`count` replicas; `run` gives each its list of calls and returns when all are done. blas: whether they use it."""

    def __init__(self, count, blas=True):
        self.count = count
        self._barrier = threading.Barrier(count)
        self._blas = ThreadpoolController().select(user_api="blas").lib_controllers if blas else ()
        self._work = [None] * count
        self._errors = [None] * count
        self._start = [threading.Semaphore(0) for _ in range(count)]
        self._idle = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(1, count)]
        for thread in self._threads:
            thread.start()

    def wait(self):
        """Wait for all replicas (called by a replica, between its calls)."""
        self._barrier.wait()

    def run(self, lists):
        """Run one list of calls a replica. An error, Ctrl-C too, is raised when all have stopped."""
        with self._one_blas_thread():
            for i in range(1, self.count):
                self._work[i] = lists[i]
                self._idle[i].clear()
                self._start[i].release()
            self._replay(0, lists[0])
            for idle in self._idle[1:]:
                self._replay(0, [idle.wait])
                idle.wait()  # again where Ctrl-C came while it waited
            self._work = [None] * self.count  # nothing holds on to memory that the calls used
        errors = [e for e in self._errors if e is not None]
        if errors:
            self._errors = [None] * self.count
            self._barrier.reset()
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])

    def close(self):
        """End the workers."""
        for i in range(1, self.count):
            self._work[i] = None
            self._start[i].release()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self.count = 1

    def _serve(self, index):
        while True:
            self._start[index].acquire()
            if self._work[index] is None:
                return
            self._replay(index, self._work[index])
            self._idle[index].set()

    def _replay(self, index, calls):
        try:
            with np.errstate(all="ignore"):  # what is not finite is found and reported by the update
                for call in calls:
                    call()
        except BaseException as error:  # Ctrl-C too: the others must not wait for this replica
            if self.count > 1:
                error.add_note(f"replica {index + 1} of {self.count}")
            self._errors[index] = error
            self._barrier.abort()

    @contextmanager
    def _one_blas_thread(self):
        before = [library.get_num_threads() for library in self._blas]
        try:
            for library in self._blas:
                library.set_num_threads(1)
            yield
        finally:
            for library, threads in zip(self._blas, before, strict=True):
                library.set_num_threads(threads)
