"""What the self-test sends: two short requests that take every path of the cache.

The first one is the beginning of the second, so that the second finds its first tiles in the prefix cache and attends
to them with many queries at once. Its prompt ends shortly before a tile is full, so that decoding seals one, and it is
long enough to be cut where the policy evicts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from kvserve.accounting.plan import plan_eviction
from kvserve.pages.layout import PageLayout
from kvserve.policies.limits import MAX_TOKENS, request_limit
from kvserve.prose import shuffled_prose

TILES = 5
OUTPUT_TOKENS = 12
MISSING_TOKENS = 6  # of the tile that decoding fills
PROSE_SENTENCES = 200


@dataclass(frozen=True)
class TestPlan:
    """Lengths in tokens.

    Attributes:
        first_len: prompt of the first request, which generates one token.
        prompt_len: prompt of the second one.
        extra_args: the second one's own limit, where the policy's would not cut so short a prompt.
    """

    first_len: int
    prompt_len: int
    output_tokens: int
    extra_args: dict[str, Any] = field(default_factory=dict)

    __test__ = False  # for pytest, which takes the name for a test's

    def requests(self) -> list[tuple[int, dict[str, Any]]]:
        """Length of the prompt and SamplingParams of both requests, in order."""
        common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "extra_args": self.extra_args or None}
        lengths = ((self.first_len, 1), (self.prompt_len, self.output_tokens))
        return [(length, {"max_tokens": outputs, **common}) for length, outputs in lengths]


def num_queries(prompt_len: int, cached_tokens: int | None, output_tokens: int) -> int:
    """Queries that every layer answers for a request; the last output token is not fed back."""
    return prompt_len - (cached_tokens or 0) + output_tokens - 1


def plan_test(layout: PageLayout, max_model_len: int) -> TestPlan:
    """The requests for one layout; shorter where the engine takes only short ones."""
    tile, eviction = layout.tile_tokens if layout.has_pages else layout.block_size, layout.policy.eviction
    output_tokens = OUTPUT_TOKENS
    if eviction and eviction.schedule.decodes:
        output_tokens += eviction.schedule.interval
    prompt_len = max(TILES * tile, 3 * layout.block_size) - MISSING_TOKENS
    prompt_len = max(min(prompt_len, max_model_len - output_tokens), 1)
    output_tokens = min(output_tokens, max(max_model_len - prompt_len, 1))
    first_len = max(prompt_len - tile - tile // 2, 1)
    extra: dict[str, Any] = {}
    if eviction and eviction.max_tokens:
        limit = request_limit(eviction, layout.policy, {})
        assert limit is not None
        if plan_eviction(layout, limit, prompt_len, prompt_len) is None:
            extra = {MAX_TOKENS: max(prompt_len // 2, limit.protected)}
    return TestPlan(first_len, prompt_len, output_tokens, extra)


def prompt_tokens(tokenizer: Any, vocab_size: int, count: int) -> list[int]:
    """The same tokens every time: prose, or random ids where there is no tokenizer."""
    if tokenizer is None:
        generator = random.Random(0)
        return [generator.randrange(vocab_size) for _ in range(count)]
    tokens: list[int] = list(tokenizer.encode(shuffled_prose(0, PROSE_SENTENCES)))
    return (tokens * (count // len(tokens) + 1))[:count]
