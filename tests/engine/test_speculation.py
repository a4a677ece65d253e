"""Speculative decoding over compressed pages: drafts change when tokens come, never which."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from kvserve.policies.loading import load_policy
from tests.cases.greedy import Step, assert_same_texts

slow = pytest.mark.slow
POLICIES = ["none", "int8", "kivi-2bit", "snapkv", "kv-compress-2bit"]


def run(policy: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.cases.speculation", policy, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    for name in {"expected", "together", "alone", "miss", "hit"} & set(found):
        found[name] = [[Step(*step) for step in text] for text in found[name]]
    return found


def words(texts: list[list[Step]]) -> list[list[str]]:
    return [[step.token for step in text] for text in texts]


@slow
@pytest.mark.parametrize("policy", POLICIES)
def test_texts_and_prefix_hits_are_those_of_an_engine_without_drafts(policy: str) -> None:
    found = run(policy)
    asked, accepted = found["drafted"]
    assert 0 < accepted < asked, "some drafts have to be right, and some wrong"
    for texts in (found["together"], found["alone"]):
        if policy == "kivi-2bit":  # 2 bits turn the rounding of steps of another shape into more than a near tie
            assert sum(mine == theirs for mine, theirs in zip(words(found["expected"]), words(texts), strict=True)) >= 3
        else:
            assert_same_texts(found["expected"], texts)
    assert found["free"] == found["blocks"] - 1
    # Tiles of generated tokens enter the prefix cache with true rows only.
    assert found["cached"][0] == 0
    assert_same_texts(found["miss"], found["hit"])
    if load_policy(policy).eviction is None:
        assert found["cached"][1] >= (found["length"] - 1) // 64 * 64 - 64
    assert ("5 drafts a step" in found["table"]) == load_policy(policy).has_pages


@slow
@pytest.mark.parametrize("policy", ["int8", "kivi-2bit", "kv-compress-2bit"])
def test_a_preempted_request_gets_its_text(policy: str) -> None:
    found = run(policy, "--small")
    assert found["preemptions"] > 0 or policy != "int8"  # smaller pages of the same blocks hold all of them
    assert found["drafted"][1] > 0
    assert_same_texts(found["expected"], found["together"])
    assert found["free"] == found["blocks"] - 1
