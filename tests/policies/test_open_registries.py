"""Parts that other packages bring (tests/cases/example_package stands for an installed one)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from kvserve.checks import UnsupportedError, check_compiled
from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.policies.loading import PolicyError, load_policy, policy_content, policy_from_config
from kvserve.retention.evict import Evict
from kvserve.scorers.base import LayerView
from kvserve.scorers.registry import SCORERS
from tests.cases.brought_parts import example_package


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with example_package(monkeypatch):
        yield


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


ONE_BIT = ["key={name: one-bit}", "value={name: one-bit}"]


def test_a_policy_may_name_a_codec_of_another_package_and_says_what_reads_it() -> None:
    policy = load_policy("int8", ONE_BIT)
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    rows, shape = torch.randn(64, 64), TileShape(Half.KEY, 64, 64)
    parts = policy.key.encode(Tile.of(rows), shape, {})
    means = rows.abs().mean(1, keepdim=True).expand(-1, 64).half().float()
    assert torch.equal(policy.key.decode(parts, shape, {}, torch.arange(64)), torch.where(rows > 0, means, -means))
    check_compiled(policy, "reference")
    with pytest.raises(UnsupportedError, match="one-bit has no compiled kernels; add --kernels reference"):
        check_compiled(policy, "native")


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


def test_a_codec_that_does_not_fit_names_its_package() -> None:
    message = r"codec 'no-codec' of the package example-parts 1\.0 is no Codec \(example_parts:EveryOther\)"
    with pytest.raises(PolicyError, match=message):
        load_policy("int8", ["key={name: no-codec}"])
    with pytest.raises(PolicyError, match=r"the codecs are .*affine.*one-bit"):
        load_policy("int8", ["key={name: nonsense}"])
    with pytest.raises(PolicyError, match=r"key.*bits"):
        load_policy("int8", ["key={name: one-bit, bits: 1}"])


def test_a_wrong_parameter_of_a_brought_part_is_refused_like_one_of_kvserve() -> None:
    with pytest.raises(PolicyError, match=r"eviction\.scorer.*perod"):
        load_policy("snapkv", ["eviction.scorer={name: every-other, perod: 3}"])
