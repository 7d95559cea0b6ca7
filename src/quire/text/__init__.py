"""Tokens and text: the tokenizer, incremental detokenizing with stop strings, chat templates. No torch, no engine."""

from quire.text.chat import ChatOptions, prompt_text, read_template
from quire.text.stream import Delta, Stream
from quire.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatOptions", "Delta", "Stream", "Tokenizer", "load_tokenizer", "prompt_text", "read_template"]
