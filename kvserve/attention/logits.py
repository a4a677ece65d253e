"""What a layer makes of its logits, in plain PyTorch: soft-caps and learned sinks."""

from __future__ import annotations

import torch


def capped(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """Scaled logits as a layer with a soft-cap counts them, cap * tanh(logit / cap); the same ones where it has none.

    Gemma 2, arXiv 2408.00118, section 2.
    """
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def softmax(logits: torch.Tensor, sink_logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities over the last dim, and the natural log of their denominator.

    Args:
        logits: [..., n], -inf where a token is not seen.
        sink_logits: of learned sinks, one for each row of logits (shapes broadcast to [...]): each is one more logit,
            whose token does not exist (gpt-oss, arXiv 2508.10925, section 2.2). None: there are none.

    Returns:
        [..., n], which sum to less than 1 where there is a sink, and [...].
    """
    if sink_logits is None:
        return logits.softmax(-1), logits.logsumexp(-1)
    sinks = sink_logits.to(logits.dtype).expand(logits.shape[:-1])[..., None]
    joined = torch.cat([logits, sinks], -1)
    return joined.softmax(-1)[..., :-1], joined.logsumexp(-1)
