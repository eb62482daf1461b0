"""The losses between two rows of the log: kept on the device, and refused where they are not finite."""

import time

import torch
from torch import Tensor

from .criterion import Losses
from .ops import PARTS


class Diverged(RuntimeError):
    """The loss, or its gradient, is no longer a number."""


class LossWindow:
    """Losses of the steps since the last log row, kept on the device."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self.values: list[Tensor] = []
        self.ids: list[list[int]] = []
        self.before = 0.0
        self.restart_clock()

    def add(self, losses: Losses, norm: Tensor, ids: list[int], waited: float) -> None:
        """One more step: total, gradient norm and parts, one vector on the device; ids of its images."""
        self.values.append(torch.cat((losses.total.reshape(1), norm.reshape(1), losses.parts.flatten())))
        self.ids.append(ids)
        self.waited += waited

    def close(self, step: int, epoch: int, rates: list[float]) -> tuple[Tensor, tuple[list[list[int]], dict]]:
        """All steps' values on the device, their images, and what the host knows of them; starts a new window."""
        seconds = self._seconds()
        about = {
            "step": step,
            "epoch": epoch,
            "lr": rates[0],
            "images_per_second": round(sum(map(len, self.ids)) / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
            "seconds": round(seconds, 4),
        }
        if len(set(rates)) > 1:
            about["lr_backbone"] = rates[1]
        values, ids = torch.stack(self.values), self.ids
        self._begin()
        return values, (ids, about)

    def restart_clock(self) -> None:
        """Evaluation and drawing are not training time."""
        self.waited, self.started = 0.0, time.perf_counter()

    def _seconds(self) -> float:
        """Training time of the window's steps, those before a resumption included."""
        return self.before + time.perf_counter() - self.started

    def state(self) -> dict:
        """What a run resumed from here needs to log the same numbers."""
        seconds = self._seconds() if self.ids else 0.0  # what follows an empty window is an evaluation
        return {"values": [value.cpu() for value in self.values], "ids": self.ids, "seconds": seconds}

    def restore(self, state: dict, device: torch.device) -> None:
        """The inverse of ``state``."""
        self.values, self.ids = [value.to(device) for value in state["values"]], list(state["ids"])
        self.before = state["seconds"]


def demand_finite(values: Tensor, ids: list[list[int]], last_step: int) -> None:
    """Diverged, with step, terms, layers and images, if a loss or gradient norm [steps, 2 + Y * 6] is not finite."""
    bad = ~values[:, :2].isfinite().all(1)
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    parts = values[row, 2:].view(-1, len(PARTS))
    terms = [f"{PARTS[term]} of layer {layer + 1}" for layer, term in (~parts.isfinite()).nonzero().tolist()]
    raise Diverged(
        f"the loss is not finite at step {last_step - len(values) + 1 + row}: {', '.join(terms[:6]) or 'the gradient'} "
        f"(image ids {', '.join(map(str, ids[row][:16]))}); the last checkpoint is intact; "
        "try a lower --lr, a longer --optimizer.warmup or --precision float32"
    )
