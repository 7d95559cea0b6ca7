"""The tiny twin of a model: how it is made, driven over pages, and watched."""
