"""The command line, `ladon`."""

from ladon.cli.main import app, main

__all__ = ["app", "main"]
