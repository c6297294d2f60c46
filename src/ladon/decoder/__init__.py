"""The front door: `Decoder`, `attach`, options, and the way from a call of `generate` to its output."""
