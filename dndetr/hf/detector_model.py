"""A detector's folder as transformers itself loads it."""

from pathlib import Path

from torch import Tensor, nn

from ..transformers_installed import quiet_transformers, require_transformers


def detector_model(folder: Path, feature: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in evaluation mode, and those of its tensors that the folder's files have.

    feature: what needs transformers, for the ImportError where it is missing. ValueError where it cannot load them.
    """
    require_transformers(feature)
    from transformers import AutoModelForObjectDetection

    try:
        with quiet_transformers():
            model, told = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"transformers cannot load it: {reason}") from error
    state = model.float().eval().state_dict()
    lacking = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return model, {name: value for name, value in state.items() if name not in lacking}
