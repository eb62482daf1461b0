"""What a training step asks of a GPU, counted without one: kernels, operations, bytes, and predicted time."""
