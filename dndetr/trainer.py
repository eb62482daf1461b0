"""The training run: data, model and step put together, evaluated, logged, drawn and saved."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .batch import Batch
from .checkpoint import save_checkpoint, write_json_atomic
from .config import Config, to_dict
from .console import Console
from .criterion import Criterion
from .data.training import TrainingData
from .evaluation import Evaluation, evaluate, postprocess, write_results
from .models.build import build_model
from .ops import PARTS, CostWeights, LossWeights
from .optim import WeightAverage, build_optimizer, schedule_factor
from .pictures import batch_images, draw_curves, draw_first_batch, draw_predictions
from .readback import Readback
from .runlog import RunLog
from .step import TrainStep
from .window import LossWindow, demand_finite

_PICTURED = 12  # validation images in predictions.png


class Stopped(Exception):
    """A signal asked the run to end; it was saved and can be resumed."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no GPU here; use --device cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the hardware multiplies in it, float32 elsewhere."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Trainer:
    """One run from its configuration, or continued from a checkpoint's content.

    Everything that can be wrong with the configuration or the data is found here, before the run's folder is touched.
    """

    def __init__(self, config: Config, data: TrainingData, checkpoint: dict | None = None):
        self.config, self.data = config, data
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, len(data.classes))
        self.steps_per_epoch = data.steps_per_epoch
        if config.max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.max_steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.done = 0
        self.best: float | None = None
        self._window = LossWindow()
        self._signal: int | None = None
        self._checkpoint = checkpoint

    def summary(self) -> str:
        """One line: model, size, data, arithmetic."""
        model, images = self.config.model, self.data.images
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        groups = self.config.denoising.groups
        return (
            f"{model.variant}, {parameters:.1f} M parameters, {len(self.data.classes)} classes, "
            f"{images['train']:,} training and {images['val']:,} validation images, "
            f"{groups} denoising groups, {self.device.type} {str(self.precision).removeprefix('torch.')}"
        )

    def prepare(self) -> None:
        """Move the model to the device and make what surrounds it; restore all of it from the checkpoint, if any."""
        config, model = self.config, self.model.to(self.device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, config.lr, config.optimizer.backbone_scale, config.optimizer.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        self.average = WeightAverage(model, config.optimizer.ema) if config.optimizer.ema else None
        loss = config.loss
        criterion = Criterion(
            CostWeights(loss.cost_label, loss.cost_l1, loss.cost_giou, loss.alpha),
            LossWeights(loss.label, loss.l1, loss.giou, loss.alpha),
        )
        self.step = TrainStep(
            model,
            criterion,
            optimizer,
            self.scheduler,
            self.average,
            classes=len(self.data.classes),
            groups=config.denoising.groups,
            label_noise=config.denoising.label_noise,
            box_noise=config.denoising.box_noise,
            batch_active=config.denoising.padding == "official",
            clip_norm=config.optimizer.clip_norm,
            precision=self.precision,
            noise_generator=torch.Generator(self.device).manual_seed(config.seed),
        )
        if self._checkpoint is not None:
            self._restore(self._checkpoint)

    def _schedule(self):
        optimizer, epochs = self.config.optimizer, self.config.epochs
        drops = optimizer.drops[:1] if optimizer.schedule == "step" else optimizer.drops
        return schedule_factor(
            optimizer.schedule,
            self.total_steps,
            round(optimizer.warmup * self.total_steps),
            tuple(round(share * epochs) * self.steps_per_epoch for share in drops),
            optimizer.gamma,
            optimizer.floor,
        )

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
        config = self.config
        self.folder, self.log, self.readback = folder, RunLog(folder), Readback()
        if self._checkpoint is None:
            write_json_atomic(folder / "config.json", to_dict(config), indent=2)
            self._save(0)  # from here on the run can be resumed whatever happens
        else:
            for left_by_a_kill in folder.glob(".*.tmp"):
                left_by_a_kill.unlink()
            self.log.truncate_to(self.done)
        started = time.perf_counter()
        metrics: dict = {}
        with Console(config.epochs, self.steps_per_epoch, self.done, config.quiet) as self.console:
            for epoch in range(self.done // self.steps_per_epoch, config.epochs):
                loss = self._train_epoch(epoch)
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.evaluate_every == 0:
                    metrics = self._evaluate(epoch + 1, loss)
                self._save(epoch + 1)
                if self._signal is not None and not last:
                    raise Stopped(self._signal, self.done)
            seconds = time.perf_counter() - started
            self.log.write("end", self.done, epoch=config.epochs, seconds=round(seconds, 1), AP=metrics.get("AP"))
            self._draw_predictions(metrics)
            draw_curves(self.log.path, folder / "curves.png", title=f"{config.preset} on {config.data}")
        return metrics

    def _train_epoch(self, epoch: int) -> float | None:
        """One epoch, or what is left of it -> the last logged loss."""
        self.model.train()
        window = self._window
        window.restart_clock()
        first = self.done - epoch * self.steps_per_epoch
        batches = iter(self.data.training(epoch, first))
        for _ in range(first, self.steps_per_epoch):
            waiting = time.perf_counter()
            batch = next(batches)
            ids = batch.ids.tolist()
            if self.device.type == "cuda":
                batch = batch.pin_memory().to(self.device)
            batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
            waited = time.perf_counter() - waiting
            if self.done == 0:
                self._draw_first_batch(batch)
            losses, norm = self.step(batch)
            self.done += 1
            window.add(losses, norm, ids, waited)
            ended = self.done % self.steps_per_epoch == 0
            if ended or self.done % self.config.log_every == 0:
                self.readback.send(*window.close(self.done, epoch + 1, self.scheduler.get_last_lr()))
            shown = self._write_rows()
            self.console.advance(len(ids), waited, shown)
            if not ended:  # after the last step comes the evaluation, and then the checkpoint
                every = self.config.checkpoint_every
                if self._signal is not None or (every is not None and self.done % every == 0):
                    self._save(epoch)
                if self._signal is not None:
                    raise Stopped(self._signal, self.done)
        self._write_rows(wait=True)
        return self._loss

    def _write_rows(self, wait: bool = False) -> dict | None:
        """Log what has arrived from the device -> the newest row's numbers for the console."""
        weights = self.step.criterion.weights
        coefficients = torch.tensor((weights.label, weights.l1, weights.giou) * 2)
        row = None
        for values, (ids, about) in self.readback.receive(wait):
            demand_finite(values, ids, about["step"])
            mean = values.mean(0)
            total, norm, parts = mean[0].item(), mean[1].item(), mean[2:].view(-1, len(PARTS))
            terms = (parts * coefficients).sum(0)
            row = {
                "loss": total,
                "matching": terms[:3].sum().item(),
                "denoising": terms[3:].sum().item(),
                **dict(zip(PARTS, terms.tolist(), strict=True)),
                "grad_norm": norm,
            }
            row = {name: round(value, 6) for name, value in row.items()} | about
            self._loss = row["loss"]
            self.log.write("train", **row)
        return row

    def _evaluate(self, epoch: int, loss: float | None) -> dict:
        started = time.perf_counter()
        evaluation = self.evaluate()
        metrics = evaluation.metrics
        seconds = time.perf_counter() - started
        self.log.write("eval", self.done, epoch=epoch, seconds=round(seconds, 2), **metrics)
        self.console.evaluated(epoch, loss, metrics, seconds)
        write_results(self.folder / "detections_val.json", evaluation.results)
        if metrics["AP"] is not None and (self.best is None or metrics["AP"] > self.best):
            self.best = metrics["AP"]
            save_checkpoint(self.folder / "best.pt", self._weights(epoch) | {"metrics": {"AP": self.best}})
        return metrics

    def evaluate(self) -> Evaluation:
        """Score the averaged weights where there are any, else the model, on the validation images."""
        return evaluate(
            self._predict, self.data.validation(), self.data.ground_truth, self.data.classes, self.config.detections
        )

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        model = self.model if self.average is None else self.average.model
        batch = batch.to(self.device)
        model.eval()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits, boxes = model.predict(batch.images, batch.sizes)
        return logits.float(), boxes.float()

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
        if window["values"]:
            demand_finite(torch.stack(window["values"]), window["ids"], self.done)
        rng = {"noise": self.step.noise_generator.get_state(), "torch": torch.get_rng_state()}
        state = {
            "optimizer": self.step.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "ema_updates": 0 if self.average is None else self.average.updates,
            "rng": rng,
            "best": self.best,
            "window": window,
        }
        save_checkpoint(self.folder / "checkpoint.pt", self._weights(epoch) | state)

    def _restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None:
            self.average.model.load_state_dict(checkpoint["ema"])
            self.average.updates = checkpoint["ema_updates"]
        self.step.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.last_epoch = checkpoint["scheduler"]["last_epoch"]
        self.step.noise_generator.set_state(checkpoint["rng"]["noise"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        self.done, self.best = checkpoint["step"], checkpoint["best"]
        self._window.restore(checkpoint["window"], self.device)

    def _draw_first_batch(self, batch: Batch) -> None:
        """Ground truth and the very noise that the first step is about to draw."""
        state = self.step.noise_generator.get_state()
        noised = self.step.noised(batch)
        self.step.noise_generator.set_state(state)
        batch = batch.to("cpu")
        targets = batch.targets
        draw_first_batch(
            self.folder / "first_batch.png",
            batch.images,
            batch.sizes,
            targets.boxes,
            targets.labels,
            targets.counts,
            None if noised is None else noised.boxes.cpu(),
            None if noised is None else noised.labels.cpu(),
            [name for _, name in self.data.classes],
        )

    def _draw_predictions(self, metrics: dict) -> None:
        pictures, detections, truths = [], [], []
        for batch in self.data.validation():
            logits, boxes = self._predict(batch)
            pictures += batch_images(batch.images, batch.sizes)
            # In the canvas's own pixels, since that is what is drawn.
            found = postprocess(logits, boxes, batch.sizes.to(boxes.device), keep=50)
            detections += [tuple(field.cpu() for field in one) for one in zip(*found, strict=True)]
            truths += _truths(batch)
            if len(pictures) >= _PICTURED:
                break
        caption = "" if metrics.get("AP") is None else f"AP {metrics['AP']:.3f}   AP50 {metrics['AP50']:.3f}"
        names = [name for _, name in self.data.classes]
        shown = slice(_PICTURED)
        draw_predictions(
            self.folder / "predictions.png",
            pictures[shown],
            detections[shown],
            truths[shown],
            names,
            0.35,
            caption=caption,
        )


def _truths(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Labels and boxes in canvas pixels of each image."""
    height, width = batch.sizes.unbind(-1)
    scale = torch.stack((width, height, width, height), dim=-1)
    centre, half = batch.targets.boxes[..., :2], batch.targets.boxes[..., 2:] / 2
    corners = torch.cat((centre - half, centre + half), dim=-1) * scale[:, None]
    counts = batch.targets.counts.tolist()
    return [(labels[:n], boxes[:n]) for labels, boxes, n in zip(batch.targets.labels, corners, counts, strict=True)]
