"""tests/cases/example_package as an installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvserve.brought import Brought
from kvserve.budgets.registry import BUDGETS
from kvserve.codecs.registry import BROUGHT
from kvserve.retention.registry import RETENTIONS
from kvserve.schedules.registry import SCHEDULES
from kvserve.scorers.registry import SCORERS

OPEN: tuple[Brought, ...] = (
    SCORERS.brought, BUDGETS.brought, SCHEDULES.brought, RETENTIONS.brought, BROUGHT
)  # fmt: skip


@contextmanager
def example_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its entry points are found, and nothing of it is imported yet."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "example_package")
    importlib.invalidate_caches()
    sys.modules.pop("example_parts", None)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for brought in OPEN:
        brought.__dict__.pop("entries", None)
