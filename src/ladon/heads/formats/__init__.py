"""Other systems' checkpoints of heads: recognised by keys and shapes, read and written without loss."""
