"""Which speculative decoding a policy's cache can take back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvserve.errors import UnsupportedError
from kvserve.policies.base import Policy

DRAFT_MODEL = "draft_model"
METHODS = ("ngram", DRAFT_MODEL)  # heads of the model's own (EAGLE, MTP) would read its hidden states and its pages


def check_speculation(
    policy: Policy, config: Any = None, method: Any = None, model: Any = None, num_tokens: Any = None
) -> None:
    """Refuse speculation whose rejected tokens the cache could not take back.

    Args:
        config: --speculative-config; method, model, num_tokens: --spec-method, --spec-model, --spec-tokens. None of
            them is set where nothing is speculated.

    Raises:
        UnsupportedError: naming what to change.
    """
    if not any((config, method, model, num_tokens)):
        return
    model = model or entry_of(config, "model")
    method = str(method or entry_of(config, "method") or model or "none").strip("[]")
    if method not in METHODS:
        raise UnsupportedError(
            "speculative decoding works with drafts from the text (ngram) or from a draft model (draft_model), got "
            f"{method!r:.200}; set --spec-method {' or '.join(METHODS)}, or drop --speculative-config (and --spec-*)"
        )
    if policy.eviction and policy.eviction.schedule.decodes:
        raise UnsupportedError(
            f"policy {policy.name} cuts requests while they generate (schedule {policy.eviction.schedule.name}), and a "
            "cut could not take back rejected drafts of speculative decoding; set eviction.schedule to end-of-prefill, "
            "or drop --speculative-config (and --spec-*)"
        )


def entry_of(config: Any, name: str) -> Any:
    """An entry of an option that is a mapping: parsed by vLLM, as JSON on a command line, or not given."""
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            return None
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
