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
    rate, max_tokens = extra_args.get(RATE), extra_args.get(MAX_TOKENS)
    if rate is None and max_tokens is None:
        rate, max_tokens = eviction.rate, eviction.max_tokens
    _check_schedule(eviction, bool(extra_args.get(OFF)), rate, max_tokens)
    if extra_args.get(OFF):
        return None
    return Limit(
        None if rate is None else float(rate),
        None if max_tokens is None else int(max_tokens),
        protected=policy.sink_tokens + eviction.protected_recent,
    )


def check_rate(rate: float, num_spared: int, num_layers: int) -> None:
    """Refuse a rate at which layers that keep all their tokens leave nothing for the others.

    Raises:
        ValueError: naming the rate below which it would do.
    """
    if rate * num_spared >= num_layers:
        raise ValueError(
            f"{num_spared} of {num_layers} layers keep all their tokens (eviction.spare_layers), so the rate must be "
            f"below {num_layers / num_spared:g}, got {rate:g}; lower it, or spare fewer layers"
        )


def _check_schedule(eviction: Eviction, off: bool, rate: float | None, max_tokens: int | None) -> None:
    """Refuse a limit that the schedule cannot follow.

    A pool that was sized for prompts compressed as they arrive may not hold one that is compressed less.
    """
    if eviction.schedule.needs_max_tokens and max_tokens is None:
        raise ValueError(f"the schedule {eviction.schedule.name} needs a maximum of tokens, not a rate")
    if not eviction.schedule.chunk_tokens:
        return
    looser = (
        off or (eviction.rate and (rate or 0) < eviction.rate)
        or (eviction.max_tokens and (max_tokens or float("inf")) > eviction.max_tokens)
    )  # fmt: skip
    if looser:
        own = f"rate {eviction.rate:g}" if eviction.rate else f"{eviction.max_tokens} tokens"
        raise ValueError(f"prompts are compressed as they arrive: a request can only keep less than {own}")
