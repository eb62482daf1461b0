"""DN-DETR: object detection transformers trained with query denoising (arXiv 2203.01305)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detector import Detector, load

__version__ = "0.1.0"
__all__ = ["Detector", "__version__", "load"]


def __getattr__(name: str):
    # Only when asked for: torch takes seconds to import, and commands set its environment first.
    if name not in ("Detector", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import detector

    return getattr(detector, name)
