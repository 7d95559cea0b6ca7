"""The parts models are made of: each knows its tensors and this device's ops, none knows requests or a whole model."""
