"""DN-DETR: object detection transformers trained with query denoising (arXiv 2203.01305)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detector import Detector, load
    from .fitting import TrainedRun, fit
    from .hf import accelerate, denoise
    from .runs.listener import Listener

__version__ = "0.1.0"
__all__ = ["Detector", "Listener", "TrainedRun", "__version__", "accelerate", "denoise", "fit", "load"]

_HOMES = {
    "Detector": ".detector",
    "load": ".detector",
    "fit": ".fitting",
    "TrainedRun": ".fitting",
    "Listener": ".runs.listener",
    "accelerate": ".hf",
    "denoise": ".hf",
}


def __getattr__(name: str):
    # Only when asked for: torch takes seconds to import, and commands set its environment first.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
