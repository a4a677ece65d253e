"""The argument parsers of kvserve's own commands: what they refuse ends as a UsageError, before anything is started."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvserve.errors import UsageError
from kvserve.text_files import UnreadableError, read_text

MAX_TEXT_BYTES = 256 * 2**20
MAX_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and guesses what an unknown option was meant to be."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(name, known, n=1)
            guess = f", did you mean {close[0]}" if close else ""
            self.error(f"{'unknown option' if name.startswith('-') else 'one word too many,'} {name!r:.60}{guess}")
        return parsed


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # more digits than Python converts, too
            number = least - 1
        if not least <= number <= most:
            limit = f"of at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, got {text!r:.60}")
        return number

    return read


def positive(text: str) -> float:
    """The type of an option that takes a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r:.60}")
    return number


def output_file(text: str) -> Path:
    """The type of an option that names a file to write: refused here, and not when hours of work are done."""
    path = result_file(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r:.200}")
    return path


def result_file(text: str) -> Path:
    """As `output_file`, for a file whose folder will be made."""
    path = result_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r:.200} is a directory")
    return path


def result_path(text: str) -> Path:
    """As `result_file`; may also name a folder that is there."""
    try:
        path = Path(text).expanduser()
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if existing != path and not existing.is_dir():
            raise argparse.ArgumentTypeError(f"{str(existing)!r:.200} is not a folder")
        if not os.access(existing, os.W_OK):
            raise argparse.ArgumentTypeError(f"{str(existing)!r:.200} may not be written")
    except (OSError, RuntimeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r:.200} is no path") from None
    return path


def text_of(path: Path, flag: str) -> str:
    """The text of a file that an option names.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    try:
        text = read_text(path, MAX_TEXT_BYTES)
    except UnreadableError as error:
        raise UsageError(f"cannot read {flag} {path}: {error}") from None
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty")
    return text


def given_text(path: Path | None) -> str | None:
    """The content of --text; None where it was not given.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    return None if path is None else text_of(path, "--text")


def public_argv(argv: Sequence[str]) -> list[str]:
    """The command line without folders: a result file says nothing about where things lie on a machine."""
    return [word if word.startswith("-") and "/" not in word else _last_part(word) for word in argv]


def _last_part(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return flag + equals + ",".join(Path(part).name if "/" in part else part for part in value.split(","))
