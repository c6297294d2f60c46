"""Training data written by the target itself, and the training of heads on it."""
