"""Measurement: the same prompts in every mode, in turns, with every output compared with plain decoding."""
