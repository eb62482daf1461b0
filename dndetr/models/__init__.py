"""The parts of the detector, how they are put together, and the weights that they may start from."""
