"""Grammars: which tokens may come next, so that an output has the form that was asked for.

A Grammars compiles a StructuredOutputsParams within limits and remembers it; a Constraint follows one output.
"""

from quire.grammar.compiler import Grammars, Vocabulary
from quire.grammar.constraint import Constraint, MaskFiller, MaskWish

__all__ = ["Constraint", "Grammars", "MaskFiller", "MaskWish", "Vocabulary"]
