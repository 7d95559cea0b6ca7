"""What guesses for a model: a small model, heads, further layers; and what a model shows them."""
