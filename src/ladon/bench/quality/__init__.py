"""Quality of what is decoded: whether it is the same text, whether it repeats itself, where tokens are lost."""
