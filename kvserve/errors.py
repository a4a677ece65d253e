"""What can go wrong, as the command line, the plugin and the measurements tell each other.

Each message is one sentence for the user that names the way out.
"""

from __future__ import annotations

from kvserve.text_files import one_line


class UsageError(ValueError):
    """A command line that cannot be followed; the message says what to write instead."""


class PolicyError(ValueError):
    """A policy that cannot be used; the message says in one line why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UnsupportedError(ValueError):
    """A model, option or version that kvserve refuses; the message names the way out."""


class ConversionError(RuntimeError):
    """The default model could not be converted; the message is one sentence."""


class ChildError(RuntimeError):
    """A child process failed; the message says where and why."""


class TextError(ValueError):
    """A text that is too short; the message says by how much."""
