"""RazorAttention's retrieval heads (Tang et al., arXiv 2407.15891, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.calibration.head_scores import HeadScores, Repeats, highest, of_kv_heads
from kvserve.calibration.methods.base import AnyMethod, Table
from kvserve.codecs.layer_tables import KV_HEADS

LEAST_PERIOD = 16
Share = Annotated[float, Field(gt=0, le=1)]


class Razor(AnyMethod):
    """The KV heads that must keep everything: those with the highest echo scores and those with the highest induction
    scores of the model, at least one of each; a KV head has the highest score of its query heads.

    The prompt is `period` random tokens, `repeats` times. The paper has 2500, of which the attention of a head takes
    400 MB in float32; a shorter period finds what a head looks for as well, and fits a context of a few thousand.
    """

    name: Literal["razor"] = "razor"
    period: Annotated[int, Field(ge=LEAST_PERIOD, le=4096)] = 512
    repeats: Annotated[int, Field(ge=2, le=16)] = 4
    echo: Share = 0.01
    induction: Share = 0.14
    paper: ClassVar[str] = "RazorAttention, arXiv 2407.15891"

    def tables(self, head_dim: int) -> tuple[Table, ...]:
        return (
            Table(None, "heads.echo", (KV_HEADS,)),
            Table(None, "heads.induction", (KV_HEADS,)),
            Table(None, "heads.whole", (KV_HEADS,), torch.int8, "flag"),
        )

    def prompt(
        self, vocabulary: Sequence[int], start: Sequence[int], longest: int, seed: int
    ) -> tuple[list[int], Repeats]:
        """Token ids, and where what repeats lies; the period is shorter where the context or the vocabulary is.

        Args:
            vocabulary: ids to draw from, each once in a period.
            start: ids that every text begins with.
            longest: tokens that the model can read.

        Raises:
            ValueError: there is no room for a period of LEAST_PERIOD tokens.
        """
        period = min(self.period, len(vocabulary), (longest - len(start)) // self.repeats)
        if period < LEAST_PERIOD:
            raise ValueError(
                f"{self.repeats} times {LEAST_PERIOD} different tokens do not fit a context of {longest} tokens and a "
                f"vocabulary of {len(vocabulary)}; add --set repeats=2, or choose another policy"
            )
        drawn = torch.randperm(len(vocabulary), generator=torch.Generator().manual_seed(seed))[:period]
        block = [vocabulary[index] for index in drawn.tolist()]
        return [*start, *block * self.repeats], Repeats(len(start), period, self.repeats)

    def choose(self, scores: HeadScores, num_kv_heads: int) -> dict[str, torch.Tensor]:
        """The tables of all layers, [layers, kv_heads], by their names.

        Args:
            scores: [layers, heads].
        """
        echo, induction = (of_kv_heads(part, num_kv_heads) for part in scores)
        whole = highest(echo, self.echo) | highest(induction, self.induction)
        return {"heads.echo": echo, "heads.induction": induction, "heads.whole": whole.to(torch.int8)}
