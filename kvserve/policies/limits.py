"""How much of a prompt a request keeps: the policy's limit, unless the request brings its own.

In the OpenAI API a request sets them in `vllm_xargs`: `kvserve_rate`, `kvserve_max_tokens`, or `kvserve_off: 1`.
`own_limit` is the only reader of these arguments, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvserve.policies.base import LONGEST, MAX_RATE, Eviction, Policy
from kvserve.schedules.base import Limit

PREFIX = "kvserve_"
RATE, MAX_TOKENS, OFF = "kvserve_rate", "kvserve_max_tokens", "kvserve_off"


@dataclass(frozen=True)
class OwnLimit:
    """What a request asks for itself: at most one of the three.

    Attributes:
        rate: keep one of `rate` tokens, 1 to MAX_RATE.
        max_tokens: keep this many tokens per head, at least 1.
        off: keep everything.
    """

    rate: float | None = None
    max_tokens: int | None = None
    off: bool = False

    @property
    def is_given(self) -> bool:
        """Whether the policy's own limit does not apply."""
        return self.off or self.rate is not None or self.max_tokens is not None


def own_limit(extra_args: Mapping[str, Any], max_model_len: int | None = None) -> OwnLimit:
    """Read a request's arguments; those that are not kvserve's are left alone.

    Args:
        extra_args: values as JSON has them, of any size and type.
        max_model_len: the most tokens a sequence may have; None: not known here.

    Raises:
        ValueError: one sentence that names the argument and what it takes. Nothing else is raised.
    """
    own = {name: value for name, value in extra_args.items() if isinstance(name, str) and name.startswith(PREFIX)}
    if unknown := sorted(set(own) - {RATE, MAX_TOKENS, OFF}):
        raise ValueError(f"vllm_xargs.{short(unknown[0])} is unknown; kvserve takes {RATE}, {MAX_TOKENS} and {OFF}")
    limit = OwnLimit(
        _rate(own[RATE]) if RATE in own else None,
        _max_tokens(own[MAX_TOKENS], max_model_len) if MAX_TOKENS in own else None,
        _off(own[OFF]) if OFF in own else False,
    )
    if limit.rate is not None and limit.max_tokens is not None:
        raise ValueError(f"give vllm_xargs.{RATE} or vllm_xargs.{MAX_TOKENS}, not both")
    if limit.off and (limit.rate is not None or limit.max_tokens is not None):
        other = MAX_TOKENS if limit.rate is None else RATE
        raise ValueError(f"vllm_xargs.{OFF} keeps everything, so drop it or vllm_xargs.{other}")
    return limit


def check_request(extra_args: Mapping[str, Any], policy: Policy, max_model_len: int | None = None) -> None:
    """Refuse a request whose own limit cannot be followed.

    Raises:
        ValueError: the message names the argument and what it takes.
    """
    if policy.eviction is not None:
        request_limit(policy.eviction, policy, extra_args, max_model_len)
    elif own := sorted(name for name in extra_args if isinstance(name, str) and name.startswith(PREFIX)):
        raise ValueError(f"policy {policy.name} evicts nothing, so a request cannot set {short(', '.join(own))}")


def request_limit(
    eviction: Eviction, policy: Policy, extra_args: Mapping[str, Any], max_model_len: int | None = None
) -> Limit | None:
    """The limit of one request; None: keep everything.

    Raises:
        ValueError: as `own_limit`, or the policy's schedule cannot follow.
    """
    own = own_limit(extra_args, max_model_len)
    rate, max_tokens = (own.rate, own.max_tokens) if own.is_given else (eviction.rate, eviction.max_tokens)
    try:
        _check_schedule(eviction, own.off, rate, max_tokens)
        if own.off:
            return None
        return Limit(rate, max_tokens, protected=policy.sink_tokens + eviction.protected_recent)
    except ValueError as error:
        given = RATE if own.rate is not None else MAX_TOKENS if own.max_tokens is not None else OFF
        raise ValueError(f"vllm_xargs.{given}: {error}" if own.is_given else str(error)) from None


def _rate(value: Any) -> float:
    if not _is_number(value) or not 1 <= value <= MAX_RATE:  # not a number, the float, is between no two numbers
        raise ValueError(f"vllm_xargs.{RATE} must be a number from 1 to {MAX_RATE}, got {_shown(value)}")
    return float(value)


def _max_tokens(value: Any, max_model_len: int | None) -> int:
    if not _is_number(value) or not 1 <= value <= (max_model_len or LONGEST) or value != int(value):
        longest = f"{max_model_len}, the longest sequence of this server" if max_model_len else str(LONGEST)
        raise ValueError(f"vllm_xargs.{MAX_TOKENS} must be a whole number from 1 to {longest}, got {_shown(value)}")
    return int(value)


def _off(value: Any) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise ValueError(f"vllm_xargs.{OFF} must be true, false, 1 or 0, got {_shown(value)}")
    return bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value for a message: short, and without writing out an integer of a million digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return f"'{short(value)}'"
    if value is None or isinstance(value, int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def short(text: str) -> str:
    """Text of a request for a message: at most 60 characters, none of which JSON cannot carry."""
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:60] + "..."


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
