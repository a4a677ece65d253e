"""Budgets by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.budgets.base import Budget
from kvserve.budgets.global_pages import GlobalPages
from kvserve.budgets.heads_in_layer import HeadsInLayer
from kvserve.budgets.pyramid import Pyramid
from kvserve.budgets.uniform import Uniform

BUDGETS: dict[str, type[Budget]] = {
    cls.model_fields["name"].default: cls for cls in (GlobalPages, HeadsInLayer, Pyramid, Uniform)
}


def budget_class(name: str) -> type[Budget]:
    """The class of a name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if name not in BUDGETS:
        raise ValueError(f"there is no budget {name!r}; the budgets are {', '.join(sorted(BUDGETS))}")
    return BUDGETS[name]


def make_budget(content: Mapping[str, Any]) -> Budget:
    """The budget of a YAML mapping: its name and those parameters that differ from the defaults.

    Raises:
        ValueError: unknown name (or none), unknown parameter or a value out of range.
    """
    return budget_class(str(content.get("name"))).model_validate(content)
