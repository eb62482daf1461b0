"""Checkpoints: weights with the state of their training, or weights of others."""

import copy
from pathlib import Path
from typing import BinaryIO

import torch

from ..files import Unwritten, write_atomic
from ..hub import is_of_transformers
from .listener import Listener, Run
from .safetensors_file import safetensors_bytes
from .weight_files import read_weights

BEST = ("best.pt", "best.safetensors")  # the same weights


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically; it may hold tensors, numbers, strings and containers of them, nothing else.

    A file called ``.safetensors`` gets the weights that are evaluated, and whose they are, but no state of training.
    """
    path = Path(path)

    def write(file: BinaryIO) -> None:
        if path.suffix == ".safetensors":
            file.write(safetensors_bytes(checkpoint))
            return
        guard = _ErrorKeeper(file)
        try:
            torch.save(checkpoint, guard)
        except RuntimeError as error:
            # torch's zip writer reports a failed write as an assertion about positions; the cause is what helps.
            raise guard.error or error from None

    try:
        write_atomic(path, write)
    except Unwritten as error:
        unchanged = "; the file that was there before is unchanged" if path.exists() else ""
        raise Unwritten(f"{error}{unchanged}") from error


def copied(checkpoint: dict) -> dict:
    """A checkpoint on the CPU that later steps of the training leave as it is."""
    made = dict(checkpoint)
    for part in ("model", "ema"):
        if made[part] is not None:
            made[part] = copy.copy(made[part])  # with what torch keeps beside the tensors
            for name, value in made[part].items():
                made[part][name] = value.to("cpu", copy=True)
    return made


class BestCheckpoint(Listener):
    """Keeps ``best.pt`` and ``best.safetensors``, the weights that were evaluated best."""

    def run_started(self, run: Run) -> None:
        self._run = run

    def evaluated(self, row: dict, results: list[dict], best: bool) -> None:
        if best:
            checkpoint = self._run.weights() | {"metrics": {"AP": row["AP"]}}
            for name in BEST:
                save_checkpoint(self._run.folder / name, checkpoint)


def load_checkpoint(path: str | Path, needs: tuple[str, ...] = ("model",)) -> dict:
    """Read a checkpoint on the CPU, without running any code that the file may hold.

    path: a file, a run folder, whose ``checkpoint.pt`` is meant, or a model of transformers, as
    ``read_of_transformers`` takes it; needs: keys without which the file is refused -> the dict that was saved.
    FileNotFoundError or ValueError, in one line, for what cannot be a checkpoint.
    """
    if is_of_transformers(path):
        # Imported here, since few need it and flags are to be read at once.
        from .detector_folder import read_of_transformers

        return _demand_keys(read_of_transformers(path), path, needs)
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        beside = sorted(file.name for file in there if file.suffix in (".pt", ".safetensors"))
        hint = f"that folder has {', '.join(beside)}" if beside else "check the path"
        raise FileNotFoundError(f"no checkpoint at {path}: {hint}")
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors by name: save the weights alone, "
            "torch.save(model.state_dict(), FILE)"
        )
    return _demand_keys(checkpoint, path, needs)


def _demand_keys(checkpoint: dict, path: str | Path, needs: tuple[str, ...]) -> dict:
    missing = [key for key in needs if key not in checkpoint]
    if missing:
        found = ", ".join(str(key) for key in list(checkpoint)[:6]) or "nothing"
        raise ValueError(
            f"{path} is not a dndetr checkpoint: it has no {', '.join(repr(key) for key in missing)} (it starts with "
            f"{found}); weights from elsewhere are given with --init FILE"
        )
    return checkpoint


def demand_continuable(
    checkpoint: dict, processes: int, batch_size: int, steps_per_epoch: int, data: str, images: int
) -> None:
    """ValueError for a checkpoint that so many processes, or a run on this data, cannot go on from.

    batch_size: of each process now; images: in the training split of the data.
    """
    streams = checkpoint["rng"].get("noise")  # of each process, in version 0.1.0
    if streams is not None and len(streams) != processes:
        raise ValueError(
            f"the run was made by {len(streams)} processes of version 0.1.0 and can only be continued by as many (now "
            f"{processes}): start it the same way, with torchrun --nproc-per-node"
        )
    done = checkpoint["step"] - checkpoint["epoch"] * steps_per_epoch
    if done and batch_size != checkpoint["config"]["batch_size"]:
        raise ValueError(
            f"the run was saved in the middle of epoch {checkpoint['epoch'] + 1}, and {processes} processes would take "
            f"batches of {batch_size} images instead of {checkpoint['config']['batch_size']}, which can be changed at "
            f"an epoch's end only: go on with {checkpoint['processes']} processes, or another number that keeps them"
        )
    # Other data under the same classes would quietly change schedule, log and results.
    if not 0 <= done <= steps_per_epoch:
        raise ValueError(
            f"{data}: its {images:,} training images make {steps_per_epoch:,} steps an epoch, and the run was saved "
            f"after {checkpoint['step']:,} steps in {checkpoint['epoch']:,} whole epochs: give the run's own data, or "
            "start anew on these with --init"
        )


class _ErrorKeeper:
    """A file whose failed write is remembered, for writers that replace the error by one of their own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()
