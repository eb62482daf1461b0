"""Rows of the log from the losses of the steps, which nobody waits for: they arrive from the device when they do."""

from collections.abc import Iterator
from typing import Any

import torch

from ..ops import PARTS
from .criterion import Criterion
from .delayed_copy import DelayedCopy
from .distributed import Processes
from .loss_window import LossWindow, Record, demand_finite, taken_apart


class LossRows:
    """Means over all processes of the losses between two rows, weighted as the loss is."""

    def __init__(self, record: Record, criterion: Criterion, processes: Processes):
        self.window = LossWindow(record)
        self._criterion, self._processes, self._copies = criterion, processes, DelayedCopy()

    def close(self, step: int, epoch: int, rates: list[float], note: Any) -> list[Any]:
        """Send the steps since the last row on their way to the host -> the notes that all processes passed with it."""
        values, (ids, about) = self.window.close(step, epoch, rates)
        about["images_per_second"] = round(about["images_per_second"] * self._processes.world, 2)
        notes, all_ids = zip(*self._processes.gather((note, ids)), strict=True)
        self._copies.send(self._processes.stack(values), (all_ids, about))
        return list(notes)

    def arrived(self, wait: bool = False) -> Iterator[dict]:
        """Rows of what has arrived since the last call, warnings before the row that they belong to.

        wait: for all that was sent. Raises Diverged where a loss is not finite.
        """
        record, weights = self.window.record, self._criterion.weights
        weighting = torch.tensor((weights.label, weights.l1, weights.giou) * 2)
        for values, (ids, about) in self._copies.receive(wait):
            for process_values, process_ids in zip(values, ids, strict=True):
                warning = demand_finite(
                    process_values, process_ids, about["step"], record.proposals, record.one_to_many
                )
                if warning is not None:
                    yield {"event": "warning", "step": about["step"], "message": warning}
            total, norm, parts, _ = taken_apart(values.mean((0, 1)))
            own, many = (parts * weighting).split((len(parts) - record.one_to_many, record.one_to_many))
            terms = own.sum(0)
            denoising = terms[3:].sum().item()
            numbers = {
                "loss": total.item(),
                "matching": terms[:3].sum().item(),
                "denoising": denoising,
                **({"one_to_many": self._criterion.one_to_many * many.sum().item()} if record.one_to_many else {}),
                "dn_share": denoising / total.item() if total else 0.0,
                **dict(zip(PARTS, terms.tolist(), strict=True)),
                "grad_norm": norm.item(),
            }
            numbers = {name: round(value, 6) for name, value in numbers.items()}
            yield {"event": "train", "step": about["step"], **numbers, **about}

    def state(self, step: int) -> dict:
        """What a run resumed from here needs to log the same numbers.

        Raises Diverged if a loss since the last row is not finite: such weights are not worth keeping.
        """
        state = self.window.state()
        record = self.window.record
        demand_finite(state["values"], state["ids"], step, record.proposals, record.one_to_many)
        return state
