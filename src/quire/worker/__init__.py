"""One device at work: rows of live requests, page tensors, the batch of a step, the model's run, the choice of tokens."""
