"""The newest query rows of a layer, as scorers see them: through the attention that they pay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch


class QueryWindow(ABC):
    """Query rows, after RoPE, of the newest tokens of a view; the last row is the newest token's."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows there are: fewer than a scorer wants, where the sequence is shorter."""

    @abstractmethod
    def attention(self, rows: int, power: Literal[1, 2] = 1, reduce: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """What the last `rows` rows (1 <= rows <= num_rows) pay to each cached token.

        A row sees the cached tokens up to its own position; its probabilities sum to 1, to less in a layer with learned
        sinks, or are 0 if it sees none.

        Returns:
            float32 [num_heads, n]: sum or maximum over the rows of probability ** power.
        """


@dataclass(frozen=True, eq=False)
class PlainWindow(QueryWindow):
    """The definition in plain PyTorch: all probabilities at once.

    Attributes:
        queries: float32 [num_heads, num_rows, head_dim].
        keys: float32 [kv_heads, n, head_dim].
        positions: int64 [n], ascending; the last is the newest token's.
        scale: factor of the query-key dot products.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    scale: float

    @property
    def num_rows(self) -> int:
        return self.queries.shape[1]

    def attention(self, rows: int, power: Literal[1, 2] = 1, reduce: Literal["sum", "max"] = "sum") -> torch.Tensor:
        powers = self.probabilities(rows) ** power
        return powers.amax(1) if reduce == "max" else powers.sum(1)

    def probabilities(self, rows: int) -> torch.Tensor:
        """Float32 [num_heads, rows, n]; zero where a row does not see the token."""
        queries = self.queries[:, self.num_rows - rows :]
        keys = self.keys.repeat_interleave(queries.shape[0] // self.keys.shape[0], 0)
        newest = torch.arange(-rows, 0, device=keys.device) + self.positions[-1] + 1
        hidden = self.positions > newest[:, None]
        logits = (queries @ keys.mT * self.scale).masked_fill(hidden, -torch.inf)
        return logits.softmax(-1).masked_fill(hidden, 0)
