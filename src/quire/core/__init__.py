"""Decisions of the engine, with integers only: who runs, with which pages, for how long. Standard library only."""
