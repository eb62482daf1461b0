"""A run that has to end within some hours: how many steps it will have, planned anew from what its parts have taken."""

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from statistics import fmean

_RECENT = 50  # steps whose mean is what those to come will take
_FIRST = 3  # steps of a process, which compile, test and allocate: they say little about others
_BLIND = 0.25  # share of the time after which they must do


def stopwatch() -> Callable[[], float]:
    """A clock that starts now, in seconds."""
    started = time.monotonic()
    return lambda: time.monotonic() - started


class TimeLimit:
    """The plan of a run within ``seconds``: it will have ``end`` steps as far as is known now, ``most`` at most.

    epoch: steps of one; evaluate_every, in epochs, and save_every, in steps (None: only after epochs): what else takes
    time; evaluation: what one takes until one was measured, in steps; elapsed: seconds since this process began.
    """

    def __init__(
        self,
        seconds: float,
        most: int,
        epoch: int,
        evaluate_every: int,
        save_every: int | None,
        evaluation: float,
        elapsed: Callable[[], float],
    ):
        self.seconds, self.most, self.end = seconds, most, most
        self._epoch, self._evaluate_every, self._save_every = epoch, evaluate_every, save_every
        self._evaluation, self._elapsed = evaluation, elapsed
        self._before = 0.0  # spent by the processes that this one goes on from
        self._lapped = elapsed()
        self._first: list[float] = []
        self._taken = {"step": deque(maxlen=_RECENT), "evaluation": deque(maxlen=3), "saving": deque(maxlen=3)}

    def lap(self, part: str | None = None) -> None:
        """The time since the last lap was that of a "step", an "evaluation" or "saving"; None: of nothing regular."""
        now = self._elapsed()
        seconds, self._lapped = now - self._lapped, now
        if part == "step" and len(self._first) < _FIRST:
            self._first.append(seconds)
        elif part is not None:
            self._taken[part].append(seconds)

    def plan(self, done: int) -> None:
        """After so many steps, nothing left to evaluate or save before the next: how many steps there will be.

        The step that was planned to be the last one is: a plan that grew then would begin the end anew.
        """
        known = self._taken["step"] or self._spent() > _BLIND * self.seconds
        if done < self.end and known:
            left = self.seconds - self._spent() - self._ending()
            steps = range(self.most - done + 1)
            self.end = done + max(1, bisect_right(steps, left, key=lambda count: self._cost(done, count)) - 1)

    def pace(self, place: float, done: int) -> float:
        """How far the schedule, at ``place`` of ``most``, moves with the next step, to be at its end with the last."""
        return (self.most - place) / (self.end - done)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        taken = {part: list(seconds) for part, seconds in self._taken.items()}
        return {"spent": self._spent(), "end": self.end, "taken": taken}

    def restore(self, state: dict) -> None:
        """The inverse of ``state``."""
        self._before, self.end = state["spent"], state["end"]
        for part, seconds in state["taken"].items():
            self._taken[part].extend(seconds)

    def _spent(self) -> float:
        return self._before + self._elapsed()

    def _cost(self, done: int, steps: int) -> float:
        """Seconds of so many steps, and of what is evaluated and saved between the first and the last of them."""

        def times(every: int | None) -> int:
            return 0 if every is None or not steps else (done + steps - 1) // every - done // every

        evaluations, saves = times(self._epoch * self._evaluate_every), times(self._epoch) + times(self._save_every)
        return steps * self._step() + evaluations * self._longest("evaluation") + saves * self._longest("saving")

    def _ending(self) -> float:
        """Seconds to keep for the last evaluation, saving and pictures, and for whatever is slower than it was."""
        margin = min(0.1 * self.seconds, 10 + 0.01 * self.seconds)
        return self._longest("evaluation") + self._longest("saving") + margin

    def _step(self) -> float:
        return fmean(self._taken["step"] or self._first or [0.0])

    def _longest(self, part: str) -> float:
        """Seconds that the part took at most, of late."""
        return max(self._taken[part], default=self._evaluation * self._step() if part == "evaluation" else 0.0)
