"""The parts of `tools/train_bundled.py`: books, exercises, vocabulary, training, measuring and the card."""
