"""How good the weights in a checkpoint were when they were evaluated."""

from pathlib import Path

from .checkpoint import load_checkpoint
from .run_log import NAME, read_rows


def scores_of(path: str | Path) -> dict:
    """The evaluation of a checkpoint's weights, as its run has logged it, with the epoch; {} where none is known."""
    checkpoint = load_checkpoint(path, needs=())
    log = (Path(path) if Path(path).is_dir() else Path(path).parent) / NAME
    rows = read_rows(log) if log.exists() and "step" in checkpoint else []
    own = [row for row in rows if row["event"] == "eval" and row["step"] == checkpoint["step"]]
    return own[-1] if own else checkpoint.get("metrics", {})
