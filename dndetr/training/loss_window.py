"""The losses between two rows of the log: kept on the device, and refused where they are not finite."""

import time

import torch
from torch import Tensor

from ..ops import PARTS
from .criterion import Losses


class Diverged(RuntimeError):
    """The loss, or its gradient, is no longer a number."""


class Record:
    """What each of the last steps found, on the device; the step itself writes it, so that a captured one can too.

    steps: how many are kept; layers Y: of the decoder, before them ``proposals`` (0 or 1) of an encoder, and behind
    them ``one_to_many`` of such queries. A row is total loss, gradient norm, the terms of each layer, and the first
    image of each layer whose matching costs were not finite (-1: none): [2 + Y * 6 + Y].
    """

    def __init__(
        self,
        steps: int,
        decoder_layers: int,
        device: torch.device | str,
        proposals: int = 0,
        one_to_many: int = 0,
    ):
        self.proposals, self.one_to_many = proposals, one_to_many
        layers = proposals + decoder_layers + one_to_many
        self._rows = torch.zeros(steps, 2 + layers * (len(PARTS) + 1), device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, losses: Losses, norm: Tensor, finite: Tensor) -> None:
        """Add a step; the oldest goes when the record is full.

        finite [Y, images] bool: whose matching costs were finite, of all images of the step.
        """
        # Where all are finite argmin finds the first image, 0, and 1 less is -1.
        bad = finite.view(torch.uint8).argmin(1) - finite.all(1).view(torch.uint8)
        row = torch.cat((losses.total.reshape(1), norm.reshape(1), losses.parts.flatten(), bad))
        self._rows.index_copy_(0, self._place, row.to(self._rows.dtype)[None])
        self._place.add_(1).remainder_(len(self._rows))

    def tensors(self) -> list[Tensor]:
        """All that ``write`` changes."""
        return [self._rows, self._place]

    def first(self, steps: int) -> Tensor:
        """A copy of the rows of the first steps since the last restart: [steps, 2 + Y * 6 + Y]."""
        return self._rows[:steps].clone()

    def restart(self, rows: Tensor | None = None) -> None:
        """Begin again, or behind these rows."""
        self._place.zero_()
        if rows is not None:
            self._rows[: len(rows)] = rows.to(self._rows.device)
            self._place.add_(len(rows))


class LossWindow:
    """The steps since the last row of the log: their losses in a record on the device, their images here."""

    def __init__(self, record: Record):
        self.record = record
        self._ids: list[list[int]] = []
        self._before = 0.0
        self.restart_clock()

    def add(self, ids: list[int], waited: float) -> None:
        """One more step is in the record; ids of its images, seconds spent waiting for them."""
        self._ids.append(ids)
        self._waited += waited

    def close(self, step: int, epoch: int, rates: list[float]) -> tuple[Tensor, tuple[list[list[int]], dict]]:
        """All steps' values on the device, their images, and what the host knows of them; starts a new window."""
        seconds = self._seconds()
        about = {
            "step": step,
            "epoch": epoch,
            "lr": rates[0],
            "images_per_second": round(sum(map(len, self._ids)) / seconds, 2),
            "data_wait": round(self._waited / seconds, 4),
            "seconds": round(seconds, 4),
        }
        if len(set(rates)) > 1:
            about["lr_backbone"] = rates[1]
        values, ids = self.record.first(len(self._ids)), self._ids
        self._ids, self._before = [], 0.0
        self.record.restart()
        self.restart_clock()
        return values, (ids, about)

    def restart_clock(self) -> None:
        """Evaluation and drawing are not training time."""
        self._waited, self._started = 0.0, time.perf_counter()

    def _seconds(self) -> float:
        """Training time of the window's steps, those before a resumption included."""
        return self._before + time.perf_counter() - self._started

    def state(self) -> dict:
        """What a run resumed from here needs to log the same numbers."""
        seconds = self._seconds() if self._ids else 0.0  # what follows an empty window is an evaluation
        return {"values": self.record.first(len(self._ids)).cpu(), "ids": list(self._ids), "seconds": seconds}

    def restore(self, state: dict) -> None:
        """The inverse of ``state``."""
        self._ids = list(state["ids"])
        self.record.restart(state["values"])
        self._before = state["seconds"]


def taken_apart(row: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A record's row, or a mean of rows -> total loss, gradient norm, terms [Y, 6], first bad image of each layer."""
    layers = (len(row) - 2) // (len(PARTS) + 1)
    terms = row[2 : 2 + layers * len(PARTS)].view(layers, len(PARTS))
    return row[0], row[1], terms, row[2 + layers * len(PARTS) :].int().tolist()


def _layer_names(layers: int, proposals: int, one_to_many: int) -> list[str]:
    decoder = layers - proposals - one_to_many
    own = ["the proposals"] * proposals + [f"layer {number}" for number in range(1, decoder + 1)]
    return own + [f"{name} of the one-to-many queries" for name in own[len(own) - one_to_many :]]


def demand_finite(
    values: Tensor, ids: list[list[int]], last_step: int, proposals: int = 0, one_to_many: int = 0
) -> str | None:
    """Diverged, with step, terms, layers and images, if a loss or gradient norm in ``values`` is not finite.

    values: rows of a record; ids: of the images of each; proposals, one_to_many: as of the record. -> a sentence where
    the losses are finite but costs of the matching were not, else None.
    """
    first = last_step - len(values) + 1
    found = None
    for number, (row, images) in enumerate(zip(values, ids, strict=True)):
        total, norm, parts, bad = taken_apart(row)
        names = _layer_names(len(parts), proposals, one_to_many)
        unmatched = ", ".join(
            f"{name} in image id {images[image]}" for name, image in zip(names, bad, strict=True) if image >= 0
        )
        if total.isfinite() and norm.isfinite():
            if unmatched and found is None:
                found = f"predictions are not finite at step {first + number}: {unmatched}"
            continue
        terms = [f"{PARTS[term]} of {names[layer]}" for layer, term in (~parts.isfinite()).nonzero().tolist()]
        where = f"; predictions of {unmatched}" if unmatched else ""
        raise Diverged(
            f"the loss is not finite at step {first + number}: {', '.join(terms[:6]) or 'the gradient'} "
            f"(image ids {', '.join(map(str, images[:16]))}{where}); the last checkpoint is intact; "
            "try a lower --lr, a longer --optimizer.warmup or --precision float32"
        )
    return found
