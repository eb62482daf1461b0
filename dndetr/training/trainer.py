"""The training run: data, model and step put together, evaluated, logged, drawn and saved."""

import itertools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .build import build_step
from ..batch import Batch
from ..runs.tensorboard import demand_tensorboard
from ..runs.checkpoint import save_checkpoint, write_json_atomic
from ..config import Config, to_dict
from ..runs.console import Console
from ..data.training import TrainingData
from ..denoising import NoisedQueries
from ..device import make_current, pick_device, pick_mode, pick_precision
from ..pictures.run import draw_training, draw_validation
from ..scoring.coco import Evaluation, coco_evaluate, demand_fast_eval, detect, write_results
from ..health import write_denoising
from ..analysis.instability import PROBED, MatchingProbe
from ..runs.run_log import Journal
from .run_ahead import Lead
from .memory import explain_memory
from ..models.build import build_model
from ..models.dn_detr import Predictions
from ..ops import PARTS, _backend
from ..pictures import draw_curves
from .distributed import Processes
from .delayed_copy import Readback
from ..runs.folder import RunLog
from .loss_window import LossWindow, demand_finite, taken_apart


class Stopped(Exception):
    """A signal asked the run to end; it was saved and can be resumed."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number


class Trainer:
    """One run from its configuration, or continued from a checkpoint's content, as one of ``processes``.

    Everything that can be wrong with the configuration or the data is found here, before the run's folder is touched.
    """

    def __init__(self, config: Config, data: TrainingData, processes: Processes, checkpoint: dict | None = None):
        self.config, self.data, self.processes = config, data, processes
        _backend.check_environment()
        if config.tensorboard:
            demand_tensorboard()
        if config.fast_eval:
            demand_fast_eval()
        self.device = pick_device(config.device, processes.local_rank)
        make_current(self.device)
        self.precision = pick_precision(config.precision, self.device)
        self.mode = pick_mode(config.mode, self.device, processes.world)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, len(data.classes))
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
        self._signal: int | None = None
        self._capped = False
        self._checkpoint = checkpoint
        self.console: Console | None = None  # while it trains
        if checkpoint is not None and len(checkpoint["rng"]["noise"]) != processes.world:
            raise ValueError(
                f"the run was made by {len(checkpoint['rng']['noise'])} processes and can only be continued by as many "
                f"(now {processes.world}): start it the same way, with torchrun --nproc-per-node"
            )
        # Other data under the same classes would quietly change schedule, log and results.
        if checkpoint is not None and not 0 <= checkpoint["step"] - checkpoint["epoch"] * self.steps_per_epoch <= (
            self.steps_per_epoch
        ):
            raise ValueError(
                f"{config.data}: its {data.images['train']:,} training images make {self.steps_per_epoch:,} steps an "
                f"epoch, and the run was saved after {checkpoint['step']:,} steps in {checkpoint['epoch']:,} whole "
                "epochs: give the run's own data, or start anew on these with --init"
            )

    def summary(self) -> str:
        """One line: model, size, data, arithmetic."""
        model, images = self.config.model, self.data.images
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        groups = self.config.denoising.groups
        images_a_step = self.config.batch_size * self.config.accumulate * self.processes.world
        shared = f", {self.processes.world} processes" if self.processes.world > 1 else ""
        return (
            f"{model.variant}, {parameters:.1f} M parameters, {len(self.data.classes)} classes, "
            f"{images['train']:,} training and {images['val']:,} validation images, "
            f"{images_a_step} a step, {groups} denoising groups, {self.device.type} "
            f"{str(self.precision).removeprefix('torch.')}, {self.mode} steps{shared}"
        )

    def prepare(self) -> None:
        """Move the model to the device and make what surrounds it; restore all of it from the checkpoint, if any."""
        self.step = build_step(
            self.config,
            self.model.to(self.device, memory_format=torch.channels_last),
            len(self.data.classes),
            self.steps_per_epoch,
            self.precision,
            self.mode,
            self.processes,
            say=self._say,
        )
        self.average = self.step.average
        self._window = LossWindow(self.step.record)
        self.matching = MatchingProbe(self.step.criterion.cost, PROBED // self.processes.world)
        if self._checkpoint is not None:
            self._restore(self._checkpoint)

    def _say(self, text: str) -> None:
        if self.console is None:
            print(text, file=sys.stderr)
        else:
            self.console.message(text)

    def fit(self, folder: Path) -> dict:
        """Train to the configured end, writing into ``folder`` -> the last evaluation's metrics.

        Raises Diverged, with the last good checkpoint left as it is, and Stopped after SIGINT or SIGTERM, with all
        steps so far saved.
        """
        handlers = {number: signal.signal(number, self._note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._fit(folder)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _frame) -> None:
        """Only noted here, and heeded between two steps; a second one does not wait."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def _fit(self, folder: Path) -> dict:
        config, first = self.config, self.processes.first
        self.folder, self.readback = folder, Readback()
        if first:
            for left_by_a_kill in folder.glob(".*.tmp"):
                left_by_a_kill.unlink()
        if self._checkpoint is None:
            self._save(0)  # from here on the run can be resumed whatever happens
        elif first:
            RunLog(folder).truncate_to(self.done)
        if first and not (folder / "config.json").exists():
            write_json_atomic(folder / "config.json", to_dict(config), indent=2)
        started = time.perf_counter()
        # Killed after the last step, a run has only its pictures left to draw.
        metrics = next(iter(reversed(RunLog(folder).rows("eval"))), {}) if first else {}
        with Console(config.epochs, self.steps_per_epoch, self.done, config.quiet or not first) as self.console:
            if first:
                self.journal = Journal(folder, config, self.total_steps, self.console.message)
            for epoch in range(self.done // self.steps_per_epoch, config.epochs):
                stop = self._train_epoch(epoch)
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.evaluate_every == 0:
                    metrics = self._evaluate(epoch + 1)
                self._save(epoch + 1)
                if stop is not None and not last:
                    raise Stopped(stop, self.done)
            if first:
                picture, batches = folder / "predictions.png", self.data.validation()
                draw_validation(picture, self._predict, batches, self._names, metrics)
                write_denoising(folder, self._infer, self.data, config, self.device)
                draw_curves(folder / "metrics.jsonl", folder / "curves.png", title=f"{config.preset} on {config.data}")
                seconds = round(time.perf_counter() - started, 1)
                self.journal.write("end", self.done, epoch=config.epochs, seconds=seconds, AP=metrics.get("AP"))
                self.journal.close()
        return metrics

    def _train_epoch(self, epoch: int) -> int | None:
        """One epoch, or what is left of it -> the signal that asks the run to end after it, if any."""
        self.model.train()
        window, config = self._window, self.config
        window.restart_clock()
        first = self.done - epoch * self.steps_per_epoch
        batches = iter(self.data.training(epoch, first * config.accumulate))
        lead = Lead(self.device)
        for _ in range(first, self.steps_per_epoch):
            waiting = time.perf_counter()
            step_batches, ids = self._next(batches)
            waited = time.perf_counter() - waiting
            with explain_memory(step_batches, config, self.step.groups_for):
                self.step(*step_batches)
            lead.step()
            self.done += 1
            window.add(ids, waited)
            ended = self.done % self.steps_per_epoch == 0
            stop = None
            if ended or self.done % config.log_every == 0:
                stop = self._close_window(epoch + 1)
            shown = self._write_rows()
            self.console.advance(len(ids) * self.processes.world, waited, shown)
            if self.processes.world == 1:  # several processes must stop at the same step: one where they talk anyway
                stop = self._signal
            if not ended:  # after the last step comes the evaluation, and then the checkpoint
                every = config.checkpoint_every
                if stop is not None or (every is not None and self.done % every == 0):
                    self._save(epoch)
                if stop is not None:
                    raise Stopped(stop, self.done)
        self._write_rows(wait=True)
        return stop

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], list[int]]:
        """The next step's batches, and the ids of their images."""
        found, ids = [], []
        for batch in itertools.islice(batches, self.config.accumulate):
            ids += batch.ids.tolist()
            found.append(batch)
        slots = max(batch.targets.labels.shape[1] for batch in found)
        if not self._capped and self.step.groups_for(slots) < self.config.denoising.groups:
            self._capped = True
            self.console.message(
                f"a batch with room for {slots} objects per image gets {self.step.groups_for(slots)} denoising groups "
                f"instead of {self.config.denoising.groups} (--denoising.max-queries {self.step.max_queries})"
            )
        if self.done == 0 and self.processes.first:
            # The very noise that the first step is about to draw.
            state = self.step.noise_generator.get_state()
            noised = self.step.noised(found[0], self.step.draw(found[0]))
            self.step.noise_generator.set_state(state)
            draw_training(self.folder / "first_batch.png", found[0], noised, self._names)
        return found, ids

    def _close_window(self, epoch: int) -> int | None:
        """Send the steps since the last log row on their way to the host -> the signal that any process got."""
        values, (ids, about) = self._window.close(self.done, epoch, self.step.schedule.rates())
        about["images_per_second"] = round(about["images_per_second"] * self.processes.world, 2)
        signals, all_ids = zip(*self.processes.gather((self._signal, ids)), strict=True)
        self.readback.send(self.processes.stack(values), (all_ids, about))
        return next((number for number in signals if number is not None), None)

    def _write_rows(self, wait: bool = False) -> dict | None:
        """Log what has arrived from the device -> the newest row's numbers for the console."""
        row = None
        for values, (ids, about) in self.readback.receive(wait):
            for process_values, process_ids in zip(values, ids, strict=True):
                warning = demand_finite(process_values, process_ids, about["step"])
                if warning is not None and self.processes.first:
                    self.journal.warn(about["step"], warning)
            mean = values.mean((0, 1))
            total, norm, parts, _ = taken_apart(mean)
            weights = self.step.criterion.weights
            terms = (parts * torch.tensor((weights.label, weights.l1, weights.giou) * 2)).sum(0)
            row = {
                "loss": total.item(),
                "matching": terms[:3].sum().item(),
                "denoising": (denoising := terms[3:].sum().item()),
                "dn_share": denoising / total.item() if total else 0.0,
                **dict(zip(PARTS, terms.tolist(), strict=True)),
                "grad_norm": norm.item(),
            }
            row = {name: round(value, 6) for name, value in row.items()} | about
            self._loss = row["loss"]
            if self.processes.first:
                self.journal.write("train", **row)
        return row

    def _evaluate(self, epoch: int) -> dict:
        started = time.perf_counter()
        evaluation = self.evaluate()
        if evaluation is None:
            return {}
        metrics = evaluation.metrics | self.matching.finish(epoch) | self.step.noise_meter.read()
        seconds = time.perf_counter() - started
        self.console.evaluated(epoch, self._loss, metrics, seconds)
        self.journal.write("eval", self.done, epoch=epoch, seconds=round(seconds, 2), **metrics)
        write_results(self.folder / "detections_val.json", evaluation.results)
        if metrics["AP"] is not None and (self.best is None or metrics["AP"] > self.best):
            self.best = metrics["AP"]
            save_checkpoint(self.folder / "best.pt", self._weights(epoch) | {"metrics": {"AP": self.best}})
        return metrics

    def evaluate(self) -> Evaluation | None:
        """Score the averaged weights where there are any, else the model, on the validation images.

        Processes share the images; the first has the result, the others None.
        """
        predict = self.matching.watch(self._infer)
        found = detect(predict, self.data.validation(), self.data.classes, self.config.detections)
        everyones = self.processes.gather((*found, self.matching.fresh))
        if not self.processes.first:
            return None
        results = [result for part, _, _ in everyones for result in part]
        image_ids = sorted(image_id for _, part, _ in everyones for image_id in part)
        for *_, matches in everyones:
            self.matching.fresh |= matches
        metrics = coco_evaluate(self.data.ground_truth, results, image_ids, self.config.fast_eval)
        return Evaluation(metrics, results, image_ids)

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        predictions = self._infer(batch)
        return predictions.logits[-1], predictions.boxes[-1]

    @torch.no_grad()
    def _infer(self, batch: Batch, noised: NoisedQueries | None = None) -> Predictions:
        """All layers' predictions of the weights that are evaluated, in float32, on the device."""
        model = self.model if self.average is None else self.average.model
        batch = batch.to(self.device)
        model.eval()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits, boxes, layout = model(batch.images, batch.sizes, noised)
        return Predictions(logits.float(), boxes.float(), layout)

    @property
    def _names(self) -> list[str]:
        return [name for _, name in self.data.classes]

    def _weights(self, epoch: int) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.model.state_dict(),
            "config": to_dict(self.config),
            "classes": [list(entry) for entry in self.data.classes],
            "step": self.done,
            "epoch": epoch,
        }

    def _save(self, epoch: int) -> None:
        self._write_rows(wait=True)
        window = self._window.state()
        demand_finite(window["values"], window["ids"], self.done)
        noise = self.processes.gather(self.step.noise_generator.get_state())
        if not self.processes.first:
            return
        state = {
            **self.step.state(),
            "rng": {"noise": noise, "torch": torch.get_rng_state()},
            "best": self.best,
            "window": window,
            "matching": self.matching.state(),
            "noise_sums": self.step.noise_meter.sums,
        }
        save_checkpoint(self.folder / "checkpoint.pt", self._weights(epoch) | state)

    def _restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None:
            self.average.model.load_state_dict(checkpoint["ema"])
        self.step.restore(checkpoint)
        self.step.noise_generator.set_state(checkpoint["rng"]["noise"][self.processes.rank])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        self.done, self.best = checkpoint["step"], checkpoint["best"]
        self._window.restore(checkpoint["window"])
        self.matching.restore(checkpoint["matching"])
        self.step.noise_meter.sums.copy_(checkpoint["noise_sums"])
