"""A transformers model that goes on from prompts of which tokens were evicted: what eviction alone costs, cheaply.

One dense prefill serves any number of policies and rates. The policy's own scorer and budget choose the tokens of each
KV head, as in the engine; attention then leaves the evicted ones out by a mask, in float32, without pages and codecs.
All variants of a prompt continue in one batch. No vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvserve.accounting.plan import kept_elsewhere, policy_plan
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy
from kvserve.scorers.accumulated_attention import AccumulatedAttention
from kvserve.scorers.base import LayerView
from kvserve.scorers.query_window import PlainWindow
from kvserve.scorers.rotary import QueryStatistics, Rotary

ATTENTION_NAME = "kvserve_evicted"


@dataclass(frozen=True)
class PromptLayer:
    """What one layer computed for a prompt of n tokens: keys, values [kv_heads, n, d], queries [num_heads, n, d]."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """A prefilled prompt and the logits [vocabulary] behind its last token."""

    layers: list[PromptLayer]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0].keys.shape[1]


class EvictedModel:
    """The model, in float32.

    Attributes:
        rotary: its position embedding.
        head_dim: elements of one K or V row.
        scale: factor of its query-key dot products.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION_NAME, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION_NAME
        ).eval()
        self.rotary = Rotary(self.model.model.rotary_emb.inv_freq)
        config = self.model.config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = 0.0
        self._recorded: list[PromptLayer] | None = None
        self._continued: _Continuation | None = None

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> Prompt:
        """Run a prompt densely and keep what its layers computed."""
        self._recorded = []
        logits = self.model(torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1).logits[0, -1]
        layers, self._recorded = self._recorded, None
        return Prompt(layers, logits)

    def recorded_layer(self) -> PromptLayer:
        """The layer that the prefill under way has just attended in, for hooks of its modules."""
        assert self._recorded
        return self._recorded[-1]

    @torch.no_grad()
    def generate(self, prompt: Prompt, kept: torch.Tensor, max_tokens: int, end_tokens: set[int]) -> list[list[int]]:
        """Greedy tokens of each variant, its end token included; the first one comes from the whole prompt.

        Args:
            kept: bool [variants, layers, kv_heads, n].
        """
        first = int(prompt.logits.argmax())
        outputs = [[first] for _ in kept]
        with self._continue(prompt, kept):
            for step in range(max_tokens - 1):
                if all(output[-1] in end_tokens for output in outputs):
                    break
                logits = self._forward(torch.tensor([[output[-1]] for output in outputs]), prompt.num_tokens + step)
                for output, token in zip(outputs, logits[:, -1].argmax(-1).tolist(), strict=True):
                    output.append(output[-1] if output[-1] in end_tokens else token)
        return [_until(output, end_tokens) for output in outputs]

    @torch.no_grad()
    def log_likelihoods(self, prompt: Prompt, kept: torch.Tensor, continuation: Sequence[int]) -> list[float]:
        """Sum of the log probabilities (nats) of the continuation, for each variant."""
        tokens = torch.tensor(list(continuation))
        sums = []
        for variant in kept.split(1):  # one at a time: logits of a batch would not fit
            with self._continue(prompt, variant):
                logits = self._forward(tokens[None, :-1], prompt.num_tokens)[0]
            logits = torch.cat([prompt.logits[None], logits])
            sums.append(-float(torch.nn.functional.cross_entropy(logits, tokens, reduction="sum")))
        return sums

    def kept_tokens(self, prompt: Prompt, policy: Policy, request_id: str = "") -> torch.Tensor:
        """What the policy keeps of a prompt, bool [layers, kv_heads, n]; counts and protected tokens as in the engine.

        Raises:
            ValueError: the policy evicts nothing, or makes rows of what it evicts.
        """
        eviction, n = policy.eviction, prompt.num_tokens
        if eviction is None:
            raise ValueError(f"policy {policy.name} evicts nothing")
        if eviction.retention.reads_evicted:
            raise ValueError(
                f"policy {policy.name} makes rows of tokens that go ({eviction.retention.name}), and here they are "
                "left out; choose a policy that evicts them"
            )
        num_layers = len(prompt.layers)
        layout = PageLayout.build(policy, self.head_dim, policy.tile_tokens, torch.float32, num_layers=num_layers)
        plan = policy_plan(layout, n)
        kept = torch.ones(num_layers, prompt.layers[0].keys.shape[0], n, dtype=torch.bool)
        if plan is None or eviction.formats:  # demoted tokens stay
            return kept
        cut, sinks = plan.last_cut(n), policy.sink_tokens
        pages = cut.chosen_pages or cut.kept_blocks * layout.tiles_per_block
        others = sinks + n - cut.end
        elsewhere = kept_elsewhere(layout, cut.end, cut.kept_blocks, cut.chosen_pages)
        views = self._views(prompt, policy, elsewhere + others, request_id)
        scores = torch.stack([eviction.scorer.score(view) for view in views])[..., sinks : cut.end]
        choice = eviction.budget.choose(scores, layout.chosen_unit, pages * kept[..., 0].numel(), layout.spared_layers)
        kept[..., sinks : cut.end] = False
        for layer, heads in enumerate(choice.tokens):
            for head, index in enumerate(heads):
                kept[layer, head, sinks + index] = True
        return kept

    def _views(self, prompt: Prompt, policy: Policy, kept_tokens: int, request_id: str) -> Iterator[LayerView]:
        assert policy.eviction is not None
        scorer, positions = policy.eviction.scorer, torch.arange(prompt.num_tokens)
        for index, layer in enumerate(prompt.layers):
            queries, sinks = layer.queries, getattr(scorer, "sinks", 0)
            optional: dict[str, Any] = {}
            if "accumulated" in scorer.needs:
                assert isinstance(scorer, AccumulatedAttention)
                optional["accumulated"] = accumulated_attention(layer, self.scale, scorer.exponent)
            if "query_statistics" in scorer.needs:
                optional["query_statistics"] = QueryStatistics.of(queries[:, sinks:], positions[sinks:], self.rotary)
            window = queries[:, -policy.eviction.window :]
            yield LayerView(
                kv_heads=layer.keys.shape[0], positions=positions, scale=self.scale, keys=layer.keys,
                values=layer.values, query_window=PlainWindow(window, layer.keys, positions, self.scale),
                kept_tokens=kept_tokens, request_id=request_id, layer=index, **optional,
            )  # fmt: skip

    # -- inside the model ------------------------------------------------------------------------------------------

    @contextmanager
    def _continue(self, prompt: Prompt, kept: torch.Tensor) -> Iterator[None]:
        self._continued = _Continuation(prompt, kept, [None] * len(prompt.layers))
        try:
            yield
        finally:
            self._continued = None

    def _forward(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        positions = torch.arange(first, first + tokens.shape[1])[None].expand(tokens.shape)
        return self.model(tokens, position_ids=positions, use_cache=False).logits

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        self.scale = scaling or query.shape[-1] ** -0.5
        if self._continued is not None:
            output = self._continued.attend(module.layer_idx, query, key, value, self.scale)
        else:
            if self._recorded is not None:
                self._recorded.append(PromptLayer(key[0].clone(), value[0].clone(), query[0].clone()))
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
            )
        return output.transpose(1, 2).contiguous(), None


@dataclass
class _Continuation:
    """Variants of one prompt that go on side by side; `added` holds the new tokens' K and V of each layer."""

    prompt: Prompt
    kept: torch.Tensor
    added: list[tuple[torch.Tensor, torch.Tensor] | None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[variants, num_heads, t, d] of t new tokens, whose keys and values are appended first."""
        before = self.added[layer]
        if before is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        self.added[layer] = key, value
        old = self.prompt.layers[layer]
        if key.shape[0] == 1:
            return self._attend_without(old, self.kept[0, layer], query, key, value, scale)
        return self._attend_masked(old, self.kept[:, layer], query, key, value, scale)

    @staticmethod
    def _attend_masked(
        old: PromptLayer, kept: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Many variants at once; `kept` is [variants, kv_heads, n]."""
        variants, kv_heads, length, width = key.shape
        rows, n = query.shape[2], old.keys.shape[1]
        query = query.view(variants, kv_heads, -1, rows, width)
        of_prompt = torch.einsum("vhgtd,hnd->vhgtn", query, old.keys) * scale
        of_prompt.masked_fill_(~kept[:, :, None, None], -torch.inf)
        of_new = query @ key[:, :, None].mT * scale
        of_new.masked_fill_(_later(rows, length), -torch.inf)
        weights = torch.cat([of_prompt, of_new], -1).softmax(-1)
        output = torch.einsum("vhgtn,hnd->vhgtd", weights[..., :n], old.values) + weights[..., n:] @ value[:, :, None]
        return output.reshape(variants, -1, rows, width)

    @staticmethod
    def _attend_without(
        old: PromptLayer, kept: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One variant, head by head over its kept tokens, which is faster for many rows; `kept` is [kv_heads, n]."""
        rows, length, groups = query.shape[2], key.shape[2], query.chunk(len(kept), 1)
        outputs = []
        for head, stays in enumerate(kept):
            keys = torch.cat([old.keys[head, stays], key[0, head]]).expand(1, groups[head].shape[1], -1, -1)
            values = torch.cat([old.values[head, stays], value[0, head]]).expand_as(keys)
            mask = query.new_zeros(rows, keys.shape[2])
            mask[:, -length:].masked_fill_(_later(rows, length), -torch.inf)
            attend = torch.nn.functional.scaled_dot_product_attention
            outputs.append(attend(groups[head], keys, values, attn_mask=mask, scale=scale))
        return torch.cat(outputs, 1)


def _later(rows: int, length: int) -> torch.Tensor:
    """Of `length` new tokens, which ones come after the query of each row; the rows are the last ones."""
    return torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)


def accumulated_attention(layer: PromptLayer, scale: float, exponent: int) -> torch.Tensor:
    """LayerView.accumulated of a whole prompt."""
    kv_heads, n, _ = layer.keys.shape
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    sums = []
    for head, query in enumerate(layer.queries.unflatten(0, (kv_heads, -1))):
        logits = (query @ layer.keys[head].T * scale).masked_fill_(hidden, -torch.inf)
        sums.append((logits.softmax(-1) ** exponent).sum((0, 1)))
    return torch.stack(sums)


def _until(tokens: list[int], end_tokens: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: index + 1]
    return tokens
