"""What one finished request held, for its answer: `kv_transfer_params.kvserve` in the OpenAI response body.

Seam: what `KVConnectorBase_V1.request_finished` returns, vLLM puts into `RequestOutput.kv_transfer_params` and the body
of an answer that is not streamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvserve.engine.stats import Evicted
    from kvserve.schedules.base import Limit


def request_report(tokens_cached: int, bytes_held: int, limit: Limit | None, last: Evicted | None) -> dict[str, Any]:
    """The report of a request that ends.

    Args:
        tokens_cached: tokens whose keys and values were computed: the prompt and all generated ones but the last.
        bytes_held: by all layers, KV heads and ranks; whole blocks, those shared with other requests included.
        limit: what the request or the policy asked for; None: keep everything.
        last: its last eviction; None: it keeps everything.

    Returns:
        tokens_kept: the average over layers and KV heads.
        rate_requested or max_tokens_requested: the limit.
        rate_effective: tokens over tokens kept at the last eviction; tokens generated since are all kept.
        tokens_demoted: the average over layers and KV heads, where some are.
    """
    if last is None:
        rate, kept = 1.0, float(tokens_cached)
    else:
        rate, kept = last.num_tokens / max(last.mean_kept, 1), last.mean_kept + tokens_cached - last.num_tokens
    report: dict[str, Any] = {"tokens_cached": tokens_cached, "tokens_kept": round(kept, 2), "bytes_held": bytes_held}
    if limit is not None and limit.max_tokens is not None:
        report["max_tokens_requested"] = limit.max_tokens
    else:
        report["rate_requested"] = 1.0 if limit is None else limit.rate
    report["rate_effective"] = round(rate, 3)
    return report | ({"tokens_demoted": round(last.mean_demoted, 2)} if last and last.demoted else {})
