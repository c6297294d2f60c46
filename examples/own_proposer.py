"""A drafter of your own in 32 lines: a table of which token followed which, learned from the prompt and the answer.

`python examples/own_proposer.py` decodes a few prompts of the bundled model plainly, with this drafter, with n-grams
and with the bundled heads, and compares what they accept and that all say the same. No clock: every tree has 8 nodes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import ladon
from ladon.demo.bundled import demo_prompts


class Bigrams(ladon.Proposer):
    """Drafts what followed the last token most often, and what followed that, four tokens deep."""

    def __init__(self) -> None:
        self.tables: list[dict[int, Counter[int]]] = []  # one for each sequence, by its place

    def join(self, prompts, hidden, states=()):
        for prompt in prompts:
            self.tables.append(defaultdict(Counter))
            self.learn(self.tables[-1], prompt.tolist())

    def propose(self, hidden, root, max_nodes):
        paths = [self.paths(table, token) for table, token in zip(self.tables, root.tolist())]
        return ladon.TokenTree.from_paths(root, paths, max_nodes)

    def observe(self, accepted, hidden):
        roots, tokens, counts = accepted.root.tolist(), accepted.tokens.tolist(), accepted.count.tolist()
        for table, token, said, count in zip(self.tables, roots, tokens, counts):
            self.learn(table, [token, *said[:count]])

    def keep(self, rows):
        self.tables = [self.tables[row] for row in rows]

    def learn(self, table, text):
        for token, following in pairwise(text):
            table[token][following] += 1

    def paths(self, table, token, depth=4):
        """Paths of (token, share of the times that it followed); one time more stands for all that never did."""
        followers = table[token].most_common(2 if depth > 2 else 1) if depth else []
        total = table[token].total() + 1
        return [[(t, n / total), *path] for t, n in followers for path in self.paths(table, t, depth - 1) or [[]]]


def main(num_prompts: int = 4, max_new_tokens: int = 64) -> dict[str, float]:
    """Print the acceptance length of each way to draft, in tokens per step and sequence; the same by name."""
    model, tokenizer, heads = ladon.load_demo()
    inputs = [tokenizer(text, return_tensors="pt") for text in demo_prompts(num_prompts)]
    decoders = {
        "plain": ladon.Decoder(model, tree="off"),
        "bigrams": ladon.Decoder(model, proposer=Bigrams(), budget=8),
        "n-grams": ladon.Decoder(model, budget=8),
        "heads": ladon.Decoder(model, heads, budget=8, ngrams="off"),
    }
    answers, lengths = {}, {}
    for name, decoder in decoders.items():
        answers[name], steps, tokens = [], 0, 0
        for prompt in inputs:
            answers[name].append(decoder.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False).tolist())
            steps, tokens = steps + decoder.stats.row_steps, tokens + decoder.stats.tokens
        lengths[name] = tokens / steps
        same = "the same output" if answers[name] == answers["plain"] else "ANOTHER OUTPUT"
        print(f"{name:8} {lengths[name]:5.2f} tokens per step, {same}")
    return lengths


if __name__ == "__main__":
    main()
