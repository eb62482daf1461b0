"""What denoising does in a detector: stability of the matching, restored boxes, leaks, runs with and without it."""
