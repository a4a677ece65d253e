"""The text that calibrations read by default, and how a text is cut into what a model reads at once."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvserve.errors import TextError

_LEAST_DOCSTRING = 200  # characters; shorter ones are headings


@dataclass(frozen=True)
class Corpus:
    """A text and its name."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def default_corpus() -> Corpus:
    """The longer docstrings of Python's standard library: prose, examples and code, some 700,000 characters.

    None of it is in what `kvserve eval` reads (the language reference, sentences from novels), so that its figures are
    of texts that a calibration has not seen.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = [text for path in sorted(library.glob("*.py")) for text in _docstrings(path)]
    return Corpus("python-docstrings", "\n\n".join(texts))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= _LEAST_DOCSTRING:
                yield text


def segments(tokens: Sequence[int], num_tokens: int, length: int, start: Sequence[int] = ()) -> list[list[int]]:
    """Evenly spread parts of a text, without overlap, that have `num_tokens` tokens together at most.

    Args:
        length: of each part.
        start: tokens that every part begins with; they count.

    Raises:
        TextError: the text is too short, or less than one part was asked for.
    """
    count, own = num_tokens // length, length - len(start)
    if count < 1:
        raise TextError(f"{num_tokens} tokens are less than one part of the text, {length} tokens; raise --tokens")
    if len(tokens) < count * own:
        raise TextError(
            f"the text has {len(tokens)} tokens and {num_tokens} are wanted: give a longer --text, or fewer --tokens"
        )
    stride = (len(tokens) - own) // max(count - 1, 1)
    firsts = [index * stride for index in range(count)]
    return [[*start, *tokens[first : first + own]] for first in firsts]
