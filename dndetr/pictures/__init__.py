"""Pictures of a run: training curves, the first batch with its noised queries, predictions beside the ground truth."""

from .boxes import class_colour, draw_boxes
from .curves import draw_curves
from .denoising import draw_denoising
from .sheets import batch_images, draw_first_batch, draw_predictions

__all__ = [
    "batch_images",
    "class_colour",
    "draw_boxes",
    "draw_curves",
    "draw_denoising",
    "draw_first_batch",
    "draw_predictions",
]
