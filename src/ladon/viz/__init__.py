"""Pictures of a decode run: the token tree of each step, what was accepted, and who may attend to whom."""
