"""Weights to start from, whoever published them: their names brought to ours."""
