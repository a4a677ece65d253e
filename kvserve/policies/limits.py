"""How much of a prompt a request keeps: the policy's limit, unless the request brings its own.

In the OpenAI API a request sets them in `vllm_xargs`: `kvserve_rate`, `kvserve_max_tokens`, or `kvserve_off: 1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvserve.policies.base import Eviction, Policy
from kvserve.schedules.base import Limit


def request_limit(eviction: Eviction, policy: Policy, extra_args: Mapping[str, Any]) -> Limit | None:
    """The limit of one request; None: keep everything.

    Raises:
        ValueError: a value out of range.
    """
    if extra_args.get("kvserve_off"):
        return None
    rate, max_tokens = extra_args.get("kvserve_rate"), extra_args.get("kvserve_max_tokens")
    if rate is None and max_tokens is None:
        rate, max_tokens = eviction.rate, eviction.max_tokens
    window = getattr(eviction.scorer, "window", 1)
    return Limit(
        None if rate is None else float(rate),
        None if max_tokens is None else int(max_tokens),
        protected=policy.sink_tokens + (window if getattr(eviction.scorer, "keep_window", False) else 0),
    )
