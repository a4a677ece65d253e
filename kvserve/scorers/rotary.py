"""What the prompt's queries look like before RoPE, and where RoPE will turn the next ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding of the first 2 * len(inverse_frequencies) channels; the others are left alone.

    Attributes:
        inverse_frequencies: float [rotary_dim / 2]; radians per position, with any long-context scaling applied.
        interleaved: channels (2i, 2i + 1) turn together (GPT-J); False: (i, i + rotary_dim / 2) (GPT-NeoX, Llama).
    """

    inverse_frequencies: torch.Tensor
    interleaved: bool = False

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn row i of x [..., rows, head_dim] to positions[i] (int [rows]); negated positions turn back."""
        angles = self._angles(positions)
        return self._turn(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    def mean_rotation(self, first: int | torch.Tensor, count: int, head_dim: int) -> torch.Tensor:
        """Mean of the rotation matrices of positions [first, first + count), float32 [head_dim, head_dim]."""
        frequencies = self.inverse_frequencies
        angles = self._angles(first + torch.arange(count, device=frequencies.device))
        columns = torch.eye(head_dim, dtype=torch.float64, device=frequencies.device)
        return self._turn(columns, angles.cos().mean(0), angles.sin().mean(0)).T.float()

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.double()[:, None] * self.inverse_frequencies.double()

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = self.inverse_frequencies.shape[0]
        first = slice(0, 2 * half, 2) if self.interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if self.interleaved else slice(half, 2 * half)
        turned = x.clone()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., second] * cos + x[..., first] * sin
        return turned


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """The same embedding as a model applies it: by tables of its own precision, with whatever factor it gives them.

    Attributes:
        angles: float32 [2 (cosines, sines), rotary_dim / 2, positions].
        interleaved: as of `Rotary`.
    """

    angles: torch.Tensor
    interleaved: bool = False

    def turn_back(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What row i of rows [..., rows, head_dim] was before the embedding turned it to positions[i]; float32."""
        return self._turned(rows, positions, exactly=True)

    def gradient_before(self, gradients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Gradients with respect to rows before the embedding, from those behind it; shapes as of `turn_back`."""
        return self._turned(gradients, positions, exactly=False)

    def _turned(self, rows: torch.Tensor, positions: torch.Tensor, exactly: bool) -> torch.Tensor:
        """The transposed map, or with `exactly` the inverse one: they differ where it stretches rows."""
        cosine, sine = self.angles[:, :, positions].mT
        half = self.angles.shape[1]
        first = slice(0, 2 * half, 2) if self.interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if self.interleaved else slice(half, 2 * half)
        stretch = cosine.square() + sine.square() if exactly else torch.ones(())
        turned = rows.float().clone()
        turned[..., first] = (rows[..., first] * cosine + rows[..., second] * sine) / stretch
        turned[..., second] = (rows[..., second] * cosine - rows[..., first] * sine) / stretch
        return turned


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Mean and covariance of a layer's query rows, with RoPE taken back.

    An attention backend sees queries after RoPE only. Turning them back needs nothing but their positions, and what is
    left can be summed over chunks: `merge` of the chunks' statistics is the statistics of all rows.

    Attributes:
        count: rows seen.
        mean: float32 [num_heads, head_dim].
        covariance: float32 [num_heads, head_dim, head_dim], divided by count.
    """

    rotary: Rotary
    count: int
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, queries: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> QueryStatistics:
        """Statistics of queries [num_heads, rows, head_dim] after RoPE at `positions` (int [rows]); rows >= 1."""
        plain = rotary.rotate(queries.float(), -positions)
        mean = plain.mean(1)
        centred = plain - mean[:, None]
        return cls(rotary, plain.shape[1], mean, centred.mT @ centred / plain.shape[1])

    def of_heads(self, heads: slice) -> QueryStatistics:
        """Those of some query heads."""
        return replace(self, mean=self.mean[heads], covariance=self.covariance[heads])

    def merge(self, other: QueryStatistics) -> QueryStatistics:
        """Statistics of the rows of both, without the cancellation of summed squares (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        share = other.count / count
        shift = other.mean - self.mean
        between = shift[:, :, None] * shift[:, None, :] * (share * (1 - share))
        covariance = torch.lerp(self.covariance, other.covariance, share) + between
        return QueryStatistics(self.rotary, count, torch.lerp(self.mean, other.mean, share), covariance)
