"""Parts that other packages bring (tests/cases/example_package stands for an installed one)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvserve.budgets.registry import BUDGETS
from kvserve.policies.loading import PolicyError, load_policy, policy_content, policy_from_config
from kvserve.retention.evict import Evict
from kvserve.retention.registry import RETENTIONS
from kvserve.schedules.registry import SCHEDULES
from kvserve.scorers.base import LayerView
from kvserve.scorers.registry import SCORERS

EXAMPLE = Path(__file__).parents[1] / "cases" / "example_package"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLE)
    importlib.invalidate_caches()
    for registry in (SCORERS, BUDGETS, RETENTIONS, SCHEDULES):
        registry.__dict__.pop("brought", None)
    sys.modules.pop("example_parts", None)
    yield
    for registry in (SCORERS, BUDGETS, RETENTIONS, SCHEDULES):
        registry.__dict__.pop("brought", None)


def test_a_policy_may_name_parts_of_another_package() -> None:
    parts = [
        "eviction.scorer={name: every-other, period: 3}",
        "eviction.budget=example-budget",
        "eviction.retention=example-retention",
        "eviction.schedule={name: example-schedule, interval: 128}",
    ]
    policy = load_policy("snapkv", parts)
    assert policy.eviction is not None
    scores = policy.eviction.scorer.score(LayerView(kv_heads=2, positions=torch.arange(6), scale=1.0))
    assert scores.tolist() == [[1, 0, 0, 1, 0, 0]] * 2
    assert isinstance(policy.eviction.retention, Evict)
    assert policy_from_config({"policy": policy_content(policy)}) == policy


def test_nothing_of_a_package_is_imported_before_a_policy_asks_for_it() -> None:
    SCORERS.class_of("key-norm")
    assert "example_parts" not in sys.modules
    SCORERS.class_of("every-other")
    assert "example_parts" in sys.modules


def test_the_names_of_other_packages_are_among_those_to_choose_from() -> None:
    with pytest.raises(PolicyError, match=r"the scorers are .*every-other.*key-norm"):
        load_policy("snapkv", ["eviction.scorer=nonsense"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "eviction.scorer=missing-module",
            "scorer 'missing-module' of the package example-parts 1.0 does not load (ModuleNotFoundError: No module "
            "named 'example_missing'); update or remove it",
        ),
        (
            "eviction.scorer=no-scorer",
            "scorer 'no-scorer' of the package example-parts 1.0 is no Scorer (example_parts:ExampleBudget); update or "
            "remove the package",
        ),
        (
            "eviction.scorer=other-name",
            "scorer 'other-name' of the package example-parts 1.0 calls itself 'every-other'; update or remove the "
            "package",
        ),
        (
            "eviction.schedule=every-n",
            "schedule 'every-n' is brought by more than one package (kvserve, example-parts 1.0); remove one of them",
        ),
    ],
)
def test_a_part_that_does_not_fit_names_its_package(override: str, message: str) -> None:
    with pytest.raises(PolicyError) as error:
        load_policy("snapkv", [override])
    assert message in str(error.value)


def test_a_wrong_parameter_of_a_brought_part_is_refused_like_one_of_kvserve() -> None:
    with pytest.raises(PolicyError, match=r"eviction\.scorer.*perod"):
        load_policy("snapkv", ["eviction.scorer={name: every-other, perod: 3}"])
