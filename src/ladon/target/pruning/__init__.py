"""ProPD's early pruning: nodes are dropped inside the model, between two of its layers."""
