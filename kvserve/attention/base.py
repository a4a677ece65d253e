"""What an attention kernel of kvserve is: it stores new tokens into the arena and attends to what is stored.

One step of one layer is `forward`; csrc/kvserve.h states its four parts and what each query sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch

from kvserve.codecs.layer_tables import LayerTables, check_tables
from kvserve.pages.kept import NOT_KEPT, Kept, KeptRows, KeptTable
from kvserve.pages.layout import PageLayout

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM_MULTIPLE = 16
Power = Literal[1, 2]
Reduction = Literal["sum", "max"]


@dataclass(frozen=True)
class LayerSpec:
    """The attention layer, as opposed to the pool it reads.

    Attributes:
        scale: factor of the query-key dot products.
        sliding_window: a query at position p sees tokens t > p - sliding_window; None: all t <= p.
        first_head: index of the first KV head among those of all tensor-parallel ranks.
        soft_cap: a logit s = scale * q . k counts as soft_cap * tanh(s / soft_cap), before masks and log-masses.
        sink_logits: learned sinks, float32 [num_heads], contiguous, on the device of the cells: one more logit of each
            query head, neither scaled nor capped, whose token does not exist. It has its share of the softmax, and so
            of the LSE; what tokens receive sums to less than 1.
    """

    num_heads: int
    num_kv_heads: int
    scale: float
    sliding_window: int | None = None
    first_head: int = 0
    soft_cap: float | None = None
    sink_logits: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def sinks_by_group(self) -> torch.Tensor | None:
        """The learned sinks, float32 [num_kv_heads, group]."""
        return None if self.sink_logits is None else self.sink_logits.view(self.num_kv_heads, self.group)

    def on(self, device: torch.device) -> LayerSpec:
        """The same layer for cells on another device."""
        return self if self.sink_logits is None else replace(self, sink_logits=self.sink_logits.to(device))


@dataclass
class Batch:
    """The requests of one step.

    Attributes:
        query_start_loc: int32 [num_reqs + 1]; request r has the query rows [r, r + 1) of it.
        seq_lens: int32 [num_reqs]; tokens of the request, this step's included.
        block_table: int32 [num_reqs, >= blocks]; rows may lie apart, each row is contiguous.
        kept: of the evicted requests among them; None: there are none. Only for layers that can evict: sealed pages and
            no sliding window.
        max_query_len: at least the longest query. None: read from query_start_loc, which waits for a GPU.
        native: what a kernel made of the tensors above; they must not be replaced once it is set.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    kept: KeptTable | None = None
    max_query_len: int | None = None
    native: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def num_reqs(self) -> int:
        return self.seq_lens.shape[0]


class NewRows(NamedTuple):
    """What the model gives one layer in a step; float32, float16 or bfloat16.

    Attributes:
        query: [num_tokens, num_heads, head_dim].
        key, value: [num_tokens, num_kv_heads, head_dim].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Answers(NamedTuple):
    """Where attention writes.

    Attributes:
        output: [num_tokens, num_heads, head_dim], a dtype as of the query.
        lse: float32 [num_tokens, num_heads], contiguous: the natural log of the softmax denominator; None: unwanted.
    """

    output: torch.Tensor
    lse: torch.Tensor | None = None


class Stored(NamedTuple):
    """What one request has in one layer's arena.

    Attributes:
        cells: of the layer (PagedAttention).
        block_table_row: int32 [>= blocks], contiguous.
        num_tokens: stored ones; they say which tile is the unfinished one.
        kept: where the request was evicted.
    """

    cells: torch.Tensor
    block_table_row: torch.Tensor
    num_tokens: int
    kept: Kept = NOT_KEPT


class Received(NamedTuple):
    """Where a step adds up the attention that stored tokens receive.

    Attributes:
        power: of each probability.
        sums: by request of the batch, which has one query row: float32 [num_kv_heads, columns], contiguous, added to.
            Columns as of `attention_sums`; there may be more of them than tokens.
    """

    power: Power
    sums: dict[int, torch.Tensor]


class OpenStep(NamedTuple):
    """A step of one layer that has attended and whose tail is not written (`PagedAttention.open`).

    Attributes:
        staged, query: valid until the next call of any layer, unless `copied`.
    """

    cells: torch.Tensor
    batch: Batch
    staged: torch.Tensor
    query: torch.Tensor
    lse: torch.Tensor | None = None
    received: Received | None = None

    def copied(self) -> OpenStep:
        """The same with rows of its own, whatever becomes of the memory they came in."""
        return self._replace(staged=self.staged.clone(), query=self.query.clone())


class PagedAttention(ABC):
    """Attention over one layer's page arena.

    `cells` is the layer's arena, uint8 [num_blocks, num_kv_heads, ...]; a cell (all dims after the second) is
    contiguous, and stride(0) and stride(1) are the block and head strides in bytes.
    """

    def __init__(self, layout: PageLayout, spec: LayerSpec, tables: LayerTables | None = None):
        """Attention of one layer.

        Args:
            tables: of the layer, where its codecs read some.

        Raises:
            ValueError: the kernels do not cover the layout or the layer, or a table is missing.
        """
        if not layout.is_uniform:
            raise ValueError("kernels need the layout of one layer, not of a pool whose layers differ")
        if spec.num_heads % spec.num_kv_heads:
            raise ValueError(f"num_heads {spec.num_heads} is not a multiple of num_kv_heads {spec.num_kv_heads}")
        if layout.head_dim % HEAD_DIM_MULTIPLE:
            raise ValueError(f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, got {layout.head_dim}")
        if spec.sliding_window is not None and spec.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 or None, got {spec.sliding_window}")
        check_logits(spec)
        self.layout = layout
        self.spec = spec
        self.tables = tables or {}
        check_tables(self.tables, layout.tile_format, spec.num_kv_heads)

    def forward(
        self, rows: NewRows, cells: torch.Tensor, batch: Batch, answers: Answers, received: Received | None = None
    ) -> None:
        """Store this step's tokens and attend.

        Args:
            received: asks for the attention that each token receives, summed over the query heads of its KV head.
        """
        self.close(self.open(rows, cells, batch, answers, received))

    def open(
        self, rows: NewRows, cells: torch.Tensor, batch: Batch, answers: Answers, received: Received | None = None
    ) -> OpenStep:
        """The first part of `forward`: seal and attend.

        Until `close`, `attend` answers queries of other layers, too, as if they were this layer's.
        """
        if received:
            self.check_received(received)
            if answers.lse is None:
                lse = torch.empty(rows.query.shape[:2], dtype=torch.float32, device=rows.query.device)
                answers = answers._replace(lse=lse)
        staged = self.stage(rows.key, rows.value)
        self.store_sealed(cells, batch, staged)
        self.attend(rows.query, cells, batch, staged, answers)
        return OpenStep(cells, batch, staged, rows.query, answers.lse, received)

    def close(self, step: OpenStep) -> None:
        """The second part of `forward`: write the tail, which takes the place of rows that `attend` reads."""
        self.store_tail(step.cells, step.batch, step.staged)
        if step.received:
            assert step.lse is not None
            self.add_received(step.query, step.cells, step.batch, step.staged, step.lse, step.received)

    def add_received(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        batch: Batch,
        staged: torch.Tensor,
        lse: torch.Tensor,
        received: Received,
    ) -> None:
        """What `forward` adds to `received`, here from keys as they are stored after the step.

        Args:
            staged: as `stage` returned it; lse: of this step, as `attend` wrote it.
        """
        for request, sums in received.sums.items():
            row = int(batch.query_start_loc[request])
            kept = batch.kept.of_request(request) if batch.kept else NOT_KEPT
            stored = Stored(cells, batch.block_table[request], int(batch.seq_lens[request]), kept)
            paid = self.attention_sums(query[row : row + 1], stored, received.power)
            sums[:, : paid.shape[1]] += paid.unflatten(0, (self.spec.num_kv_heads, -1)).sum(1)

    def store(self, key: torch.Tensor, value: torch.Tensor, cells: torch.Tensor, batch: Batch) -> None:
        """Store this step's tokens without attending."""
        staged = self.stage(key, value)
        self.store_sealed(cells, batch, staged)
        self.store_tail(cells, batch, staged)

    @abstractmethod
    def stage(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """New rows as the arena will keep them, float32 [num_tokens, num_kv_heads, 2 (K, V), head_dim].

        Rounded to the dense dtype; V is rotated first where the policy rotates. Valid until the next call.
        """

    @abstractmethod
    def store_sealed(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        """Seal every tile completed by this step (dense policy: write the new tokens to their slots)."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, cells: torch.Tensor, batch: Batch, staged: torch.Tensor, answers: Answers
    ) -> None:
        """Attention of this step's queries, [num_tokens, num_heads, head_dim]."""

    @abstractmethod
    def store_tail(self, cells: torch.Tensor, batch: Batch, staged: torch.Tensor) -> None:
        """Write the new tokens of the unfinished tile to the tail slots (dense policy: nothing)."""

    @abstractmethod
    def read(
        self, stored: Stored, first: int, last: int, with_values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is stored of the tokens [first, last) of one request; not for the dense policy.

        Of an evicted request, only sinks and tokens from its `Kept.end` on are there to be read.

        Args:
            with_values: False: only keys are read, which costs half.

        Returns:
            key and value, float32 [num_kv_heads, last - first, head_dim], the value as the model made it (or None).
        """

    @abstractmethod
    def read_kept(self, cells: torch.Tensor, state_block: int, kept: Kept) -> KeptRows:
        """What an evicted request keeps in this layer; log-masses where its pages have them."""

    @abstractmethod
    def write_kept(
        self,
        cells: torch.Tensor,
        state_block: int,
        kept: Kept,
        first_pages: Sequence[int],
        rows: KeptRows,
    ) -> None:
        """Write what one evicted request keeps in this layer: its kept pages and headers.

        Args:
            state_block: id of the first block of the request's row.
            kept: where the request is cut, and the blocks to write.
            first_pages: per KV head, its first kept page.
            rows: as `read` and `read_kept` give them. Without log-masses every token stands for itself.

        Raises:
            ValueError: the pages do not fit into the kept blocks, the shapes do not fit the layer, or its pages have no
                log-masses.
        """

    @abstractmethod
    def attention_sums(
        self, query: torch.Tensor, stored: Stored, power: Power = 1, reduce: Reduction = "sum"
    ) -> torch.Tensor:
        """How much attention the newest tokens of one request pay to each token it holds, from stored keys alone.

        Args:
            query: [rows, num_heads, head_dim], float32, float16 or bfloat16: the query rows of the last `rows` of the
                stored tokens. Row i sees the tokens up to its own, and its probabilities sum to 1, or less
                where there are learned sinks.
            stored: if the request was evicted, the rows stand at kept.end or later.
            power: of each probability, before the reduction.
            reduce: over the rows.

        Returns:
            float32 [num_heads, n]: for whole requests n is num_tokens. The heads of an evicted one have
            `held_tokens` columns (kvserve/pages/kept.py): sinks, kept tokens, tokens from kept.end on; zeros behind.

        However many rows there are, the native kernel holds at most 2**20 logits at a time, or those of one row where
        they are more (rounded up to 6 heads): with the rows they belong to, about 8 MiB of scratch.

        Raises:
            TypeError, ValueError: the rows do not fit the layer or the request, or the layer has a sliding window.
        """

    def check_received(self, received: Received) -> None:
        """Reject sums that kernels cannot add to."""
        for table in received.sums.values():
            if table.dtype != torch.float32 or table.shape[0] != self.spec.num_kv_heads or not table.is_contiguous():
                raise ValueError(
                    f"received.sums must be contiguous float32 [{self.spec.num_kv_heads}, columns], "
                    f"got {table.dtype} {list(table.shape)}"
                )

    def check_kept(self, batch: Batch) -> None:
        """Reject evicted requests in a layer that cannot have them."""
        if batch.kept is not None and (self.layout.state_blocks == 0 or self.spec.sliding_window is not None):
            raise ValueError("evicted requests need a layout with state_blocks and a layer without sliding window")

    def check_span(self, stored: Stored, first: int, last: int) -> None:
        """Reject tokens that `read` cannot give."""
        check_row(stored.block_table_row)
        if not self.layout.has_pages:
            raise ValueError("read needs a policy with pages: the dense policy keeps none")
        if not 0 <= first <= last <= stored.num_tokens:
            raise ValueError(f"tokens [{first}, {last}) are not among the {stored.num_tokens} stored ones")

    def check_sums(self, query: torch.Tensor, stored: Stored, power: int, reduce: str) -> None:
        """Reject what `attention_sums` cannot answer."""
        (_, row, num_tokens, kept) = stored
        check_row(row)
        check_rows("query", query, self.spec.num_heads, self.layout.head_dim)
        if self.spec.sliding_window is not None:
            raise ValueError("attention sums need a layer without sliding window")
        if kept.end and self.layout.state_blocks == 0:
            raise ValueError("evicted requests need a layout with state_blocks")
        if not 1 <= query.shape[0] <= num_tokens - kept.end:
            raise ValueError(
                f"need at least one query row and at most those of the tokens [{kept.end}, {num_tokens}), "
                f"got {query.shape[0]}"
            )
        if power not in get_args(Power) or reduce not in get_args(Reduction):
            raise ValueError(f"power must be 1 or 2 and reduce sum or max, got {power} and {reduce}")

    def check_kept_rows(self, rows: KeptRows) -> Sequence[tuple[int, ...]]:
        """Kept tokens of each KV head's runs; rejects what is not float32 [num_kept, head_dim]."""
        heads = self.spec.num_kv_heads
        for part in (rows.keys, rows.values, *([] if rows.log_mass is None else [rows.log_mass])):
            if len(part) != heads:
                raise ValueError(f"need rows of {heads} KV heads, got {len(rows.keys)} and {len(part)}")
        for row in (*rows.keys, *rows.values):
            if row.dtype != torch.float32 or row.dim() != 2 or row.shape[1] != self.layout.head_dim:
                raise ValueError(
                    f"kept rows must be float32 [tokens, {self.layout.head_dim}], got {row.dtype} {list(row.shape)}"
                )
        counts = [len(row) for row in rows.keys]
        if counts != [len(row) for row in rows.values]:
            raise ValueError(f"keys and values differ in tokens: {counts} and {[len(row) for row in rows.values]}")
        if rows.log_mass is not None:
            self._check_masses(rows.log_mass, counts)
        if rows.runs is None:
            return [(count,) for count in counts]
        if counts != [sum(of_head) for of_head in rows.runs] or max(map(len, rows.runs)) > len(self.layout.formats):
            raise ValueError(
                f"runs must divide the {counts} tokens of each KV head among {len(self.layout.formats)} formats, got "
                f"{list(rows.runs)}"
            )
        return rows.runs

    def _check_masses(self, log_mass: Sequence[torch.Tensor], counts: list[int]) -> None:
        if self.layout.tile_format.mass is None:
            raise ValueError("these pages have no log-masses; choose a retention that has them, for example compensate")
        for mass, count in zip(log_mass, counts, strict=True):
            if mass.dtype != torch.float32 or mass.shape != (count,):
                raise ValueError(f"log-masses must be float32 [{count}], got {mass.dtype} {list(mass.shape)}")


def check_logits(spec: LayerSpec) -> None:
    """Reject a soft-cap or learned sinks that kernels cannot use."""
    if spec.soft_cap is not None and not 0 < spec.soft_cap < float("inf"):
        raise ValueError(f"soft_cap must be positive and finite, or None, got {spec.soft_cap}")
    sinks = spec.sink_logits
    if sinks is None:
        return
    if sinks.dtype != torch.float32 or sinks.shape != (spec.num_heads,) or not sinks.is_contiguous():
        raise ValueError(
            f"sink_logits must be contiguous float32 [{spec.num_heads}], got {sinks.dtype} {list(sinks.shape)}"
        )


def check_rows(name: str, rows: torch.Tensor, num_heads: int, head_dim: int) -> None:
    """Reject a [tokens, heads, head_dim] tensor that the kernels cannot read.

    Raises:
        TypeError, ValueError: the message names the tensor and what it must be.
    """
    if rows.dtype not in ROW_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {rows.dtype}")
    if rows.dim() != 3 or rows.shape[1:] != (num_heads, head_dim):
        raise ValueError(f"{name} must be [tokens, {num_heads}, {head_dim}], got {list(rows.shape)}")
    if rows.stride(2) != 1:
        raise ValueError(f"{name} must be contiguous in its last dim, got strides {rows.stride()}")


def check_lse(lse: torch.Tensor | None) -> None:
    """Reject an `lse` that the kernels cannot write; None asks for none."""
    if lse is not None and (lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise TypeError(f"lse must be contiguous float32, got {lse.dtype} with strides {lse.stride()}")


def check_batch(batch: Batch) -> None:
    """Reject tables that are not int32 with contiguous rows."""
    for name in ("query_start_loc", "seq_lens", "block_table"):
        table = getattr(batch, name)
        if table.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {table.dtype}")
        if table.shape[-1] > 1 and table.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {table.stride()}")
    if batch.query_start_loc.shape[0] != batch.num_reqs + 1 or batch.block_table.shape[0] < batch.num_reqs:
        raise ValueError(
            f"{batch.num_reqs} seq_lens need {batch.num_reqs + 1} query_start_loc entries and a block_table row each, "
            f"got {list(batch.query_start_loc.shape)} and {list(batch.block_table.shape)}"
        )
    if batch.kept is not None:
        check_kept_table(batch.kept, batch.num_reqs)


def check_width(batch: Batch, layout: PageLayout) -> None:
    """Reject a block table on the CPU whose rows end before their request's last block."""
    longest, width = max(batch.seq_lens.tolist(), default=0), batch.block_table.shape[1]
    if longest and layout.blocks_for(longest) > width:
        raise ValueError(
            f"a request of {longest} tokens needs {layout.blocks_for(longest)} entries of block_table, it has {width}"
        )


def check_kept_table(kept: KeptTable, num_reqs: int) -> None:
    """Reject a `Batch.kept` that the kernels cannot read."""
    for name, table in zip(kept._fields, kept, strict=True):
        if table.dtype != torch.int32 or table.dim() != 1 or not table.is_contiguous():
            raise TypeError(f"kept.{name} must be contiguous int32 [n], got {table.dtype} {list(table.shape)}")
    if len(kept.ends) != num_reqs or len(kept.starts) != num_reqs + 1:
        raise ValueError(
            f"kept must have {num_reqs} ends and {num_reqs + 1} starts, got {len(kept.ends)} and {len(kept.starts)}"
        )


def check_row(row: torch.Tensor) -> None:
    """Reject a row of the block table that is not contiguous int32."""
    if row.dtype != torch.int32 or row.dim() != 1 or not row.is_contiguous():
        raise TypeError(f"block_table_row must be contiguous int32 [blocks], got {row.dtype} {list(row.shape)}")


def check_cells(cells: torch.Tensor, layout: PageLayout, num_kv_heads: int) -> None:
    """Reject an arena whose cells are not contiguous bytes of the layout's size."""
    if cells.dtype != torch.uint8:
        raise TypeError(f"cells must be uint8, got {cells.dtype}")
    if cells.dim() < 3 or cells.shape[1] != num_kv_heads or cells.shape[2:].numel() != layout.cell_bytes:
        raise ValueError(
            f"cells must be [num_blocks, {num_kv_heads}, ...] with {layout.cell_bytes} bytes a cell, "
            f"got {list(cells.shape)}"
        )
    expected = 1
    for dim in range(cells.dim() - 1, 1, -1):
        if cells.shape[dim] > 1 and cells.stride(dim) != expected:
            raise ValueError(f"a cell must be contiguous, got shape {list(cells.shape)} strides {cells.stride()}")
        expected *= cells.shape[dim]
