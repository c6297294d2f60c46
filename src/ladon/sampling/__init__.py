"""From logits to tokens: sampling parameters, noise, logits processors, and which drafts are accepted."""
