"""How much of a prompt a request keeps: the policy's limit, unless the request brings its own.

In the OpenAI API a request sets them in `vllm_xargs`: `kvserve_rate`, `kvserve_max_tokens`, or `kvserve_off: 1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.policies.base import Eviction, Policy
from kvserve.schedules.base import Limit

PREFIX = "kvserve_"
RATE, MAX_TOKENS, OFF = "kvserve_rate", "kvserve_max_tokens", "kvserve_off"


def check_request(extra_args: Mapping[str, Any], policy: Policy) -> None:
    """Refuse a request whose own limit cannot be followed.

    Raises:
        ValueError: the message names the argument and what it takes.
    """
    own = {name: value for name, value in extra_args.items() if name.startswith(PREFIX)}
    if not own:
        return
    if unknown := sorted(set(own) - {RATE, MAX_TOKENS, OFF}):
        raise ValueError(f"vllm_xargs.{unknown[0]} is unknown; kvserve takes {RATE}, {MAX_TOKENS} and {OFF}")
    if policy.eviction is None:
        raise ValueError(f"policy {policy.name} evicts nothing, so a request cannot set {', '.join(sorted(own))}")
    if RATE in own and MAX_TOKENS in own:
        raise ValueError(f"give vllm_xargs.{RATE} or vllm_xargs.{MAX_TOKENS}, not both")
    for name in (RATE, MAX_TOKENS):
        if name in own and (isinstance(own[name], bool) or not isinstance(own[name], int | float)):
            raise ValueError(f"vllm_xargs.{name} must be a number, got {own[name]!r}")
    try:
        request_limit(policy.eviction, policy, own)
    except ValueError as error:
        raise ValueError(f"vllm_xargs: {error}") from None


def request_limit(eviction: Eviction, policy: Policy, extra_args: Mapping[str, Any]) -> Limit | None:
    """The limit of one request; None: keep everything.

    Raises:
        ValueError: a value out of range.
    """
    if extra_args.get(OFF):
        return None
    rate, max_tokens = extra_args.get(RATE), extra_args.get(MAX_TOKENS)
    if rate is None and max_tokens is None:
        rate, max_tokens = eviction.rate, eviction.max_tokens
    return Limit(
        None if rate is None else float(rate),
        None if max_tokens is None else int(max_tokens),
        protected=policy.sink_tokens + eviction.protected_recent,
    )
