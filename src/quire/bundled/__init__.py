"""Data: the bundled model, its draft model and its adapters. No code."""
