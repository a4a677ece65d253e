"""Named heads keep everything, the others share what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvserve.budgets.base import Bounds, Budget, spread
from kvserve.codecs.tile import TableSpec

WHOLE = "heads.whole"  # the table of a calibration, int8: 1 of heads that keep everything
Index = Annotated[int, Field(ge=0, strict=True)]


class HeadClasses(Budget):
    """Two classes of KV heads, as retrieval heads and the others are (RazorAttention, arXiv 2407.15891, section 3.2).

    The heads `whole`, [layer, kv_head] each, or those that the policy's calibration has found (`calibrated`), keep all
    their tokens, as far as the total goes; the others share the rest evenly. Where the total is too small, the others
    have the minimum and the named heads give back evenly.
    """

    reads: ClassVar[Literal["shape", "layer", "sequence"]] = "shape"
    names_heads: ClassVar[bool] = True

    name: Literal["head-classes"] = "head-classes"
    whole: tuple[tuple[Index, Index], ...] | Literal["calibrated"] = ()

    def tables(self) -> dict[str, TableSpec]:
        return {WHOLE: TableSpec("whole", ("kv_heads",), torch.int8)} if self.whole == "calibrated" else {}

    def calibrated(self, tables: Mapping[str, torch.Tensor]) -> Budget:
        if self.whole != "calibrated":
            return self
        return self.model_copy(update={"whole": tuple(map(tuple, tables[WHOLE].nonzero().tolist()))})

    @property
    def _named(self) -> tuple[tuple[int, int], ...]:
        if self.whole == "calibrated":
            raise ValueError("eviction.budget.whole is calibrated, and no calibration has been read")
        return self.whole

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        for layer, kv_head in self._named:
            if layer >= num_layers or kv_head >= num_kv_heads:
                raise ValueError(
                    f"eviction.budget.whole names KV head {kv_head} of layer {layer}, the model has the layers 0 to "
                    f"{num_layers - 1} with the KV heads 0 to {num_kv_heads - 1}; leave it out"
                )

    def part(self, layers: Sequence[int], kv_heads: range) -> Budget:
        place = {layer: index for index, layer in enumerate(layers)}
        inside = [(layer, head) for layer, head in self._named if layer in place and head in kv_heads]
        heads = tuple((place[layer], kv_heads.index(head)) for layer, head in inside)
        return self.model_copy(update={"whole": heads})

    def _allocate(self, scores: torch.Tensor, page_tokens: int, bounds: Bounds) -> torch.Tensor:
        self.check(*scores.shape[:2])
        wanted = bounds.low.clone()
        for layer, kv_head in self._named:
            wanted[layer, kv_head] = bounds.high[layer, kv_head]
        return spread(wanted, bounds)
