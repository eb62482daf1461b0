"""One optimisation step, from a batch on the device to updated weights, without asking the device for a number."""

import torch
from torch import Tensor, nn

from .batch import Batch
from .criterion import Criterion, Losses
from .denoising import NoisedQueries, draw_noise, noised_queries
from .optim import WeightAverage


class TrainStep:
    """noise -> forward -> matching and losses -> backward -> clip -> AdamW -> schedule -> moving average.

    groups, label_noise, box_noise, batch_active: the denoising part, off with 0 groups; precision: dtype of autocast
    (float32: none); noise_generator: a generator on the batches' device.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        average: WeightAverage | None,
        classes: int,
        groups: int,
        label_noise: float,
        box_noise: float,
        batch_active: bool,
        clip_norm: float,
        precision: torch.dtype,
        noise_generator: torch.Generator,
    ):
        self.model, self.criterion = model, criterion
        self.optimizer, self.scheduler, self.average = optimizer, scheduler, average
        self.classes, self.groups = classes, groups
        self.label_noise, self.box_noise, self.batch_active = label_noise, box_noise, batch_active
        self.clip_norm, self.precision = clip_norm, precision
        self.noise_generator = noise_generator
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def noised(self, batch: Batch) -> NoisedQueries | None:
        """Fresh denoising queries for a batch; None where denoising is off."""
        if self.groups == 0:
            return None
        noise = draw_noise(batch.targets, self.groups, self.classes, self.noise_generator)
        return noised_queries(batch.targets, noise, self.label_noise, self.box_noise, self.batch_active)

    def __call__(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Train on one batch -> its losses (detached) and the gradient's norm before clipping, all on the device."""
        noised = self.noised(batch)
        device = batch.images.device.type
        with torch.autocast(device, self.precision, enabled=self.precision != torch.float32):
            predictions = self.model(batch.images, batch.sizes, noised)
        losses = self.criterion(predictions, batch.targets)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.model)
        return Losses(losses.total.detach(), losses.parts.detach(), losses.matches), norm
