"""The Trainer: a loop over the public Step, with validation, checkpoints, progress and a clean end in every case."""

import signal
import threading
import time

import numpy as np

from gpunet.backends import backend as named
from gpunet.backends import choose
from gpunet.core.step import METRICS
from gpunet.errors import GpunetError
from gpunet.train.build import build_data, build_graph, build_normalisation, build_source, build_step
from gpunet.train.checkpoint import Checkpoint
from gpunet.train.config import to_toml
from gpunet.train.predictor import Predictor
from gpunet.train.progress import Progress
from gpunet.train.report import Result, write_report
from gpunet.train.run import Run
from gpunet.train.summary import Plan
from gpunet.train.text import clock

LOOK = 0.1  # seconds between two looks at the metrics table
SAVE = 60  # seconds between two writes of last.safetensors


class Trainer:
    """Trains what a Config describes; a graph or data set given here is used in place of [model] or [data].

    What is chosen, the best checkpoint, is chosen by validation. The test split is looked at once, after the training,
    unless train.monitor_test is true: then it is measured beside validation, and still chooses nothing.
    """

    def __init__(self, config, *, graph=None, data=None, show=True):
        self.start = time.perf_counter()
        self.config, self.show = config, show
        name, self.choice = choose(config.train.backend)  # first: what cannot run is told before data is fetched
        backend = named(name)
        self.data = data if data is not None else build_data(config)
        train = self.data.train
        outputs = len(self.data.classes) if train.labels is not None else train.values.shape[1]
        self.graph = graph if graph is not None else build_graph(config, train.images.shape[1:], outputs)
        Plan(config, backend, self.data, self.graph).check()
        mean, scale = build_normalisation(config, self.data)
        self.watched = {
            name: build_source(config, name, self.data, mean, scale)
            for name in ("validation", *["test"] * config.train.monitor_test)
            if name in self.data.splits
        }
        self.step = build_step(config, self.graph, build_source(config, "train", self.data, mean, scale), backend)
        self.predictor = Predictor(self.step, mean, scale, self.data.classes, config.loss.name)

    def evaluate(self, split="test"):
        """Return the Evaluation of the weights as they are on a split of the data set."""
        return self.predictor.evaluate(self.data, split)

    def predict(self, images):
        """Return probabilities (n, classes) for raw images (n, h, w, c)."""
        return self.predictor.predict(images)

    def checkpoint(self, epoch, **about):
        """Return a Checkpoint of the weights and all else as they are."""
        about |= {
            "config": to_toml(self.config),
            "classes": self.data.classes,
            "input_shape": self.graph.input_shape,
            "outputs": self.graph.output_shape[-1],
            "epoch": epoch,
        }
        return Checkpoint.of(self.step, self.predictor.mean, self.predictor.scale, about)

    def fit(self):
        """Train for the epochs of the config and return the Result; the weights are then the best ones.

        Ctrl-C and SIGTERM end it after the update at hand: a checkpoint and a report are left, and KeyboardInterrupt
        or SystemExit(143) is raised. Raises GpunetError where the loss or a gradient is not finite.
        """
        if self.step.state["update"]:
            raise GpunetError("fit: expected a Trainer that has not trained; make a new one")
        return _Training(self).run()


class _Training:
    """One call of fit: its run directory, its clock, and what it has seen so far."""

    def __init__(self, trainer):
        self.trainer, self.config, self.step, self.data = trainer, trainer.config, trainer.step, trainer.data
        self.run_directory = Run.create(self.config)
        self.batches, epochs = self.step.batches, self.config.train.epochs
        self.progress = Progress(epochs * len(self.data.train), epochs, trainer.show)
        self.step.backend.show = self.progress.compiling
        self.rows, self.best = [], None
        self.epoch = self.seen = self.images = 0
        self.steps, self.explained = 0, False  # steps taken, and whether it was said that not all of them count
        self.seconds = 0.0
        self.looked = self.saved = time.perf_counter()

    def run(self):
        """Train; leave checkpoint, curves and report however it ends."""
        self._announce()
        failure = test = None
        with _Signals() as signals:
            try:
                self._train(signals)
            except GpunetError as error:
                failure = error
            self._save("last")
            if not failure and not signals.caught:
                if self.best is not None:
                    self.run_directory.checkpoint("best").restore(self.step)
                test = self._test()
            result = self._result(f"stopped: {failure}" if failure else signals.status, test)
            write_report(result)
            self.run_directory.close()
            self.progress.close()
            self.step.close()
        if failure:
            raise failure
        self.progress.line(result.summary)
        signals.end()
        return result

    def _test(self):
        """Measure the kept weights on the test split, once; the last line of the metrics says what came out."""
        if self.data.test is None:
            return None
        found = self.trainer.evaluate("test")
        epoch = self.best["epoch"] if self.best else self.epoch
        row = {"split": "test", "epoch": epoch, "loss": found.loss, "accuracy": found.accuracy, "count": found.count}
        self.run_directory.log([row])
        return found

    def _announce(self):
        self.progress.line(f"{self.data}\n{self.config.model.name}: {self.step.graph.size:,} weights")
        self.progress.line(self.trainer.choice)
        if self.data.note:
            self.progress.line(f"note: {self.data.note}")
        if "validation" not in self.data.splits:
            self.progress.line("no validation split: the last weights are kept, nothing is chosen")

    def _train(self, signals):
        train = self.config.train
        for self.epoch in range(1, train.epochs + 1):
            start, totals = time.perf_counter(), np.zeros(3)
            place = 0
            while place < self.batches:
                accumulate = min(train.accumulate, self.batches - place)
                steps = min(train.steps_per_launch, (self.batches - place) // accumulate)
                self.step(accumulate, steps)
                self.steps += steps
                place += steps * accumulate
                if signals.caught:
                    break
                if time.perf_counter() - self.looked > LOOK:
                    totals += self._look()
                    self.progress.epoch(self.epoch, totals)
            self.step.wait()
            totals += self._look(waited=True)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            if signals.caught:
                return
            self.progress.epoch(self.epoch, totals)
            due = self.epoch % train.evaluate_every == 0 or self.epoch == train.epochs
            found = self._evaluate() if due else []
            self.progress.line(self._line(totals, seconds, found))
            if time.perf_counter() - self.saved > SAVE:
                self._save("last")

    def _look(self, waited=False):
        """Log the updates done since the last look; return the sums of their losses, hits and images.

        waited: nothing is under way. Else a device may be some steps behind those that it was given.
        """
        self.looked = time.perf_counter()
        table = self.step.metrics(self.seen)
        rows = [
            {"split": "train", "update": number, "epoch": (row[-1] + 1) / self.batches}
            | dict(zip(METRICS, row, strict=True))
            for number, row in enumerate(table.tolist(), self.seen)
        ]
        self._log(rows)
        self.seen += len(rows)
        self.images += int(table[:, 2].sum())
        if self.step.halted:
            raise GpunetError(self._halted(self.step.state))
        if not self.explained and self.step.types.scaled:
            done = self.steps if waited or not self.step.backend.graphs else self._steps_until(rows)
            if done > self.seen:
                self.explained = True
                self.progress.line(self._skipped(done, float(self.step.state["loss_scale"])))
        return np.array([table[:, 0] @ table[:, 2], table[:, 1] @ table[:, 2], table[:, 2].sum()])

    def _log(self, rows):
        self.rows += rows
        self.run_directory.log(rows)

    def _steps_until(self, rows):
        """Return how many steps, skipped ones too, there were until the last of these rows."""
        if not rows:
            return 0
        epoch, place = divmod(int(rows[-1]["batch"]), self.batches)
        accumulate = self.config.train.accumulate
        return epoch * -(-self.batches // accumulate) + place // accumulate + 1

    def _skipped(self, done, scale):
        return (
            f"note: {done - self.seen} of the first {done} updates skipped, their gradients overflowed float16; at the "
            f"beginning of half-precision training that is normal: each halves the loss scale, now {scale:,.0f}"
        )

    def _halted(self, state):
        rates = self.step.rates
        rate = rates[min(int(state["update"]), len(rates) - 1)]
        epoch, place = divmod(int(state["halt"]), self.batches)
        scale = " and the smallest loss scale, 1" if self.step.types.scaled else ""
        return (
            f"{self.run_directory.path}: loss or gradient is not finite in epoch {epoch + 1}, batch {place + 1} of "
            f"{self.batches}, at learning rate {rate:.3g}{scale}; the weights before it are in last.safetensors. "
            f"Try a lower optimizer.lr ({rate / 10:.1g}), schedule.warmup = 1 or optimizer.clip = 1"
        )

    def _evaluate(self):
        """Measure the watched splits; keep the weights if validation is better than ever."""
        rows = []
        for name, source in self.trainer.watched.items():
            rows.append({"split": name, "epoch": self.epoch, "update": self.seen, **self.step.evaluate(source)})
        self._log(rows)
        for row in rows:
            if row["split"] == "validation" and (self.best is None or self._rank(row) > self._rank(self.best)):
                self.best = row
                self._save("best")
        return rows

    def _rank(self, row):
        """What makes validation better: accuracy with labels, then a smaller loss."""
        return (row["accuracy"] if self.data.train.labels is not None else 0, -row["loss"])

    def _save(self, name):
        self.saved = time.perf_counter()
        checkpoint = self.trainer.checkpoint(self.epoch, best=self.best)
        checkpoint.save(self.run_directory.path / f"{name}.safetensors")

    def _line(self, totals, seconds, found):
        loss, hits, count = totals
        trained = f"loss {loss / count:.4f} {hits / count:7.2%}" if count else "every update skipped"
        parts = [f"epoch {self.epoch:>3}/{self.config.train.epochs}", trained]
        parts += [f"{row['split']} {row['loss']:.4f} {row['accuracy']:7.2%}" for row in found]
        parts += [f"{count / seconds:,.0f} img/s", clock(time.perf_counter() - self.trainer.start), self.progress.left]
        return "  ".join(parts)

    def _result(self, status, test):
        return Result(
            run=self.run_directory,
            config=self.config,
            data=self.data,
            step=self.step,
            status=status,
            epochs=self.seen / -(-self.batches // self.config.train.accumulate),
            updates=self.seen,
            images=self.images,
            training_seconds=self.seconds,
            seconds=time.perf_counter() - self.trainer.start,
            rows=self.rows,
            best=self.best,
            test=test,
        )


class _Signals:
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
