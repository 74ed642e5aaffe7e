"""The Trainer: a loop over the public Step, with validation, checkpoints, progress and a clean end in every case."""

import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpunet.backends import backend as named
from gpunet.backends import choose
from gpunet.core.step import METRICS
from gpunet.data.preprocess import Preprocess
from gpunet.errors import GpunetError
from gpunet.train import initial
from gpunet.train.build import (
    build_data,
    build_graph,
    build_normalisation,
    build_preprocess,
    build_source,
    build_step,
)
from gpunet.train.checkpoint import Checkpoint
from gpunet.train.config import to_toml
from gpunet.train.fault import explain, not_finite
from gpunet.train.monitor import check as check_monitor
from gpunet.train.predictor import Predictor
from gpunet.train.progress import Progress
from gpunet.train.report import Result, write_report
from gpunet.train.resume import Position, Resumption, data_digest, pins
from gpunet.train.run import Run, check_space
from gpunet.train.signals import Signals
from gpunet.train.start import begin
from gpunet.train.summary import Plan
from gpunet.train.tensorboard import Board, check_board
from gpunet.train.text import clock
from gpunet.train.watch import Watch

LOOK = 0.1  # seconds between two looks at the metrics table


class Trainer:
    """Trains what a Config describes; a graph or data set given here is used in place of [model] or [data].

    What is chosen, the best checkpoint, is chosen by validation. The test split is looked at once, after the training,
    unless train.monitor_test is true: then it is measured beside validation, and still chooses nothing.
    checkpoint: one that is put into it afterwards, so that [start] has nothing to do; `resume` does both.
    """

    def __init__(self, config, *, graph=None, data=None, show=True, checkpoint=None):
        self.start = time.perf_counter()
        self.config, self.show = config, show
        if config.run.tensorboard:
            check_board()
        name, self.choice = choose(config.train.backend)  # first: what cannot run is told before data is fetched
        backend = named(name)
        self.data = data if data is not None else build_data(config)
        check_monitor(config, self.data)
        train = self.data.train
        outputs = len(self.data.classes) if train.labels is not None else train.values.shape[1]
        self.graph = graph if graph is not None else build_graph(config, train.images.shape[1:], outputs)
        pending = initial.begin(config, self.graph) if checkpoint is None else {}
        whitened = [name for name, chosen in pending.items() if chosen.name == "whitening"]
        self.started = begin(config, self.graph, whitened) if checkpoint is None else None
        Plan(config, backend, self.data, self.graph).check()
        names = ["train", "validation", *["test"] * config.train.monitor_test]
        if checkpoint is None:
            preprocess = build_preprocess(config, self.data)
            held = preprocess.of(self.data, names)
            mean, scale = build_normalisation(config, held)
        else:
            preprocess = Preprocess.from_arrays(checkpoint.input)
            held, mean, scale = preprocess.of(self.data, names), checkpoint.input["mean"], checkpoint.input["scale"]
        sources = {n: build_source(config, n, held, mean, scale) for n in names if n in held.splits}
        source, self.watched = sources.pop("train"), sources
        self.inits = initial.fit(self.graph, _unset(pending, self.started), source, config.train.seed)
        self.step = build_step(config, self.graph, source, backend)
        self.predictor = Predictor(self.step, mean, scale, self.data.classes, config.loss.name, preprocess)
        self.predictor.check_views(config.train.views)  # what does not fit is told before the training
        self.pins, self.data_digest = pins(self.step), data_digest(self.data)
        self.resumed = None

    @classmethod
    def resume(cls, run, *, overrides=(), inexact=False, given=None, graph=None, data=None, show=True):
        """Return a Trainer whose `fit` goes on with a run, from its newest checkpoint, in the same directory.

        The outcome is the uninterrupted run's, bit for bit; raises GpunetError where something here is not as it was
        there, unless `inexact`. overrides: "run.keep=3", of settings that change no bit. given: a Config that has to be
        the run's. graph, data: in place of [model] or [data], as they were given then. Until `fit` ends, or the
        process, the run is locked.
        """
        resumed = Resumption(run, overrides, given)
        try:
            trainer = cls(resumed.config, graph=graph, data=data, show=show, checkpoint=resumed.checkpoint)
            resumed.enter(trainer, inexact)
        except BaseException:
            resumed.run.close()
            raise
        trainer.resumed = resumed
        return trainer

    def evaluate(self, split="test", views=None):
        """Return the Evaluation of the weights as they are on a split of the data set; `views` as in `predict`."""
        return self.predictor.evaluate(self.data, split, views)

    def predict(self, images, views=None):
        """Return probabilities (n, classes) for raw images (n, h, w, c), the mean over `views` of each, as "flip"."""
        return self.predictor.predict(images, views)

    def checkpoint(self, epoch, **about):
        """Return a Checkpoint of the weights and all else as they are."""
        about |= {
            "config": to_toml(self.config),
            "classes": self.data.classes,
            "input_shape": self.graph.input_shape,
            "outputs": self.graph.output_shape[-1],
            "epoch": epoch,
            "pins": self.pins,
            "data": self.data_digest,
        }
        made = self.predictor
        return Checkpoint.of(self.step, made.mean, made.scale, about, made.preprocess)

    def fit(self):
        """Train for the epochs, or the steps, of the config and return the Result; the weights are then the best ones.

        Ctrl-C, SIGTERM and SIGHUP end it after the update at hand: a checkpoint and a report are left, and
        KeyboardInterrupt or SystemExit(143 or 129) is raised. Raises GpunetError where the loss or a gradient is not
        finite, where a checkpoint cannot be written, and where a replica fails.
        """
        if self.step.state["update"] and self.resumed is None:
            raise GpunetError("fit: expected a Trainer that has not trained; make a new one")
        resumed, self.resumed = self.resumed, None
        try:
            training = _Training(self, resumed)
        except BaseException:
            if resumed is not None:
                resumed.run.close()
            raise
        return training.run()


def _unset(pending, started):
    """Return those of the weights that wait for images which [start] has not given values to."""
    taken = started.matched if started else ()
    return {name: chosen for name, chosen in pending.items() if name not in taken}


class NotFinite(GpunetError):
    """The loss or a gradient was not finite; the training is at its end, but whole."""


class _Training:
    """One call of fit: its run directory, its clock, and what it has seen so far."""

    def __init__(self, trainer, resumed=None):
        self.trainer, self.config, self.step, self.data = trainer, trainer.config, trainer.step, trainer.data
        self.batches, train = self.step.batches, self.config.train
        self.accumulate = train.batches_an_update(self.batches)
        per_epoch = -(-self.batches // self.accumulate)
        self.limit = train.steps or train.epochs * per_epoch  # steps to take, skipped ones too
        self.epochs = -(-self.limit // per_epoch)
        self.resumed, self.rows = resumed, []
        self._go_on_from(resumed.position if resumed else Position())
        self.run_directory = self._directory()
        if self.config.run.tensorboard:
            self.run_directory.board = Board(self.run_directory.path / "tensorboard")
        whole, rest = divmod(self.limit, per_epoch)
        images = whole * len(self.data.train) + rest * self.accumulate * train.batch
        self.progress = Progress(images, self.epochs, trainer.show, labelled=self._labelled)
        self.progress.begin(self.epoch, self.totals[2], self.ended * len(self.data.train) + self.totals[2])
        self.step.backend.show = self.progress.compiling
        self.watch = Watch(self.step, self.config.train.watch) if self.config.train.watch else None

    def _go_on_from(self, position):
        """Count on from a position; a new training's is all zeros."""
        self.ended, self.seen, self.images, self.best = position.ended, position.seen, position.images, position.best
        # steps taken, and whether it was said that not all of them count
        self.steps, self.explained = position.steps, position.explained
        self.seconds, self.spent, self.totals = position.seconds, position.spent, np.array(position.totals)
        self.start = self.trainer.start - position.elapsed
        self.waited, self.plateau = position.waited, position.plateau
        self.epoch = self.ended if self._gave_up else min(self.ended + 1, self.epochs)
        self.looked = self.saved = time.perf_counter()
        self.saved_steps, self.inexact, self.resumptions = self.steps, position.inexact, position.resumed

    def _position(self):
        """Return where it stands, for a checkpoint."""
        return Position(
            ended=self.ended,
            seen=self.seen,
            steps=self.steps,
            images=self.images,
            totals=self.totals.tolist(),
            spent=self.spent,
            seconds=self.seconds,
            elapsed=self.elapsed,
            explained=self.explained,
            logged=self.run_directory.logged,
            inexact=self.inexact,
            resumed=self.resumptions,
            waited=self.waited,
            plateau=self.plateau,
        )

    def _directory(self):
        """Return the run directory, of which nothing that comes after the position is left."""
        nbytes = len(self.trainer.checkpoint(0).content()) + 4096  # of numbers that are not there yet
        if self.resumed is None:
            check_space(Path(self.config.run.directory), nbytes, self.config.run.keep)
            return Run.create(self.config)
        run = self.resumed.run
        check_space(run.path, nbytes, self.config.run.keep)
        self.rows = run.rewind(self.resumed.position.logged)
        return run

    @property
    def elapsed(self):
        """Seconds since the training was begun, those in which it did not run left out."""
        return time.perf_counter() - self.start

    def run(self):
        """Train; leave checkpoint, curves and report however it ends."""
        try:
            with Signals() as signals:
                result, failure = self._until_the_end(signals)
        finally:
            self.run_directory.close()
            self.progress.close()
            self.step.close()
        if failure:
            raise failure
        self.progress.line(result.summary)
        if signals.caught:
            self.progress.line(f"{self._resume} goes on from here")
        signals.end()
        return result

    def _until_the_end(self, signals):
        """Train, test and report; return (Result, the GpunetError that ended it or None)."""
        failure = test = last = None
        try:
            self._announce()
            self._train(signals)
            last = self._save("last")
            if last is None:
                raise NotFinite(*explain(self.step, self.config, self.rows, self.run_directory.path))
            if not signals.caught:
                test = self._finish()
        except NotFinite as error:
            failure = error
        except GpunetError as error:
            failure = self._with_advice(error)
        early = self._gave_up if not signals.caught else ""
        result = self._result(f"stopped: {failure}" if failure else early or signals.status, test)
        try:
            write_report(result)
            if not failure and not signals.caught and last:
                last.about["finished"] = True
                self.run_directory.save(last, "last")
        except (GpunetError, OSError) as error:
            failure = failure or self._with_advice(error)
        return result, failure

    @property
    def _resume(self):
        return f"gpunet train --resume {self.run_directory.path}"

    def _with_advice(self, error):
        """Return an error that ended the training and was none of the training's own, with what to do."""
        text, _, log = str(error).partition("\n")
        made = GpunetError(f"{text}; once that is mended, {self._resume} goes on from the last checkpoint", log)
        made.__cause__ = error
        return made

    @contextmanager
    def _guarded(self):
        """Turn what a replica raises, whatever it is, into one sentence; half updated weights are not saved."""
        try:
            yield
        except GpunetError:
            raise
        except Exception as error:
            what = ": ".join([*getattr(error, "__notes__", ()), type(error).__name__, str(error)]).rstrip(": ")
            place = f"{self.run_directory.path}: epoch {self.epoch}, step {self.steps + 1}"
            raise GpunetError(f"{place}: {what}") from error

    def _finish(self):
        """Go back to the best weights and measure them on the test split."""
        if self.best is not None:
            self.run_directory.checkpoint("best").restore(self.step)
        return self._test()

    def _test(self):
        """Measure the kept weights on the test split, once; the last line of the metrics says what came out."""
        if self.data.test is None:
            return None
        found = self.trainer.evaluate("test", self.config.train.views)
        epoch = self.best["epoch"] if self.best else self.epoch
        row = {"split": "test", "epoch": epoch, "loss": found.loss, "accuracy": found.accuracy, "count": found.count}
        self.run_directory.log([row])
        return found

    def _announce(self):
        self.progress.line(f"{self.data}\n{self.config.model.name}: {self.step.graph.size:,} weights")
        self.progress.line(self.trainer.choice)
        self.progress.line(self.config.rate_line)
        if self.resumed:
            self.progress.line("\n".join([self.resumed.line(self.batches), *self.resumed.notes]))
        if self.trainer.started:
            self.progress.line(str(self.trainer.started))
        if self.trainer.predictor.preprocess:
            self.progress.line(f"preprocess: {self.trainer.predictor.preprocess}")
        for line in self.trainer.inits:
            self.progress.line(line)
        if self.data.note:
            self.progress.line(f"note: {self.data.note}")
        if "validation" not in self.data.splits:
            self.progress.line("no validation split: the last weights are kept, nothing is chosen")

    def _train(self, signals):
        while self.ended < self.epochs and not self._gave_up and not signals.caught:
            self.epoch = self.ended + 1
            self._train_epoch(signals)
            if not signals.caught:
                self._end_epoch()

    def _train_epoch(self, signals):
        """Take the epoch's steps, from wherever in it the State is; a signal ends it between two of them."""
        train, self.since = self.config.train, time.perf_counter()
        place = int(self.step.state["batch"]) - self.ended * self.batches
        while place < self.batches and self.steps < self.limit and not signals.caught:
            accumulate = min(self.accumulate, self.batches - place)
            steps = min(train.steps_per_launch, (self.batches - place) // accumulate, self.limit - self.steps)
            with self._guarded():
                steps = self._step(accumulate, steps)
            self.steps += steps
            place += steps * accumulate
            if time.perf_counter() - self.looked > LOOK:
                self._look()
                self.progress.epoch(self.epoch, self.totals)
            if self._due():
                self._catch_up()
                self._save("last")
                self.since = time.perf_counter()
        self._catch_up()

    def _step(self, accumulate, steps):
        """Do up to `steps` updates and return how many; one that is watched goes alone."""
        since = self.steps % self.config.train.watch_every
        if self.watch and not since:
            self.step.wait()
            self._look(waited=True)  # rows come in the order of updates
            self.run_directory.log(self.watch.step(accumulate))
            return 1
        steps = min(steps, self.config.train.watch_every - since) if self.watch else steps
        self.step(accumulate, steps)
        return steps

    def _catch_up(self):
        """Wait for all steps, log them, and count the time they took."""
        with self._guarded():
            self.step.wait()
        self._look(waited=True)
        self.spent += time.perf_counter() - self.since

    def _end_epoch(self):
        self.progress.epoch(self.epoch, self.totals)
        due = self.epoch % self.config.train.evaluate_every == 0 or self.epoch == self.epochs
        found = self._evaluate() if due else []
        self.progress.line(self._line(found))
        self._heed(found)
        self.ended += 1
        self.seconds, self.spent, self.totals = self.seconds + self.spent, 0.0, np.zeros(3)
        if self._due():
            self._save("last")

    def _due(self):
        """Return whether a checkpoint is due, by steps or by a clock that nobody sets."""
        settings = self.config.run
        return (0 < settings.checkpoint_steps <= self.steps - self.saved_steps) or (
            0 < settings.checkpoint_seconds < time.perf_counter() - self.saved
        )

    def _look(self, waited=False):
        """Log the updates done since the last look, and add to the epoch's sums of losses, hits and images.

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
            self._save("last")
            raise NotFinite(*explain(self.step, self.config, self.rows, self.run_directory.path))
        if not self.explained and self.step.types.scaled:
            done = self.steps if waited or not self.step.backend.graphs else self._steps_until(rows)
            if done > self.seen:
                self.explained = True
                self.progress.line(self._skipped(done, float(self.step.state["loss_scale"])))
        self.totals += [table[:, 0] @ table[:, 2], table[:, 1] @ table[:, 2], table[:, 2].sum()]

    def _log(self, rows):
        self.rows += rows
        self.run_directory.log(rows)

    def _steps_until(self, rows):
        """Return how many steps, skipped ones too, there were until the last of these rows."""
        if not rows:
            return 0
        epoch, place = divmod(int(rows[-1]["batch"]), self.batches)
        return epoch * -(-self.batches // self.accumulate) + place // self.accumulate + 1

    def _skipped(self, done, scale):
        return (
            f"note: {done - self.seen} of the first {done} updates skipped, their gradients overflowed float16; at the "
            f"beginning of half-precision training that is normal: each halves the loss scale, now {scale:,.0f}"
        )

    def _evaluate(self):
        """Measure the watched splits; keep the weights if validation is better than ever."""
        rows = []
        with self._guarded():
            self.step.estimate()
        for name, source in self.trainer.watched.items():
            with self._guarded():
                found = self.step.evaluate(source)
            rows.append({"split": name, "epoch": self.epoch, "update": self.seen, **found})
        self._log(rows)
        for row in rows:
            if row["split"] != "validation" or not np.isfinite(row["loss"]):
                continue  # weights that give NaN are not kept, whatever they get right
            if self.best is None or self._rank(row) > self._rank(self.best):
                self.best = row
                self._save("best")
        return rows

    def _rank(self, row):
        """What makes validation better: accuracy with labels, then a smaller loss."""
        return (row["accuracy"] if self._labelled else 0, -row["loss"])

    @property
    def _labelled(self):
        """Whether images have classes, so that accuracy means something."""
        return self.data.train.labels is not None

    def _heed(self, found):
        """Count a validation; where there is no getting better, the rate falls or the training gives up."""
        row = next((row for row in found if row["split"] == "validation"), None)
        if row is None:
            return
        name, sign = ("accuracy", 1) if self._labelled else ("loss", -1)
        self.waited.see(row[name] if np.isfinite(row["loss"]) else np.nan, sign, self.config.train.min_delta)
        settings = self.config.schedule
        if settings.name == "plateau" and self.plateau.fall(row[settings.monitor], settings):
            state = self.step.state
            state["lr_scale"] = self.plateau.scale
            self.step.state = state
            self.progress.line(f"validation {settings.monitor} is on a plateau: learning rate x {self.plateau.scale:g}")

    @property
    def _gave_up(self):
        """Why the training ends early, or nothing."""
        patience = self.config.train.patience
        if patience is None or self.waited.evaluations < patience:
            return ""
        name = "accuracy" if self._labelled else "loss"
        least = f" by more than {self.config.train.min_delta:g}" if self.config.train.min_delta else ""
        return (
            f"stopped early after epoch {self.ended} of {self.epochs}: validation {name} no better{least} "
            f"in {self.waited.evaluations} evaluations (train.patience = {patience})"
        )

    def _save(self, name):
        """Write a checkpoint and return it, or None where its numbers are not finite."""
        progress = self._position().model_dump(exclude={"best"})
        checkpoint = self.trainer.checkpoint(self.epoch, best=self.best, progress=progress)
        if wrong := not_finite(checkpoint.weights, checkpoint.statistics, checkpoint.optimizer):
            self.progress.line(f"{name}.safetensors: not written: {next(iter(wrong))} is not finite; the old one stays")
            return None
        self.run_directory.save(checkpoint, name, self.config.run.keep if name == "last" else 1)
        if name == "last":
            self.saved, self.saved_steps = time.perf_counter(), self.steps
        return checkpoint

    def _line(self, found):
        loss, hits, count = self.totals
        trained = f"loss {self._measured(loss / count, hits / count)}" if count else "every update skipped"
        parts = [f"epoch {self.epoch:>3}/{self.epochs}", trained]
        parts += [f"{row['split']} {self._measured(row['loss'], row['accuracy'])}" for row in found]
        speed = count / max(self.spent, 1e-9)
        parts += [f"{speed:,.0f} img/s", clock(self.elapsed), self.progress.left]
        return "  ".join(parts)

    def _measured(self, loss, accuracy):
        return f"{loss:.4f} {accuracy:7.2%}" if self._labelled else f"{loss:.4g}"

    def _result(self, status, test):
        return Result(
            run=self.run_directory,
            config=self.config,
            data=self.data,
            step=self.step,
            status=status,
            epochs=self.seen / -(-self.batches // self.accumulate),
            updates=self.seen,
            images=self.images,
            training_seconds=self.seconds + self.spent,
            seconds=self.elapsed,
            rows=self.rows,
            resumed=self.resumptions,
            best=self.best,
            test=test,
        )
