"""The training run: steps over the data, evaluated and saved at their times, until it ends or is told to."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..batch import Batch, blank_batch
from ..config import Config
from ..data.collate import TARGET_BUCKETS
from ..data.training import TrainingData
from ..data.workers import WorkerLost
from ..denoising import noise_seed
from ..device import make_current, pick_device, pick_mode, pick_precision
from ..files import write_json_atomic
from ..models.build import build_model
from ..ops import _backend
from ..runs.checkpoint import copied, demand_continuable, save_checkpoint
from ..runs.listener import Listeners, Run, described
from ..runs.run_log import cut_back, plain
from ..scoring.evaluators import demand_hotcoco
from .build import build_step
from .canvas import demand_canvas
from .distributed import Processes
from .evaluator import Evaluator
from .loss_rows import LossRows
from .memory import explain_memory
from .resuming import Origin, asked_for
from .run_ahead import RunAhead
from .signals import Stopped, StopSignal
from .time_limit import TimeLimit, stopwatch

_SETTLED = 256  # pixels of a side: maps of all levels have several


class Trainer:
    """One run from its configuration, or continued from a checkpoint's content, as one of ``processes``.

    elapsed: seconds since this process took up the run, for what its time is limited to (default: from here on);
    origin: how the run was started (default: so, and by so many processes).

    Everything that can be wrong with the configuration or the data is found here, before the run's folder is touched.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        processes: Processes,
        checkpoint: dict | None = None,
        elapsed: Callable[[], float] | None = None,
        origin: Origin | None = None,
    ):
        self.config, self.data, self.processes = config, data, processes
        self._origin = (origin or Origin(config, asked_for(config), processes.world)).saved()
        _backend.check_environment()
        if config.fast_eval:
            demand_hotcoco()
        self.device = pick_device(config.device, processes.local_rank)
        make_current(self.device)
        self.precision = pick_precision(config.precision, self.device)
        self.mode = pick_mode(config.mode, self.device, processes.world)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, len(data.classes))
        demand_canvas(config, self.model.backbone.multiple)
        self.steps_per_epoch = data.steps_per_epoch // config.accumulate
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"--accumulate {config.accumulate}: an epoch has {data.steps_per_epoch} batches of "
                f"{config.batch_size}; accumulate fewer, or lower --batch-size"
            )
        if config.max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.max_steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.done = 0
        self.best: float | None = None
        self._since_best = 0  # evaluations
        self._limit = None if config.hours is None else self._time_limit(elapsed or stopwatch())
        self._checkpoint = checkpoint
        # Runs of version 0.1.0 draw the noise of each process from one stream, and go on with it.
        self._streams = checkpoint is not None and "noise" in checkpoint["rng"]
        self._listeners, self._stop = Listeners(), StopSignal()
        if checkpoint is not None:
            images = data.images["train"]
            demand_continuable(
                checkpoint, processes.world, config.batch_size, self.steps_per_epoch, config.data, images
            )
        self.batch_shapes = data.choose_shapes(self.total_steps) if self.mode == "graph" else None

    def prepare(self) -> None:
        """Move the model to the device and make what surrounds it; restore all of it from the checkpoint, if any."""
        config, processes = self.config, self.processes
        model = self.model.to(self.device, memory_format=torch.channels_last)
        classes = len(self.data.classes)
        self.step = build_step(
            config, model, classes, self.steps_per_epoch, self.precision, self.mode, processes, say=self._warn
        )
        if self.batch_shapes is not None:
            self.step.expected = frozenset(self.batch_shapes.shapes)
        criterion, self.average = self.step.criterion, self.step.average
        evaluated = model if self.average is None else self.average.model
        self.evaluator = Evaluator(evaluated, self.data, config, self.precision, processes, criterion.cost)
        self._losses = LossRows(self.step.record, criterion, processes)
        side = -(-_SETTLED // model.backbone.multiple) * model.backbone.multiple
        self.step.settle(blank_batch(1, (side, side), TARGET_BUCKETS[0]))
        if self._checkpoint is not None:
            self._restore(self._checkpoint)

    def fit(self, folder: Path, listeners: Listeners, restart: str | None = None) -> dict:
        """Train to the end, writing into ``folder`` -> the row of the last evaluation.

        listeners: are told of it, on the first process; restart: what the log is to say of a run that goes on by
        itself. Raises Diverged, with the last good checkpoint left as it is,
        and Stopped after SIGINT, SIGTERM or SIGHUP, with all steps so far saved.
        """
        self._folder, self._listeners = folder, listeners if self.processes.first else Listeners()
        self._last_evaluation: dict = {}
        with self._stop:
            try:
                self._start(restart)
                reason = self._train()
            except BaseException as error:
                how, reason = ("stopped", str(error)) if isinstance(error, Stopped) else ("failed", described(error))
                self._listeners.end(how, reason, self._last_evaluation)
                raise
            self._listeners.end("finished", reason, self._last_evaluation)
        return self._last_evaluation

    @property
    def signal(self) -> int | None:
        """The signal that came while it trained, whether or not there was still something to stop."""
        return self._stop.received

    def _start(self, restart: str | None) -> None:
        """Bring the folder to where the run begins, or goes on."""
        folder, rows = self._folder, []
        if self.processes.first:
            for left_by_a_kill in folder.glob(".*.tmp"):
                left_by_a_kill.unlink()
        if self._checkpoint is None:
            self._save(tell=False)  # from here on the run can be resumed whatever happens
        elif self.processes.first:
            rows = cut_back(folder, self.done)
            # Killed after the last step, a run has only its last pictures left to draw.
            self._last_evaluation = next((row for row in reversed(rows) if row["event"] == "eval"), {})
        if self.processes.first and not (folder / "config.json").exists():
            write_json_atomic(folder / "config.json", self._origin["config"], indent=2)
        run = Run(
            folder=folder,
            config=self.config,
            classes=self.data.classes,
            device=self.device,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            step=self.done,
            rows=rows,
            validation=self.data.validation,
            truth=lambda: self.data.ground_truth,
            infer=self.evaluator.infer,
            weights=lambda: copied(self._weights()),
            planned=lambda: self.planned_steps,
            warn=self._warn,
            stop=self._stop.ask,
        )
        self._listeners.tell("run_started", run)
        if restart is not None:
            self._listeners.tell("row_logged", {"event": "restart", "step": self.done, "message": restart})

    def _train(self) -> str:
        """-> why the run is over, where it is not for its configured end."""
        epochs = self.done // self.steps_per_epoch  # that were begun
        while (reason := self._over()) is None:
            stop = self._train_epoch(epochs)
            epochs += 1
            if self.done == self.planned_steps or epochs % self.config.evaluate_every == 0:
                self._evaluate(epochs)
                self._lap("evaluation")
                if self.config.patience is not None:
                    self._since_best = self.processes.from_first(self._since_best)
            self._save()
            self._plan()
            if stop is not None and self._over() is None:
                raise Stopped(stop, self.done)
        return reason

    @property
    def planned_steps(self) -> int:
        """The steps that the run will have, as far as is known now."""
        return self.total_steps if self._limit is None else self._limit.end

    def _over(self) -> str | None:
        """Why the run is over, "" at its configured end; None: it is not."""
        if self.done == self.total_steps:
            return ""
        if self.config.patience is not None and self._since_best >= self.config.patience:
            return f"AP has not risen for {self._since_best} evaluation{'s' * (self._since_best > 1)}"
        return f"the time of --hours {self.config.hours:g} is over" if self.done == self.planned_steps else None

    def _time_limit(self, elapsed: Callable[[], float]) -> TimeLimit:
        config, world = self.config, self.processes.world
        # An image of an evaluation takes less than one that is trained on.
        evaluation = self.data.images["val"] / (config.batch_size * config.accumulate * world)
        return TimeLimit(
            3600 * config.hours,
            self.total_steps,
            self.steps_per_epoch,
            config.evaluate_every,
            config.checkpoint_every,
            evaluation,
            elapsed,
        )

    def _lap(self, part: str | None = None) -> None:
        if self._limit is not None:
            self._limit.lap(part)

    def _plan(self) -> None:
        """Plan the rest of the run; all processes do so at the same step, and as the first one does."""
        if self._limit is not None:
            self._limit.plan(self.done)
            self._limit.end = self.processes.from_first(self._limit.end)

    def _train_epoch(self, epoch: int) -> int | None:
        """One epoch, or what is left of it -> the signal that asks the run to end after it, if any."""
        self.model.train()
        window, config = self._losses.window, self.config
        window.restart_clock()
        self._lap()
        first = self.done - epoch * self.steps_per_epoch
        batches = self._batches(epoch, first * config.accumulate)
        lead = RunAhead(self.device)
        for _ in range(first, self.steps_per_epoch):
            waiting = time.perf_counter()
            try:
                step_batches = self._next(batches)
            except WorkerLost:
                if self._stop.number is None or self.processes.world > 1:
                    raise
                self._save()  # the signal was sent to the workers, too
                raise Stopped(self._stop.number, self.done) from None
            waited = time.perf_counter() - waiting
            if self._limit is not None:
                self.step.schedule.pace = self._limit.pace(self.step.schedule.done, self.done)
            with explain_memory(step_batches, config, config.denoising.groups_for):
                self.step(*step_batches)
            lead.step()
            self.done += 1
            ids = [number for batch in step_batches for number in batch.ids.tolist()]
            window.add(ids, waited)
            self._lap("step")
            row_is_due, epoch_ended = self.done % config.log_every == 0, self.done % self.steps_per_epoch == 0
            if not epoch_ended and (row_is_due or self.processes.world == 1):
                self._plan()
            ended = epoch_ended or self.done == self.planned_steps
            stop = None
            if ended or row_is_due:
                rates = self.step.schedule.rates()
                signals = self._losses.close(self.done, epoch + 1, rates, self._stop.number)
                stop = next((number for number in signals if number is not None), None)
            self._log_losses()
            self._listeners.tell("step_ended", self.done, len(ids) * self.processes.world, waited)
            if self.processes.world == 1:  # several processes must stop at the same step: one where they talk anyway
                stop = self._stop.number
            if not ended:  # after the last step comes the evaluation, and then the checkpoint
                every = config.checkpoint_every
                if stop is not None or (every is not None and self.done % every == 0):
                    self._save()
                if stop is not None:
                    raise Stopped(stop, self.done)
            if ended:
                break
        self._log_losses(wait=True)
        self.step.epoch_ended()
        return stop

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """This process's batches of an epoch from number ``first`` on, each with a seed of its own for its noise."""
        rank, world = self.processes.rank, self.processes.world
        for number, batch in enumerate(self.data.training(epoch, first), start=first):
            # Counted over all processes: however many share a step, its noise is the same.
            seed = noise_seed(self.config.seed, epoch, number * world + rank)
            yield batch if self._streams else replace(batch, noise_seed=seed)

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """The next step's batches."""
        found = list(itertools.islice(batches, self.config.accumulate))
        if self.done == 0:
            batch = copy.deepcopy(found[0])
            self._listeners.tell("first_batch", batch, self.step.preview(batch))
        return found

    def _evaluate(self, epoch: int) -> None:
        """Evaluate, and tell."""
        started = time.perf_counter()
        evaluation = self.evaluator(epoch)
        if evaluation is None:
            return
        metrics = evaluation.metrics | self.step.noise_meter.read()
        seconds = round(time.perf_counter() - started, 2)
        row = plain({"event": "eval", "step": self.done, "epoch": epoch, "seconds": seconds, **metrics})
        best = row["AP"] is not None and (self.best is None or row["AP"] > self.best)
        if best:
            self.best, self._since_best = row["AP"], 0
        elif row["AP"] is not None:
            self._since_best += 1
        self._last_evaluation = row
        self._listeners.tell("row_logged", row)
        self._listeners.tell("evaluated", row, evaluation.results, best)

    def _log_losses(self, wait: bool = False) -> None:
        for row in self._losses.arrived(wait):
            self._listeners.tell("row_logged", plain(row))

    def _warn(self, text: str) -> None:
        self._listeners.warn(self.done, text)

    def _weights(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.model.state_dict(),
            "config": self._origin["config"],
            "classes": [list(entry) for entry in self.data.classes],
            "step": self.done,
            "epoch": self.done // self.steps_per_epoch,  # whole ones
        }

    def _save(self, tell: bool = True) -> None:
        self._lap()
        self._log_losses(wait=True)
        window = self._losses.state(self.done)
        streams = {"noise": self.processes.gather(self.step.noise_generator.get_state())} if self._streams else {}
        path = self._folder / "checkpoint.pt"
        if self.processes.first:
            state = {
                **self.step.state(),
                "rng": {**streams, "torch": torch.get_rng_state()},
                "best": self.best,
                "since_best": self._since_best,
                "window": window,
                "matching": self.evaluator.matching.state(),
                "noise_sums": self.step.noise_meter.sums,
            }
            if self._limit is not None:
                state["time_limit"] = self._limit.state()
            save_checkpoint(path, self._weights() | self._origin | state)
        if tell:
            self._listeners.tell("checkpoint_saved", path, self.done)
        self._lap("saving")

    def _restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None:
            self.average.model.load_state_dict(checkpoint["ema"])
        self.step.restore(checkpoint)
        if self._streams:
            self.step.noise_generator.set_state(checkpoint["rng"]["noise"][self.processes.rank])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        self.done, self.best = checkpoint["step"], checkpoint["best"]
        self._since_best = checkpoint.get("since_best", 0)  # version 0.1.0 had no patience
        if self._limit is not None:
            self._limit.restore(checkpoint["time_limit"])
        self._losses.window.restore(checkpoint["window"])
        self.evaluator.matching.restore(checkpoint["matching"])
        self.step.noise_meter.sums.copy_(checkpoint["noise_sums"])
