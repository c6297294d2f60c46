"""Measuring heads on a model: hit rates, temperatures, the best fixed trees, step times."""
