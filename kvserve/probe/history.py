"""What one attention layer has to answer for one request, computed from the rows that the layer was given.

Nothing here looks at the page arena, at block tables or at positions: a row's position is its place in the order of
arrival. So whatever goes wrong between these rows and the layer's output shows as a difference to `expected`.
"""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from kvserve.attention.base import LayerSpec
from kvserve.attention.logits import capped, softmax
from kvserve.attention.reference import ReferenceAttention
from kvserve.codecs.layer_tables import LayerTables, tables_of_head
from kvserve.codecs.tile import Tables
from kvserve.eviction.observer import Selection
from kvserve.pages.kept import filled_tile
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page, hadamard
from kvserve.retention.base import HeldTokens, Rows


class LayerHistory:
    """All rows of one request in one layer: as they came, and as the policy's codec leaves them.

    Attributes:
        exact: K and V as they came, float32 [kv_heads, tokens, 2, head_dim].
        staged: K and V as dense slots keep them: rounded, V rotated where the policy rotates; the same shape.
        sealed: finished tiles as their pages decode, V rotated; float32 [kv_heads, tiles * tile_tokens, 2, head_dim].
        end: tokens between the sinks and it are kept in part; 0: the request was not cut.
        kept: per KV head, what it keeps of them as kept pages decode, float32 [num_kept, 2, head_dim], V rotated.
        kept_exact: per KV head, what it would keep of rows as they came; the same shape, V not rotated.
        log_mass, exact_mass: per KV head, their log-masses, float32 [num_kept].
        kept_positions: per KV head, where those come from, int64 [num_kept].
    """

    def __init__(self, layout: PageLayout, spec: LayerSpec, tables: LayerTables | None = None) -> None:
        self.layout, self.spec = layout, spec.on(torch.device("cpu"))
        self._reference = ReferenceAttention(layout, self.spec, tables)  # for its rounding and its tables alone
        self.exact = torch.zeros(spec.num_kv_heads, 0, 2, layout.head_dim)
        self.staged, self.sealed = self.exact, self.exact
        self.end = 0
        self._forget_cuts()

    @property
    def num_tokens(self) -> int:
        return self.exact.shape[1]

    def restart(self, num_tokens: int) -> None:
        """Begin another request, whose first tokens are the last one's; it is not cut yet.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"a request begins with {num_tokens} tokens in its cache, {self.num_tokens} were seen")
        self._forget_cuts()
        self.reject(num_tokens)

    def reject(self, num_tokens: int) -> None:
        """Forget the newest tokens but the first `num_tokens`: they were drafts."""
        assert self.end <= num_tokens <= self.num_tokens
        self.exact, self.staged = self.exact[:, :num_tokens], self.staged[:, :num_tokens]
        self.sealed = self.sealed[:, : num_tokens // self.layout.tile_tokens * self.layout.tile_tokens]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take in the rows of a step, [tokens, kv_heads, head_dim] each."""
        key, value = key.detach().cpu(), value.detach().cpu()
        rows = torch.stack([key.float(), value.float()], 2).transpose(0, 1)
        self.exact = torch.cat([self.exact, rows], 1)
        self.staged = torch.cat([self.staged, self._reference.stage(key, value).transpose(0, 1)], 1)
        size = self.layout.tile_tokens
        if self.layout.tile_format.dense_dtype is not None:  # its pages are rows as they are staged
            self.sealed = self.staged[:, : self.num_tokens // size * size]
            return
        for first in range(self.sealed.shape[1], self.num_tokens // size * size, size):
            tiles = self.staged[:, first : first + size]
            heads = [self._coded_tile(tile, first, self._tables(head)) for head, tile in enumerate(tiles)]
            self.sealed = torch.cat([self.sealed, torch.stack(heads)], 1)

    def _coded_tile(self, rows: torch.Tensor, first: int, tables: Tables) -> torch.Tensor:
        first_counted = self.layout.policy.sink_tokens if first == 0 else 0
        page = encode_page(rows[:, 0], rows[:, 1], self.layout, first_counted, first, tables)
        return torch.stack(decode_page(page, self.layout, first, tables), 1)

    # -- cuts ------------------------------------------------------------------------------------------------------

    def cut(self, selection: Selection) -> None:
        """Keep what an eviction keeps, by the policy's own retention of this request's rows."""
        held, exact = (
            [rows(head) for head in range(self.spec.num_kv_heads)] for rows in (self._held, self._held_exact)
        )
        positions = [self._held_positions(head) for head in range(self.spec.num_kv_heads)]
        (end,) = {self.num_tokens - len(tokens) + last for tokens, last in zip(positions, selection.ends, strict=True)}
        for head, tokens in enumerate(positions):
            kept, as_came = self._retained(held[head], head, selection), self._retained(exact[head], head, selection)
            rows = torch.stack([kept.keys, self._rotate(kept.values)], 1)
            self.kept[head] = self._coded_again(rows, kept.runs or (len(rows),), self._tables(head))
            self.log_mass[head] = _masses(kept)
            self.kept_exact[head] = torch.stack([as_came.keys, as_came.values], 1)
            self.exact_mass[head] = _masses(as_came)
            self.kept_positions[head] = tokens[kept.sources + selection.first]
        self.end = end

    def _retained(self, held: tuple[torch.Tensor, torch.Tensor], head: int, selection: Selection) -> Rows:
        """What the retention makes of the rows and log-masses that a KV head holds, V not rotated."""
        eviction, span = self.layout.policy.eviction, slice(selection.first, selection.ends[head])
        assert eviction is not None
        (keys, values), mass = held[0][span].unbind(1), held[1][span]
        kept: Rows = eviction.retention.keep(
            HeldTokens(keys, values, selection.scores[head].cpu(), mass), selection.chosen[head].cpu()
        )
        return kept

    def _held(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a KV head holds as it is read, V turned back, and log-masses.

        Sinks, kept tokens, tokens from `end` on.
        """
        sinks = min(self.layout.policy.sink_tokens, self.num_tokens)
        sealed = self.sealed.shape[1]
        later = torch.cat([self.sealed[head, self.end :], self.staged[head, max(sealed, self.end) :]])
        if not self.end:
            later[:sinks] = self.staged[head, :sinks]
            rows = later
        else:
            rows = torch.cat([self.staged[head, :sinks], self.kept[head], later])
        return torch.stack([rows[:, 0], self._rotate(rows[:, 1])], 1), self._held_masses(self.log_mass[head])

    def _held_exact(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of rows as they came."""
        rows = self.exact[head]
        if self.end:
            rows = torch.cat([rows[: self.layout.policy.sink_tokens], self.kept_exact[head], rows[self.end :]])
        return rows, self._held_masses(self.exact_mass[head])

    def _held_masses(self, kept: torch.Tensor) -> torch.Tensor:
        """Log-masses of all tokens that a head holds; `kept`: of those that it keeps."""
        if not self.end:
            return torch.zeros(self.num_tokens)
        return torch.cat([torch.zeros(self.layout.policy.sink_tokens), kept, torch.zeros(self.num_tokens - self.end)])

    def _held_positions(self, head: int) -> torch.Tensor:
        tokens = torch.arange(self.num_tokens)
        if not self.end:
            return tokens
        return torch.cat([tokens[: self.layout.policy.sink_tokens], self.kept_positions[head], tokens[self.end :]])

    def _coded_again(self, rows: torch.Tensor, runs: tuple[int, ...], tables: Tables) -> torch.Tensor:
        """Rows as they come back from kept pages: of each run tiles, the last one filled with its last token."""
        parts = [rows[:0]]
        for run, tile_format in zip(rows.split(list(runs)), self.layout.formats, strict=False):
            for tile in run.split(self.layout.tile_tokens) if len(run) else ():
                data = tile_format.encode_tile(*filled_tile(tile, self.layout.tile_tokens), tables)
                parts.append(torch.stack(tile_format.decode_tile(data, tables=tables), 1)[: len(tile)])
        return torch.cat(parts)

    def _forget_cuts(self) -> None:
        heads = range(self.spec.num_kv_heads)
        self.end = 0
        self.kept = [torch.zeros(0, 2, self.layout.head_dim) for _ in heads]
        self.kept_exact = list(self.kept)
        self.log_mass = [torch.zeros(0) for _ in heads]
        self.exact_mass = list(self.log_mass)
        self.kept_positions = [torch.zeros(0, dtype=torch.int64) for _ in heads]

    # -- answers ---------------------------------------------------------------------------------------------------

    def expected(self, query: torch.Tensor) -> torch.Tensor:
        """What the policy's cache must answer to the newest tokens' queries.

        Args:
            query: [rows, heads, head_dim] of the last `rows` tokens.

        Returns:
            float32 of the same shape.
        """
        tile_tokens, sinks = self.layout.tile_tokens, self.layout.policy.sink_tokens
        is_seen, tokens = self._seen_since_cut(len(query))
        is_sealed = (tokens < self._positions(len(query)) // tile_tokens * tile_tokens) & (tokens >= sinks)
        sealed = self.sealed.shape[1]
        rows = torch.cat([self._padded(self.kept), self.sealed, self.staged], 1)
        masks = [self._kept_mask(len(query)), (is_seen & is_sealed)[:, :sealed], is_seen & ~is_sealed]
        return self._rotate(self._attend(query, rows, masks, self._padded(self.log_mass)))

    def uncoded(self, query: torch.Tensor) -> torch.Tensor:
        """The answer from the tokens that the policy holds, each as it came, or as it came to be from such tokens."""
        is_seen, _ = self._seen_since_cut(len(query))
        rows, masks = torch.cat([self._padded(self.kept_exact), self.exact], 1), [self._kept_mask(len(query)), is_seen]
        return self._attend(query, rows, masks, self._padded(self.exact_mass))

    def dense(self, query: torch.Tensor) -> torch.Tensor:
        """The answer of a cache that keeps every token as it came."""
        return self._attend(query, self.exact, [self._seen(len(query))[0]])

    def _positions(self, rows: int) -> torch.Tensor:
        return torch.arange(self.num_tokens - rows, self.num_tokens)[:, None]

    def _seen(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens a query sees, bool [rows, tokens], and the tokens' positions."""
        positions, tokens = self._positions(rows), torch.arange(self.num_tokens)
        is_seen = tokens <= positions
        if self.spec.sliding_window is not None:
            is_seen &= tokens > positions - self.spec.sliding_window
        return is_seen, tokens

    def _seen_since_cut(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        is_seen, tokens = self._seen(rows)
        return is_seen & ((tokens < self.layout.policy.sink_tokens) | (tokens >= self.end)), tokens

    @staticmethod
    def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True)

    def _kept_mask(self, rows: int) -> torch.Tensor:
        """Bool [kv_heads, rows, most kept tokens]: which columns of the padded kept rows a head has."""
        counts = torch.tensor([len(kept) for kept in self.kept])
        has = torch.arange(int(counts.max())) < counts[:, None]
        return has[:, None].expand(-1, rows, -1)

    def _attend(
        self, query: torch.Tensor, rows: torch.Tensor, masks: list[torch.Tensor], log_mass: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Softmax attention to rows [kv_heads, n, 2, head_dim] where the masks, put together, allow it.

        Args:
            log_mass: float32 [kv_heads, at most n], of the first rows; the others, or all, have none.
        """
        heads = self.spec.num_kv_heads
        mask = torch.cat([m.expand(heads, *m.shape[-2:]) for m in masks], -1)[:, None]
        grouped = query.detach().cpu().float().unflatten(1, (heads, self.spec.group)).permute(1, 2, 0, 3)
        scores = capped(grouped @ rows[:, None, :, 0].transpose(-1, -2) * self.spec.scale, self.spec.soft_cap)
        if log_mass is not None:
            scores[..., : log_mass.shape[1]] += log_mass[:, None, None]
        sinks = self.spec.sinks_by_group()
        weights, _ = softmax(scores.masked_fill(~mask, -torch.inf), None if sinks is None else sinks[..., None])
        return (weights @ rows[:, None, :, 1]).permute(2, 0, 1, 3).flatten(1, 2)

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ hadamard(self.layout.head_dim) if self.layout.rotates else rows

    def _tables(self, head: int) -> Tables:
        """What a KV head has of the layer's tables."""
        tile_format, tables = self.layout.tile_format, self._reference.tables
        return tables_of_head(tables, tile_format, head) if tables else {}


def _masses(rows: Rows) -> torch.Tensor:
    return torch.zeros(len(rows.keys)) if rows.log_mass is None else rows.log_mass
