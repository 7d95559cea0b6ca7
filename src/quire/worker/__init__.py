"""One device at work: rows of live requests, page tensors, the batch of a step, the model's run and the choice of tokens."""
