"""The decode loop, its scheduler, the sequences in flight, and what is counted about them."""
