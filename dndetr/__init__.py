"""DN-DETR: object detection transformers trained with query denoising (arXiv 2203.01305)."""

__version__ = "0.1.0"
