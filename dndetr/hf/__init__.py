"""Query denoising and our ops for the DETRs of Hugging Face transformers, put into a model and taken out again.

transformers is an optional dependency (the extra ``hf``); nothing here imports it before it is needed.
"""

from typing import TYPE_CHECKING

from .accelerate import Acceleration, accelerate
from .denoise import Denoising, denoise

if TYPE_CHECKING:
    from .trainer import KeepDenoising

__all__ = ["Acceleration", "Denoising", "KeepDenoising", "accelerate", "denoise"]


def __getattr__(name: str):
    if name != "KeepDenoising":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..transformers_installed import require_transformers

    require_transformers(f"dndetr.hf.{name}")
    from .trainer import KeepDenoising

    return KeepDenoising
