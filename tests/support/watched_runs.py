"""Runs as listeners are told of them, without any training."""

from dataclasses import replace
from pathlib import Path

import torch

from dndetr.presets import PRESETS
from dndetr.runs.listener import Run


def a_run(
    folder: Path, epochs: int = 2, steps_per_epoch: int = 3, step: int = 0, rows: list[dict] | None = None, **about
) -> Run:
    """A run of the quick start's preset with so many steps; about: other fields of ``Run``."""
    unused = {name: None for name in ("validation", "truth", "infer", "weights", "warn", "stop")}
    return Run(
        folder=folder,
        config=replace(PRESETS["tiny"](), epochs=epochs),
        classes=[(1, "circle"), (2, "square")],
        device=torch.device("cpu"),
        steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        step=step,
        rows=rows or [],
        **unused | {"planned": lambda: epochs * steps_per_epoch} | about,
    )
