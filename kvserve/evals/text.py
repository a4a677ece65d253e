"""The text whose perplexity is measured: windows of a context and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.errors import TextError


@dataclass(frozen=True)
class Window:
    """A context and its continuation, token ids."""

    context: list[int]
    continuation: list[int]


def default_text() -> tuple[str, str]:
    """The language reference that Python carries, and its name.

    The packaged sentences of the prompts repeat, so that a model would only have to copy.
    """
    from pydoc_data.topics import topics

    return "python-language-reference", "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokens: list[int], count: int, context: int, continuation: int, start: Sequence[int] = ()) -> list[Window]:
    """Evenly spread windows without overlap. Contexts are up to a tile shorter, each by another number, so that an
    unfinished tile is no constant help.

    Args:
        start: tokens that every context begins with; they count as part of it.

    Raises:
        TextError: the text is too short.
    """
    size = context + continuation
    if len(tokens) < count * size:
        raise TextError(
            f"the text has {len(tokens)} tokens and {count} windows of {size} need {count * size}: give a longer "
            "--text, or fewer --windows"
        )
    stride = (len(tokens) - size) // max(count - 1, 1)
    found = []
    for index in range(count):
        middle = index * stride + context
        first = index * stride + min(_shortened(index) + len(start), context - 1)
        found.append(Window([*start, *tokens[first:middle]], tokens[middle : middle + continuation]))
    return found


def _shortened(index: int) -> int:
    """0 to 63, spread over the windows."""
    return index * 37 % 64
