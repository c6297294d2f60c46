"""The bundled model: a small Llama trained on Python's own sources, with its heads and prompts."""
