"""Shares as characters, for maps that are drawn as text."""

from __future__ import annotations

SHADES = " ░▒▓█"


def shade(share: float) -> str:
    """A character as dark as the share, 0 to 1."""
    return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]
