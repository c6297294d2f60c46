"""Training data: records of data sets, as prompts to answer or as packed batches to learn from."""
