"""kvserve's own log lines.

They have a logger of their own beside vLLM's, so that vLLM's can be quiet while a server still says what its cache is.
"""

from __future__ import annotations

import logging
import os
import sys

LEVEL_VARIABLE = "KVSERVE_LOG_LEVEL"  # else vLLM's VLLM_LOGGING_LEVEL, else INFO


def _make_logger() -> logging.Logger:
    own = logging.getLogger("kvserve")
    if not own.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Format())
        own.addHandler(handler)
        own.propagate = False
    name = os.environ.get(LEVEL_VARIABLE) or os.environ.get("VLLM_LOGGING_LEVEL") or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    own.setLevel(logging.INFO if level is None else level)
    return own


class _Format(logging.Formatter):
    """`kvserve: message`, with the level where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"kvserve: {level}{super().format(record)}"


logger = _make_logger()
