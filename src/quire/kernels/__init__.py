"""Functions on tensors: linear, attention over pages, norms, sampling. They know nothing of requests or models."""
