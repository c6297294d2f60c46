"""Errors a user can meet. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations


class LadonError(Exception):
    """Base of every error Ladon raises on purpose; the command line shows it as one line and exits with 2."""


class InputError(LadonError, ValueError):
    """A prompt, option or limit that cannot be used."""


class TreeError(LadonError, ValueError):
    """A token tree or a tree description that is not a tree, or does not fit the heads."""


class HeadsError(LadonError, ValueError):
    """Heads that cannot be read, or that belong to another model."""


class LogitsError(LadonError, ArithmeticError):
    """Logits after which nothing can be said, such as NaN."""


class UnsupportedModelError(LadonError, ValueError):
    """A model whose forward cannot verify a token tree exactly; the message names the reason."""


class SelfTestError(LadonError, RuntimeError):
    """The test of a model has failed by itself, which says nothing about the model."""


class ConstraintError(LadonError, ValueError):
    """A constraint that lets a text go no further, though it is not complete; what was written before it is kept."""
