"""Early warnings: what the rows of a run's log say when training gets nowhere, once each, with what to look at."""

from collections import deque
from typing import Any

from ..config import Config
from .listener import Listener, Run

_RECENT = 5  # rows whose mean is the loss of now
_FALLEN = 0.9  # share of the first row's loss; a run that learns is below it after a hundred steps
_NOTHING, _SOMETHING = 0.005, 0.05  # AP


class EarlyWarnings(Listener):
    """Warns, while there is time, of a run that gets nowhere."""

    def run_started(self, run: Run) -> None:
        self._warn, self._planned, self._standstill = run.warn, run.planned, Standstill(run.config, run.planned())
        for row in run.rows:
            self._standstill.see(row)  # what there was to say about these was said

    def row_logged(self, row: dict) -> None:
        self._standstill.steps = self._planned()
        if (warning := self._standstill.see(row)) is not None:
            self._warn(warning)


class Standstill:
    """Reads rows of ``metrics.jsonl`` as they are written, and says when the loss or the AP stands still.

    steps: of the whole run, as far as known. Nothing is said of runs too short to tell, nor of the end of a run, when
    it is too late.
    """

    def __init__(self, config: Config, steps: int):
        self.config, self.steps = config, steps
        self._first: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._best: float | None = None
        self._best_row: dict = {}
        self._since = 0  # evaluations after the best one
        self._said: set[str] = set()

    def see(self, row: dict[str, Any]) -> str | None:
        """A new row -> a warning, if it gives reason for one that was not given yet."""
        if row["event"] == "train" and row.get("loss") is not None:
            return self._train(row)
        if row["event"] == "eval" and row.get("AP") is not None:
            return self._evaluation(row)
        return None

    def _train(self, row: dict) -> str | None:
        if self._first is None:
            self._first = row["loss"]
        self._recent.append(row["loss"])
        # Weights from a file may start with a loss that has little left to lose; their AP tells.
        unknown = self._best is None and self.config.init is not None
        detects = self._best is not None and self._best >= _SOMETHING
        warmup = round(self.config.optimizer.warmup * self.steps)
        early = row["step"] < warmup + min(max(self.steps // 10, 100), 2000)
        if early or self._fallen or unknown or detects or "zero" in self._said:
            return None
        return self._once(
            "loss",
            f"the loss stands still: {self._first:.3g} at the start, {self._now:.3g} after {row['step']} steps; "
            f"{self._look}, or another --lr (now {row['lr']:.1e})",
        )

    def _evaluation(self, row: dict) -> str | None:
        if self._best is None or row["AP"] > self._best:
            self._best, self._best_row, self._since = row["AP"], row, 0
        else:
            self._since += 1
        if row["step"] >= max(self.steps // 5, 200) and self._best < _NOTHING:
            falls = self._first is not None and self._fallen
            why = "though the loss falls, so the val split may differ in its class ids or boxes; " if falls else ""
            return self._once("zero", f"AP is {self._best:.3f} after {row['step']} steps, {why}{self._look}")
        waited = row["step"] - self._best_row["step"]
        if self._since >= 5 and waited >= 0.3 * self.steps and row["step"] <= 0.8 * self.steps:
            return self._once(
                "flat",
                f"AP has not risen since epoch {self._best_row['epoch']} ({self._best:.3f} then, {row['AP']:.3f} now): "
                "more epochs at this learning rate will hardly help; look at curves.png after the run, and try a lower "
                "--lr, or fewer --epochs so that it falls sooner",
            )
        return None

    @property
    def _now(self) -> float:
        return sum(self._recent) / len(self._recent)

    @property
    def _fallen(self) -> bool:
        return self._now < _FALLEN * self._first

    @property
    def _look(self) -> str:
        hints = ["look at first_batch.png (are the boxes on their objects?)"]
        if self.config.data != "shapes":
            hints.append(f"the class table above and python -m dndetr.check_data {self.config.data}")
        hints.append("see whether --overfit 8 passes")
        if self.config.init is None:
            hints.append("start from weights (--init FILE)")
        return ", ".join(hints)

    def _once(self, kind: str, message: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return message
