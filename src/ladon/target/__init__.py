"""The transformers model that is sped up: prefill, verification of trees, KV cache, masks and the self-test."""
