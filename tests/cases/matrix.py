"""The matrix of policies and features, as its tests fill it (docs/compatibility.md).

KVSERVE_MATRIX names the result file, in which a run of some tests changes their cells alone;
KVSERVE_MATRIX_POLICIES the policies of a run, all without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

from kvserve.measuring.machine import versions
from kvserve.policies.registry import policy_names
from tests.cases.engine_cases import STORY, encode

POLICIES = os.environ.get("KVSERVE_MATRIX_POLICIES", "").split() or policy_names()
NAMES = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]
NUM_TOKENS = 24
CHOOSES_BY_REQUEST = ("random",)  # its texts differ from request to request
FAILS = "**fails**"
MATRIX: dict[str, dict[str, str]] = {}


@contextmanager
def checked(policy: str, *features: str) -> Iterator[dict[str, str]]:
    """The policy's cells, in which `features` have failed until they are said to work."""
    cells = MATRIX.setdefault(policy, {})
    cells |= dict.fromkeys(features, FAILS)
    yield cells


def write_cells() -> None:
    """Write what was found into the result file, if one is asked for."""
    if name := os.environ.get("KVSERVE_MATRIX"):
        path = Path(name)
        earlier = json.loads(path.read_text(encoding="utf-8"))["matrix"] if path.exists() else {}
        matrix = {policy: earlier.get(policy, {}) | MATRIX.get(policy, {}) for policy in policy_names()}
        content = {"command": ["make", "matrix"], "versions": versions(), "matrix": matrix}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def story_prompts(llm: LLM) -> list[list[int]]:
    return [encode(llm, f"{name} told this story. " + STORY * 4 + f"And {name} said:") for name in NAMES]


def complete(
    llm: LLM, prompts: list[list[int]], lora_request: Any = None, priority: Any = None, **options: Any
) -> list[RequestOutput]:
    sampling = SamplingParams(
        **{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 2, **options}
    )
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, sampling, use_tqdm=False, lora_request=lora_request, priority=priority)
