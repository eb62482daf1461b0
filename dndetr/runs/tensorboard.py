"""TensorBoard's view of a run: the numbers of ``metrics.jsonl``, written again as scalars."""

import shutil
from typing import Any

from .listener import Listener, Run


class TensorBoard(Listener):
    """Scalars in the run's folder ``tensorboard``, one for each number of a train or eval row, by step.

    Those of a run that goes on are written anew, so that it shows neither gaps nor what a killed one did after its last
    checkpoint. ModuleNotFoundError that says what to install, where TensorBoard is missing.
    """

    def __init__(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError('--tensorboard needs TensorBoard: pip install -e ".[tensorboard]"') from error
        self._open = SummaryWriter

    def run_started(self, run: Run) -> None:
        path = run.folder / "tensorboard"
        if path.exists():
            shutil.rmtree(path)
        self._writer = self._open(str(path))
        for row in run.rows:
            self.row_logged(row)

    def row_logged(self, row: dict[str, Any]) -> None:
        if row["event"] not in ("train", "eval"):
            return
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        numbers |= {f"AP of {name}": value for name, value in row.get("classes", {}).items() if value is not None}
        for name, value in numbers.items():
            self._writer.add_scalar(f"{row['event']}/{name}", value, row["step"])
        self._writer.flush()

    def run_ended(self, how: str, reason: str, row: dict) -> None:
        self._writer.close()
