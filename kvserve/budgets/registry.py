"""Budgets by the name that YAML files use."""

from __future__ import annotations

from kvserve.budgets.base import Budget
from kvserve.budgets.global_pages import GlobalPages
from kvserve.budgets.head_classes import HeadClasses
from kvserve.budgets.heads_in_layer import HeadsInLayer
from kvserve.budgets.pyramid import Pyramid
from kvserve.budgets.uniform import Uniform
from kvserve.part_registry import PartRegistry

BUDGETS: PartRegistry[Budget] = PartRegistry(
    "budget", Budget, (GlobalPages, HeadClasses, HeadsInLayer, Pyramid, Uniform)
)
budget_class = BUDGETS.class_of
make_budget = BUDGETS.make
