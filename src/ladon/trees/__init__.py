"""The token tree: tensors alone, no model. Lattices, builders, fixed trees, merging, the way to the host."""
