"""The policies once more, in plain PyTorch inside transformers: what the engine's perplexity is checked against.

Written from the papers and independent of kvserve.pages: no page, no code packing, dense matrices only. A query at
position p reads quantised K/V of tokens in tiles before its own, except sinks, and dense K/V of everything else.

At 2 bits a code that flips by rounding changes what later layers see, so perplexity has a scatter of its own: two
correct implementations differ. Runs with K and V jittered by one part in a million show how much.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvserve.codecs.affine import Affine
from kvserve.codecs.affine_family import is_in_family
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.tile import Half
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy

ATTENTION_NAME = "kvserve_simulation"
# Uniform quantiser of a unit Gaussian, step in standard deviations (J. Max, 1960).
UNIT_GAUSSIAN_STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308}
SMALLEST_SCALE = 2.0**-20
JITTER = 1e-6  # relative, a few float32 roundings


def fp16(x: torch.Tensor) -> torch.Tensor:
    """Round to float16 and back, saturating: how scales are stored."""
    return x.clamp(-65504.0, 65504.0).to(torch.float16).to(torch.float32)


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """Fast orthonormal Walsh-Hadamard transform of the last dim (its own inverse).

    Where that is no power of two, of each block of the largest power of two that divides it.
    """
    size, width = x.shape[-1] & -x.shape[-1], 1
    x = x.unflatten(-1, (-1, size))
    while width < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * width), 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(*x.shape[:-1], size)
        width *= 2
    return x.flatten(-2) / math.sqrt(size)


def round_trip_min_max(x: torch.Tensor, bits: int, dim: int, ignored: torch.Tensor | None = None) -> torch.Tensor:
    """Asymmetric quantisation with one range per slice along `dim`; `ignored` elements do not define ranges."""
    low_of, high_of = (x, x) if ignored is None else (x.masked_fill(ignored, 3e38), x.masked_fill(ignored, -3e38))
    low, high = low_of.amin(dim, keepdim=True), high_of.amax(dim, keepdim=True)
    steps = 2**bits - 1
    scale = fp16(((high - low) / steps).clamp_min(SMALLEST_SCALE))
    low = fp16(low)
    return ((x - low) / scale).round().clamp(0, steps) * scale + low


def round_trip_symmetric(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric mid-rise quantisation of the last dim, the scale refitted by least squares."""
    top = (2**bits - 1) / 2
    scale = (x.pow(2).mean(-1, keepdim=True).sqrt() * UNIT_GAUSSIAN_STEP[bits]).clamp_min(SMALLEST_SCALE)
    for _ in range(2):
        levels = (x / scale + top).round().clamp(0, 2 * top) - top
        scale = ((x * levels).sum(-1, keepdim=True) / levels.pow(2).sum(-1, keepdim=True)).clamp_min(SMALLEST_SCALE)
    return levels * fp16(scale)


def simulated_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: it has codecs that are not written down here.
    """
    policy = load_policy(name)
    for half, codec in ((Half.KEY, policy.key), (Half.VALUE, policy.value)):
        if codec is not None and not (is_in_family(codec, half) and not getattr(codec, "clip", False)):
            raise ValueError(f"the simulation does not know {codec.name} {half}s; compare a policy with affine codecs")
    return policy


def simulate_keys(key: torch.Tensor, codec: Affine, tile: int, sinks: int) -> torch.Tensor:
    """Keys [heads, tokens, dim] after quantisation of every full tile; the rest is unchanged."""
    heads, tokens, dim = key.shape
    full = tokens // tile * tile
    if not full:
        return key
    size = codec.group_size or tile
    shape = (heads, full // tile, tile // size, size, dim)
    grouped = key[:, :full].reshape(shape)
    ignored = (torch.arange(full) < sinks).reshape(1, *shape[1:4], 1)
    result = round_trip_min_max(grouped, codec.bits, 3, ignored)
    if codec.boost_fraction:
        count = int(dim * codec.boost_fraction)
        high = grouped.masked_fill(ignored, -3e38).amax((2, 3))
        spread = high - grouped.masked_fill(ignored, 3e38).amin((2, 3))
        order = spread.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        boosted = torch.zeros_like(spread, dtype=torch.bool).scatter_(-1, order, True)
        fine = round_trip_min_max(grouped, codec.bits + 2, 3, ignored)
        result = torch.where(boosted[:, :, None, None, :], fine, result)
    return torch.cat([result.reshape(heads, full, dim), key[:, full:]], 1)


def simulate_values(value: torch.Tensor, codec: Affine | Symmetric) -> torch.Tensor:
    """Values [heads, tokens, dim] after quantisation, each token on its own."""
    if isinstance(codec, Symmetric):
        return hadamard_transform(round_trip_symmetric(hadamard_transform(value), codec.bits))
    heads, tokens, dim = value.shape
    group = codec.group_size if 0 < codec.group_size < dim else dim
    group = math.gcd(group, dim)
    return round_trip_min_max(value.reshape(heads, tokens, dim // group, group), codec.bits, 3).reshape(value.shape)


def simulated_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, policy: Policy
) -> torch.Tensor:
    """Causal attention of [heads, tokens, dim] queries over the policy's K and V; float32."""
    group = query.shape[0] // key.shape[0]
    if policy.key is None or policy.value is None:
        expanded = (key.repeat_interleave(group, 0), value.repeat_interleave(group, 0))
        return scaled_dot_product_attention(query[None], *(x[None] for x in expanded), is_causal=True, scale=scale)[0]
    key, value = fp16(key), fp16(value)  # dense tokens of a compressed policy are 16-bit
    assert isinstance(policy.key, Affine) and isinstance(policy.value, (Affine, Symmetric))
    coded_key = simulate_keys(key, policy.key, policy.tile_tokens, policy.sink_tokens)
    coded_value = simulate_values(value, policy.value)
    position = torch.arange(query.shape[1])
    is_coded = (position[None] < position[:, None] // policy.tile_tokens * policy.tile_tokens) & (
        position[None] >= policy.sink_tokens
    )
    future = position[None] > position[:, None]
    output = torch.empty_like(query)
    for head in range(query.shape[0]):
        kv = head // group
        logits = torch.where(is_coded, query[head] @ coded_key[kv].T, query[head] @ key[kv].T) * scale
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
        output[head] = (weights * is_coded) @ coded_value[kv] + weights.masked_fill(is_coded, 0) @ value[kv]
    return output


class SimulationHost:
    """A transformers model whose attention follows a policy; lives in a child process."""

    def __init__(self, model: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION_NAME, self._attention)
        self.policy: Policy | None = None
        self.jitter: torch.Generator | None = None
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=ATTENTION_NAME
        ).eval()

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert self.policy is not None and query.shape[0] == 1
        scale = scaling or query.shape[-1] ** -0.5
        output = simulated_attention(query[0], self._jittered(key[0]), self._jittered(value[0]), scale, self.policy)
        return output.transpose(0, 1)[None].contiguous(), None

    def _jittered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.jitter is None else x * (1 + JITTER * torch.randn(x.shape, generator=self.jitter))

    @torch.no_grad()
    def log_likelihoods(self, policy: str, windows: list[list[int]], jitter_seed: int | None = None) -> list[float]:
        """As EngineHost.log_likelihoods, in float32; a `jitter_seed` jitters K and V."""
        self.policy = simulated_policy(policy)
        self.jitter = None if jitter_seed is None else torch.Generator().manual_seed(jitter_seed)
        sums = []
        for window in windows:
            tokens = torch.tensor([window])
            logits = self.model(tokens, use_cache=False).logits[0, :-1].float()
            sums.append(-cross_entropy(logits, tokens[0, 1:], reduction="sum").item())
        return sums
