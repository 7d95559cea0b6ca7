"""Weights of fewer bits: how a matrix is rounded while loading, stored and multiplied."""
