"""Weights from file to place: checkpoints as tables of names, the loop that fills targets, packed weights on disk."""
