"""Who drafts the token trees: heads, n-grams, MTP modules, or a proposer of your own."""
