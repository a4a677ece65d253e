"""Attention that the last query rows pay to each token."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from kvserve.scorers.base import LayerView, Scorer


class WindowAttention(Scorer):
    """Softmax attention of the last `window` query rows, reduced over rows, pooled over tokens, reduced over heads.

    In this order: probability ** exponent; `reduce` over the window's rows; pooling along the tokens, per query head;
    `head_reduce` over the query heads of the KV head (heads: group), or over all query heads of the layer so that its
    KV heads get the same scores (heads: layer). The defaults are SnapKV's. Other methods, as parameters:

    | method                            | window | exponent | reduce | pool   | kernel | heads | keep_window |
    |-----------------------------------|--------|----------|--------|--------|--------|-------|-------------|
    | SnapKV, arXiv 2404.14469          | 32     | 1        | sum    | max    | 7      | group | true        |
    | PyramidKV, arXiv 2406.02069       | 8      | 1        | sum    | max    | 7      | group | true        |
    | Ada-SnapKV, arXiv 2407.11550      | 32     | 1        | sum    | max    | 7      | group | true        |
    | KV-Compress, arXiv 2410.00161     | 8, 32  | 2        | sum    | max    | 7      | group | false       |
    | TOVA, arXiv 2401.06104            | 1      | 1        | any    | none   | -      | layer | false       |
    | kvpress's SnapKV                  | 64     | 1        | mean   | avg    | 5      | group | true        |

    KV-Compress sums over the group; `mean` orders the tokens of all heads and layers the same way.

    With keep_window the window's own tokens are +inf and stay out of the pooling; without it they are scored like any
    other token, by the rows that come after them. Average pooling counts tokens beyond the ends as zeros and divides by
    `kernel` everywhere, max pooling ignores them. If fewer rows were collected than `window`, those are used.
    A query head whose probabilities are NaN counts as one that pays nothing, so that it silences no other head.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"query_window"})
    query_agnostic: ClassVar[bool] = False

    name: Literal["window-attention"] = "window-attention"
    window: Annotated[int, Field(ge=1, le=512)] = 32
    exponent: Literal[1, 2] = 1
    reduce: Literal["mean", "max", "sum"] = "sum"
    pool: Literal["none", "avg", "max"] = "max"
    kernel: Annotated[int, Field(ge=1, le=63)] = 7
    heads: Literal["group", "layer"] = "group"
    head_reduce: Literal["mean", "max"] = "mean"
    keep_window: bool = True

    @model_validator(mode="after")
    def _kernel_has_a_centre(self) -> WindowAttention:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that pooling is centred on its token, got {self.kernel}")
        return self

    def _score(self, view: LayerView) -> torch.Tensor:
        assert view.query_window is not None
        rows = min(self.window, view.query_window.num_rows)
        by_head = view.query_window.attention(rows, self.exponent, "max" if self.reduce == "max" else "sum")
        by_head = by_head.nan_to_num(nan=0.0)
        if self.reduce == "mean":
            by_head = by_head / rows
        # The window is the end of the sequence: zeros there are what pooling sees beyond it.
        own = (view.positions >= view.length - rows) & self.keep_window
        scores = self._reduce_heads(self._pool(by_head.masked_fill(own, 0.0)), view.kv_heads)
        return scores.masked_fill(own, torch.inf)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "none":
            return x
        pooled = functional.max_pool1d if self.pool == "max" else functional.avg_pool1d
        return pooled(x[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def _reduce_heads(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        grouped = x.unflatten(0, (kv_heads if self.heads == "group" else 1, -1))
        reduced = grouped.amax(1) if self.head_reduce == "max" else grouped.mean(1)
        return reduced.expand(kv_heads, -1)
