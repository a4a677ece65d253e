"""Text that comes from users: files are read whole or refused in words, messages that quote it stay one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnreadableError(ValueError):
    """A file that is not read; the message is the reason, without the file's name."""


def read_text(path: Path, limit_bytes: int) -> str:
    """The content of a regular file in UTF-8.

    Nothing else is opened: reading a pipe or a device may never end.

    Args:
        limit_bytes: a longer file is refused before it is read.

    Raises:
        UnreadableError: it is missing, is no regular file, is too long, may not be read or is not UTF-8.
    """
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableError("it is a directory")
        if not stat.S_ISREG(mode):
            raise UnreadableError("it is not a regular file")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    except (UnreadableError, UnicodeError):
        raise
    except (RuntimeError, ValueError):  # no home folder of that name; a null byte in the name
        raise UnreadableError("there is no such path") from None
    if len(content) > limit_bytes:
        raise UnreadableError(f"it is longer than {size(limit_bytes)}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UnreadableError("it is not UTF-8 text") from None


def size(num_bytes: int) -> str:
    """A size in the largest unit that divides it."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes % factor == 0:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} bytes"


def one_line(text: str, limit: int = 800) -> str:
    """`text` with every run of white space as one blank, other control characters escaped, and cut at `limit`."""
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."
