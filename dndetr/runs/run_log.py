"""``metrics.jsonl``, the log of a run: one JSON object a line."""

import json
import math
import time
from pathlib import Path

from ..files import write_atomic, writing
from .listener import Listener, Run

NAME = "metrics.jsonl"


class RunLog(Listener):
    """Writes every row, each with ``event`` and ``step``, before anyone else sees it; and "end", when all is done."""

    def run_started(self, run: Run) -> None:
        self._run, self._started = run, time.perf_counter()
        self.path = run.folder / NAME

    def row_logged(self, row: dict) -> None:
        # Names of files need not be valid text: what cannot be encoded is written as JSON's own escape.
        with writing(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_line(row))

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        if how == "finished":
            run, seconds = self._run, round(time.perf_counter() - self._started, 1)
            step, epoch = row.get("step", run.steps), row.get("epoch", run.config.epochs)
            end = {"event": "end", "step": step, "epoch": epoch, "seconds": seconds, "AP": row.get("AP")}
            self.row_logged(end | ({"reason": reason} if reason else {}))


def plain(value):
    """``value`` in JSON's types: NaN and infinities become null, numpy values and host tensors plain numbers."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a ``metrics.jsonl``, each with ``event`` and ``step``; whatever else is in there is passed over."""
    return [entry for entry in _entries(Path(path)) if _is_row(entry)]


def _entries(path: Path) -> list:
    """What its lines hold; a half-written last line, as a killed run leaves it, is passed over."""
    if not path.exists():
        return []
    entries = []
    *lines, _half_written = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}): remove that line") from None
    return entries


def _is_row(entry) -> bool:
    """Whether a log wrote this, and not somebody who added lines of his own."""
    if not isinstance(entry, dict):
        return False
    step = entry.get("step")
    return isinstance(entry.get("event"), str) and isinstance(step, int | float) and not isinstance(step, bool)


def cut_back(folder: Path, step: int) -> list[dict]:
    """Make the log end at ``step``, from where the run is about to be continued -> the rows that are left.

    Forgotten is what came after, that the run ended, and half a line at the end. What is no row stays.
    """
    entries = [plain(entry) for entry in _entries(folder / NAME)]
    kept = [entry for entry in entries if not _is_row(entry) or (entry["step"] <= step and entry["event"] != "end")]
    write_atomic(folder / NAME, "".join(map(_line, kept)).encode(errors="backslashreplace"))
    return [entry for entry in kept if _is_row(entry)]


def _line(row) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
