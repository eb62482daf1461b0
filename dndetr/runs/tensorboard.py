"""TensorBoard's view of a run: the numbers of ``metrics.jsonl``, written again as scalars."""

import shutil
from pathlib import Path
from typing import Any


def demand_tensorboard() -> None:
    """ModuleNotFoundError that says what to install, where TensorBoard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError('--tensorboard needs TensorBoard: pip install -e ".[tensorboard]"') from error


class Board:
    """Scalars in ``folder/tensorboard``, one for each number of a train or eval row, by step.

    rows: what the log already has. They are written anew, so that a resumed run shows neither gaps nor what a killed
    one did after its last checkpoint.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        if path.exists():
            shutil.rmtree(path)
        self._writer = SummaryWriter(str(path))
        for row in rows:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """One row of the log; rows that are neither train nor eval have no numbers to show."""
        if row["event"] not in ("train", "eval"):
            return
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        numbers |= {f"AP of {name}": value for name, value in row.get("classes", {}).items() if value is not None}
        for name, value in numbers.items():
            self._writer.add_scalar(f"{row['event']}/{name}", value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
