"""A training step put together as a configuration says."""

from collections.abc import Callable

import torch
from torch import nn

from ..config import Config
from ..ops import CostWeights, LossWeights
from .criterion import Criterion
from .distributed import Processes
from .graphs import GraphedStep
from .loss_window import Record
from .noise_meter import NoiseMeter
from .optim import Schedule, WeightAverage, build_optimizer, schedule_factor
from .step import TrainStep


def build_step(
    config: Config,
    model: nn.Module,
    classes: int,
    steps_per_epoch: int,
    precision: torch.dtype,
    mode: str,
    processes: Processes,
    say: Callable[[str], None],
) -> TrainStep:
    """Everything around a model on its device; mode: "eager" or "graph"; say: is told what users should know."""
    device, layers = next(model.parameters()).device, config.model.decoder_layers
    of_many = layers if config.model.one_to_many else 0
    optimizer = build_optimizer(model, config.lr, config.optimizer.backbone_scale, config.optimizer.weight_decay)
    return (GraphedStep if mode == "graph" else TrainStep)(
        model,
        _criterion(config),
        optimizer,
        Schedule(optimizer, _factor(config, steps_per_epoch)),
        WeightAverage(model, config.optimizer.ema) if config.optimizer.ema else None,
        Record(config.log_every, layers, device, int(config.model.proposals != "none"), of_many),
        classes=classes,
        denoising=config.denoising,
        clip_norm=config.optimizer.clip_norm,
        precision=precision,
        noise_generator=torch.Generator().manual_seed(config.seed),
        processes=processes,
        noise_meter=NoiseMeter(device),
        say=say,
    )


def _criterion(config: Config) -> Criterion:
    """Matching and losses with the configured weights."""
    loss = config.loss
    return Criterion(
        CostWeights(loss.cost_label, loss.cost_l1, loss.cost_giou, loss.alpha, loss.position),
        LossWeights(
            loss.label, loss.l1, loss.giou, loss.alpha, loss.kind, loss.kind if loss.noised == "same" else "focal"
        ),
        loss.one_to_many,
        loss.repeats,
    )


def _factor(config: Config, steps_per_epoch: int) -> Callable[[float], float]:
    optimizer, total_steps = config.optimizer, config.epochs * steps_per_epoch
    return schedule_factor(
        optimizer.schedule,
        total_steps,
        round(optimizer.warmup * total_steps),
        tuple(epoch * steps_per_epoch for epoch in optimizer.drop_epochs(config.epochs)),
        optimizer.gamma,
        optimizer.floor,
    )
