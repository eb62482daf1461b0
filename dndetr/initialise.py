"""Starting weights from a file: our checkpoints, official DN-DETR and DAB-DETR files, torchvision's ResNets."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .checkpoint import load_checkpoint
from .models.official import from_official


class Initialised(NamedTuple):
    """What became of the names: taken from the file, left as they were (missing there), of another shape, unused."""

    kept: list[str]
    missing: list[str]
    reshaped: list[str]
    unused: list[str]

    def __str__(self) -> str:
        text = f"{len(self.kept)} tensors taken, {len(self.missing)} not in the file"
        if self.reshaped:
            text += f", {len(self.reshaped)} of another shape left out ({', '.join(self.reshaped[:3])}, ...)"
        if self.unused:
            text += f", {len(self.unused)} in the file unused ({', '.join(self.unused[:3])}, ...)"
        return text


def weights_in(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file under our names; the moving average where a checkpoint has one."""
    state = load_checkpoint(path, needs=())
    state = state.get("ema") or state.get("model") or state
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if any(name.startswith("transformer.") for name in state):
        return from_official(state)
    if "conv1.weight" in state:
        return {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    return state


def initialise(model: nn.Module, path: str | Path) -> Initialised:
    """Copy into ``model`` every tensor of the file that fits by name and shape.

    ValueError if none does, since training would then silently start from random weights.
    """
    state = weights_in(path)
    own = model.state_dict()
    kept = [name for name in own if name in state and state[name].shape == own[name].shape]
    report = Initialised(
        kept,
        missing=[name for name in own if name not in state],
        reshaped=[name for name in own if name in state and state[name].shape != own[name].shape],
        unused=[name for name in state if name not in own],
    )
    if not kept:
        found = ", ".join(list(state)[:3]) or "no tensors"
        raise ValueError(f"--init {path}: nothing in this file fits the model (it has {found}, ...)")
    model.load_state_dict({name: state[name] for name in kept}, strict=False)
    return report
