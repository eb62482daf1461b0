"""A detector's folder as transformers itself loads it."""

from pathlib import Path

from torch import Tensor, nn

from ..transformers_installed import require_transformers


def detector_model(folder: Path, feature: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in evaluation mode, and those of its tensors that the folder's files have.

    feature: what needs transformers, for the ImportError where it is missing. ValueError where it cannot load them.
    """
    require_transformers(feature)
    import transformers

    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing is told by whoever asks
    logging.disable_progress_bar()
    try:
        model, told = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"transformers cannot load it: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    state = model.float().eval().state_dict()
    lacking = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return model, {name: value for name, value in state.items() if name not in lacking}
