"""Geometry of the page arena: where every byte of a cached token lies.

One *cell* belongs to (block, kv_head, layer) and is contiguous; vLLM's BHLNC layout puts it at
`block * block_stride + kv_head * head_stride + layer * cell_bytes`. A cell holds `tiles_per_block` sealed pages, or,
where tokens stay dense, `slots_per_cell` dense slots (K row, then V row). A dense page is `tile_tokens` dense slots.

A request's row of blocks, in the order they are allocated (T = tile_tokens):

    | tail_blocks       | tile block 0 | sink_blocks        | tile block 1 | ...
    | dense tokens of   | tiles 0..n-1 | dense tokens       | tiles n..    |
    | the unfinished T  |              | [0, sink_tokens)   |              |

Tail blocks are the request's own. Tile and sink blocks are written once, when a tile is full, and may be shared.
The dense policy has no pages: its tiles are dense slots of one token each, so that it has no tail and no sinks, and
block i holds tokens [i * block_size, (i + 1) * block_size).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil
from typing import TYPE_CHECKING

import torch

from kvserve.codecs.format import SECTION_ALIGN_BYTES, TileFormat
from kvserve.pages.head_dims import check_compressed
from kvserve.pages.page_size import page_size

if TYPE_CHECKING:  # the kernels need no pydantic
    from kvserve.policies.base import Policy


@dataclass(frozen=True)
class PageLayout:
    """Everything a kernel needs to know about a pool, for one head_dim and one policy.

    Attributes:
        head_dim: elements of one K or V row.
        block_size: tokens of one vLLM block.
        dense_dtype: dtype of dense slots.
        tile_format: the bytes of a sealed page; for the dense policy, of one dense slot.
        other_formats: of the tiles of kept pages beside tile_format, which is format 0 (kvserve/pages/kept.py).
        kept_page_bytes: of a kept page, which holds whole tiles of one format; 0 for the dense policy.
        draft_tokens: speculated tokens of a step that may be rejected. They are stored like others; whatever a step may
            have to take back stays in the tail, where the true tokens then overwrite them.
        strip_starts: where the layers of the pool have pages of their own, where each one's cell begins in a strip.
        state_blocks: blocks at the start of a row that hold the request's own state (where prompts are evicted): the
            headers of its kept pages and the queries it remembers.
        query_group: query heads of a KV head whose queries are remembered; 0: none are.
        num_layers: attention layers of the model; may be None where the policy spares none of them.
        least_tail_blocks, least_sink_blocks: what other layers of the pool need, whose cells are smaller.
    """

    policy: Policy
    head_dim: int
    block_size: int
    dense_dtype: torch.dtype
    tile_format: TileFormat
    state_blocks: int = 0
    query_group: int = 0
    num_layers: int | None = None
    least_tail_blocks: int = 0
    least_sink_blocks: int = 0
    other_formats: tuple[TileFormat, ...] = ()
    kept_page_bytes: int = 0
    strip_starts: tuple[int, ...] = ()
    draft_tokens: int = 0

    @classmethod
    def build(
        cls, policy: Policy, head_dim: int, block_size: int, model_dtype: torch.dtype, state_blocks: int | None = None,
        query_group: int = 1, num_layers: int | None = None,
    ) -> PageLayout:  # fmt: skip
        """Lay out the pages of `policy`.

        Args:
            state_blocks: None: as many as the policy needs.
            query_group: query heads that share one KV head; matters where the policy remembers queries.
            num_layers: attention layers of the model; matters where the policy spares layers.

        Raises:
            ValueError: head_dim, block_size or num_layers does not fit the policy; the message names the fix.
        """
        if policy.layers:
            return MixedLayout.of_layers(policy, head_dim, block_size, model_dtype, num_layers)
        if not policy.has_pages:
            if state_blocks:
                raise ValueError(f"the dense policy never evicts: state_blocks must be 0, got {state_blocks}")
            slot = TileFormat.dense(1, head_dim, model_dtype)
            return cls(policy, head_dim, block_size, model_dtype, slot)
        _check_fits(policy, head_dim, block_size, num_layers)
        # A dense slot of a compressed policy is 16-bit: float16 keeps more of a float32 model than bfloat16 would.
        compressed = not policy.is_dense
        dense_dtype = torch.float16 if compressed and model_dtype == torch.float32 else model_dtype
        first, *others = _formats(policy, head_dim, dense_dtype)
        page_bytes = page_size((first.tile_bytes, *(other.tile_bytes for other in others))).page_bytes
        layout = cls(
            policy, head_dim, block_size, dense_dtype, first, state_blocks or 0, num_layers=num_layers,
            other_formats=tuple(others), kept_page_bytes=page_bytes,
        )  # fmt: skip
        if others and num_layers and not layout.pages_per_strip(num_layers):
            raise ValueError(
                f"kept pages of {page_bytes} bytes do not fit in the {num_layers * layout.cell_bytes} bytes that a "
                "block has for each KV head; choose a larger --block-size"
            )
        if policy.eviction is None or state_blocks is not None:
            return layout
        layout = replace(layout, state_blocks=1, query_group=query_group if policy.eviction.remembers_queries else 0)
        if not layout.query_group:
            return layout
        return replace(layout, state_blocks=ceil(policy.eviction.window / layout.queries_per_cell))

    @property
    def has_pages(self) -> bool:
        """Whether tokens become pages; False for the dense policy, whose blocks are vLLM's own."""
        return self.policy.has_pages

    @property
    def is_uniform(self) -> bool:
        """Whether all layers of the pool have the same pages."""
        return True

    def of_layer(self, index: int) -> PageLayout:
        """The pages of one layer.

        Raises:
            IndexError: the layers of the pool differ, and it has fewer.
        """
        return self

    def each_layer(self, num_layers: int) -> tuple[PageLayout, ...]:
        """The pages of all layers of a model that has `num_layers`."""
        return (self,) * num_layers

    def cells_of(self, cells: torch.Tensor, layer: int) -> torch.Tensor:
        """The cells of a layer, uint8 [num_blocks, num_kv_heads, ...].

        Args:
            cells: what vLLM gives that layer, uint8 [num_blocks, num_kv_heads, ...].
        """
        return cells

    @property
    def tile_tokens(self) -> int:
        return self.tile_format.tokens

    @property
    def tiles_per_block(self) -> int:
        """Tiles of one cell."""
        return self.block_size // self.tile_tokens

    @property
    def slot_bytes(self) -> int:
        """One dense token of one KV head: its K row and its V row."""
        return 2 * self.head_dim * self.dense_dtype.itemsize

    @property
    def cell_bytes(self) -> int:
        """What one block holds for one KV head of one layer."""
        return self.tiles_per_block * self.tile_format.tile_bytes

    @property
    def slots_per_cell(self) -> int:
        """Dense tokens that fit in one cell."""
        return self.cell_bytes // self.slot_bytes

    @property
    def formats(self) -> tuple[TileFormat, ...]:
        """Of the tiles of kept pages, by number."""
        return (self.tile_format, *self.other_formats)

    def tiles_per_page(self, number: int = 0) -> int:
        """Tiles of format `number` that a kept page holds."""
        return self.kept_page_bytes // self.formats[number].tile_bytes

    def page_tokens(self, number: int = 0) -> int:
        """Tokens of format `number` that a kept page holds."""
        return self.tiles_per_page(number) * self.tile_tokens

    @property
    def chosen_unit(self) -> int:
        """Tokens of one of the pages that a budget divides among heads.

        Where tokens that are not chosen are kept too, whole kept pages; else a tile, also in layers whose kept pages
        hold several.
        """
        return self.page_tokens() if self.other_formats else self.tile_tokens

    def run_pages(self, num_tokens: int, number: int = 0) -> int:
        """Kept pages that so many tokens of one KV head fill in format `number`."""
        return ceil(num_tokens / self.page_tokens(number))

    def pages_per_strip(self, num_layers: int) -> int:
        """Kept pages in the bytes of one (block, KV head), all layers together."""
        return num_layers * self.cell_bytes // self.kept_page_bytes

    @property
    def spared_layers(self) -> tuple[int, ...]:
        """Layers that keep all their tokens, ascending."""
        eviction = self.policy.eviction
        return eviction.spared_layers(self.num_layers) if eviction and self.num_layers else ()

    @property
    def remembered_queries(self) -> int:
        """Query rows that a request remembers: those of the window before its next cut."""
        return self.policy.eviction.window if self.policy.eviction and self.query_group else 0

    @property
    def query_bytes(self) -> int:
        """One remembered query of the heads that share one KV head."""
        return self.query_group * self.head_dim * self.dense_dtype.itemsize

    @property
    def queries_per_cell(self) -> int:
        """Remembered queries that fit in a state cell behind the header of its kept pages."""
        fitting = (self.cell_bytes - SECTION_ALIGN_BYTES) // self.query_bytes
        if fitting < 1:
            raise ValueError(
                f"the {self.query_group} queries of a KV head do not fit in a cell of {self.cell_bytes} bytes; "
                "choose a larger --block-size"
            )
        return fitting

    def query_place(self, index: int) -> tuple[int, int]:
        """(state block, byte offset in its cell) of remembered query row number `index`."""
        block, index = divmod(index, self.queries_per_cell)
        return block, SECTION_ALIGN_BYTES + index * self.query_bytes

    @property
    def rotates(self) -> bool:
        """Whether values are rotated as they are staged, and what is read of them turned back."""
        return self.policy.value is not None and self.policy.value.rotates

    @property
    def saturates(self) -> bool:
        """Whether scales or dense slots are float16, so that rows may lie beyond its range."""
        return self.policy.key is not None or self.dense_dtype == torch.float16

    def with_drafts(self, draft_tokens: int) -> PageLayout:
        """The layout where steps speculate on so many tokens of each request."""
        return replace(self, draft_tokens=draft_tokens) if self.has_pages else self

    @property
    def tail_slots(self) -> int:
        """Dense slots of a request's tail, which the token at position p shares with those at p +- tail_slots.

        A step of d drafts behind c computed tokens may complete a tile and be thrown back into it: the tile's tokens
        before c and the step's own stay apart, at most tile_tokens - 1 + d + 1 in all.
        """
        return self.tile_tokens + self.draft_tokens

    def first_tail_token(self, seq_len: int) -> int:
        """The first token of a request that its tail has to hold: of the unfinished tile once drafts are rejected."""
        return max(seq_len - self.draft_tokens, 0) // self.tile_tokens * self.tile_tokens

    @property
    def tail_blocks(self) -> int:
        """Blocks a request owns for its unfinished tile; a tile of one token is never unfinished."""
        own = 0 if self.tile_tokens == 1 else ceil(self.tail_slots / self.slots_per_cell)
        return max(own, self.least_tail_blocks)

    @property
    def private_blocks(self) -> int:
        """Blocks at the start of a row that no other request shares."""
        return self.state_blocks + self.tail_blocks

    @property
    def sink_blocks(self) -> int:
        """Blocks of dense sink tokens that go with tile block 0."""
        return max(ceil(self.policy.sink_tokens / self.slots_per_cell), self.least_sink_blocks)

    def tile_blocks_for(self, num_tokens: int) -> int:
        """Tile blocks of a sequence with `num_tokens` cached tokens (dense policy: all its blocks)."""
        return ceil(num_tokens // self.tile_tokens / self.tiles_per_block)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks a request holds with `num_tokens` cached tokens, state, tail and sinks included.

        The scheduler calls this ahead of the worker, so it depends on nothing but the policy and the count.
        """
        tiles = self.tile_blocks_for(num_tokens)
        return self.private_blocks + tiles + (self.sink_blocks if tiles else 0)

    def tile_row(self, tile_block: int) -> int:
        """Index in a request's row of its tile block number `tile_block`, as long as it was not evicted."""
        return self.private_blocks + tile_block + (self.sink_blocks if tile_block else 0)

    def bits_per_element(self, number: int = 0) -> float:
        """Bits of a sealed K or V element of format `number`, scales and padding included."""
        return self.formats[number].tile_bytes * 8 / (2 * self.tile_tokens * self.head_dim)


@dataclass(frozen=True)
class MixedLayout(PageLayout):
    """A pool whose layers have different pages.

    vLLM sees equal cells of the layers' mean size. The bytes of a (block, KV head), contiguous over the layers, are
    divided otherwise: layer l has a cell of `layers[l].cell_bytes` behind those of the layers before it. All layers
    read the same row of blocks, so tail and sinks have as many blocks as the layer with the smallest cells needs.

    Attributes:
        layers: the pages of each layer.
    """

    layers: tuple[PageLayout, ...] = ()

    @property
    def is_uniform(self) -> bool:
        return False

    def of_layer(self, index: int) -> PageLayout:
        return self.layers[index]

    def each_layer(self, num_layers: int) -> tuple[PageLayout, ...]:
        assert num_layers == len(self.layers)
        return self.layers

    @classmethod
    def of_layers(
        cls, policy: Policy, head_dim: int, block_size: int, model_dtype: torch.dtype, num_layers: int | None
    ) -> MixedLayout:
        """As PageLayout.build, for a policy that gives layers their own codecs."""
        if num_layers is None:
            raise ValueError(f"policy {policy.name} names layers, so its layout needs num_layers")
        policies = policy.of_layers(num_layers)
        built = [PageLayout.build(layer, head_dim, block_size, model_dtype) for layer in policies]
        tail, sinks = max(layer.tail_blocks for layer in built), max(layer.sink_blocks for layer in built)
        own = PageLayout.build(policy.model_copy(update={"layers": ()}), head_dim, block_size, model_dtype)
        page_bytes = own.kept_page_bytes
        if policy.eviction:  # pages of one size, whichever layer's tiles they hold
            page_bytes = page_size(tuple(sorted({layer.kept_page_bytes for layer in built}))).page_bytes
            built = [replace(layer, kept_page_bytes=page_bytes) for layer in built]
        starts = tuple(accumulate((layer.cell_bytes for layer in built[:-1]), initial=0))
        layers = tuple(
            replace(layer, least_tail_blocks=tail, least_sink_blocks=sinks, strip_starts=starts) for layer in built
        )
        return cls(
            policy, head_dim, block_size, own.dense_dtype, own.tile_format, own.state_blocks, num_layers=num_layers,
            least_tail_blocks=tail, least_sink_blocks=sinks, kept_page_bytes=page_bytes, layers=layers,
        )  # fmt: skip

    @property
    def cell_bytes(self) -> int:
        """The mean, in whole bytes a token and rounded up: what is over stays unused."""
        total = sum(layer.cell_bytes for layer in self.layers)
        return ceil(total / len(self.layers) / self.block_size) * self.block_size

    @property
    def tail_blocks(self) -> int:
        return self.least_tail_blocks

    @property
    def sink_blocks(self) -> int:
        return self.least_sink_blocks

    def with_drafts(self, draft_tokens: int) -> MixedLayout:
        layers = [layer.with_drafts(draft_tokens) for layer in self.layers]
        tail = max(layer.tail_blocks for layer in layers)
        layers = [replace(layer, least_tail_blocks=tail) for layer in layers]
        return replace(self, draft_tokens=draft_tokens, least_tail_blocks=tail, layers=tuple(layers))

    def cells_of(self, cells: torch.Tensor, layer: int) -> torch.Tensor:
        first = cells.storage_offset() - layer * self.cell_bytes
        offset = sum(before.cell_bytes for before in self.layers[:layer])
        shape = (*cells.shape[:2], self.layers[layer].cell_bytes)
        return cells.as_strided(shape, (*cells.stride()[:2], 1), first + offset)

    def bits_per_element(self, number: int = 0) -> float:
        """The mean over the layers."""
        return sum(layer.bits_per_element() for layer in self.layers) / len(self.layers)


def _check_fits(policy: Policy, head_dim: int, block_size: int, num_layers: int | None) -> None:
    if not policy.is_dense:
        check_compressed(head_dim, policy.name, "the model")
    if block_size % policy.tile_tokens:
        raise ValueError(
            f"--block-size must be a multiple of the policy's tile_tokens ({policy.tile_tokens}), got {block_size}"
        )
    if policy.eviction and (policy.eviction.spare_layers or policy.eviction.formats):
        if num_layers is None:
            raise ValueError(f"policy {policy.name} counts layers, so its layout needs num_layers")
        policy.eviction.spared_layers(num_layers)


def _formats(policy: Policy, head_dim: int, dense_dtype: torch.dtype) -> list[TileFormat]:
    """Of the policy's sealed tiles, and those that kept pages may have beside it."""
    tokens, has_mass = policy.tile_tokens, policy.has_mass
    if policy.key is None or policy.value is None:
        return [TileFormat.dense(tokens, head_dim, dense_dtype)]
    others = policy.eviction.retention.formats if policy.eviction else ()
    pairs = [(policy.key, policy.value), *others]
    formats = [TileFormat.of(key, value, tokens, head_dim, has_mass) for key, value in pairs]
    if any(after.tile_bytes >= before.tile_bytes for before, after in pairwise(formats)):
        assert policy.eviction is not None
        raise ValueError(
            f"{policy.eviction.retention.name} needs smaller tiles than the policy's own of {formats[0].tile_bytes} "
            f"bytes, got {', '.join(str(other.tile_bytes) for other in formats[1:])}; choose a codec with fewer bits"
        )
    return formats
