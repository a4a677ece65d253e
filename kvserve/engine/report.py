"""What was asked for and what is in effect, in numbers: the source of the startup table and of the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvserve.accounting.plan import held_blocks
from kvserve.codecs.tile import Half, TileShape
from kvserve.connectors import asked_connector, is_wrapped
from kvserve.engine.self_test import describe as describe_self_test
from kvserve.engine.settings import EngineSettings, num_cached_layers
from kvserve.pages.drafts import DraftGroup, DraftLayers
from kvserve.pages.layout import PageLayout
from kvserve.pages.page_size import PageSize
from kvserve.pages.windows import WindowGroups
from kvserve.policies.limits import request_limit

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvserve.engine.stats import Holding

DENSE_BYTES = 2  # the "dense" cache that ratios compare with is 16-bit


@dataclass(frozen=True)
class EngineReport:
    """Facts about one engine's cache. Bytes and tokens are those of one rank.

    Attributes:
        num_layers: layers with the policy's pages.
        num_blocks: blocks of the pool, vLLM's reserved null block included.
        cells_per_block: layers x KV heads, of the layers with the policy's pages.
        max_model_len: the length at which "effective" figures count tail and sinks.
        num_ranks: workers that share the KV heads (tensor parallel); each has this report's bytes.
        total_layers: of all stages of a pipeline; 0: there is one.
        kernels_asked, kernels: the attention kernels that were asked for, and those in effect.
        self_test: what was asked for and will be done, in words.
        calibration: the one in effect, in words; empty: the policy has none.
        windows: the layers that keep dense tokens in vLLM's window cache; None: there are none.
        drafter: the layers of a draft model; None: there is none.
        drafts: how they share the pool with the policy's pages; None: their blocks are as the model's, or there is no
            draft model.
        in_flight: tokens that are scheduled and not processed yet, at most.
        block_size_asked: of --block-size; None: not given.
        connector: vLLM's name of the KV connector that moves sealed tiles; None: there is none.
    """

    layout: PageLayout
    num_layers: int
    num_kv_heads: int
    num_blocks: int
    max_model_len: int
    num_ranks: int = 1
    kernels_asked: str = "auto"
    kernels: str = "native"
    self_test: str = "off"
    calibration: str = ""
    windows: WindowGroups | None = None
    drafter: DraftLayers | None = None
    drafts: DraftGroup | None = None
    in_flight: int = 0
    total_layers: int = 0
    block_size_asked: int | None = None
    connector: str | None = None

    @classmethod
    def from_vllm_config(cls, config: VllmConfig, settings: EngineSettings, num_engines: int = 1) -> EngineReport:
        """The report of one of `num_engines`, whose blocks vLLM adds up in the API server's configuration."""
        model, num_stages = config.model_config, config.parallel_config.pipeline_parallel_size
        return cls(
            layout=settings.layout(model.get_head_size()),
            num_layers=settings.num_layers or num_cached_layers(model, config.parallel_config),
            num_kv_heads=model.get_num_kv_heads(config.parallel_config),
            num_blocks=(config.cache_config.num_gpu_blocks or 0) // num_engines,
            max_model_len=model.max_model_len,
            num_ranks=config.parallel_config.tensor_parallel_size,
            kernels_asked=settings.kernels_asked,
            kernels=settings.kernels,
            self_test=describe_self_test(config),
            calibration=settings.calibration.describe() if settings.calibration else "",
            windows=settings.window_groups(model.get_head_size()),
            drafter=settings.drafter,
            drafts=settings.drafts,
            in_flight=config.max_in_flight_tokens,
            total_layers=model.get_total_num_hidden_layers() if num_stages > 1 else 0,
            block_size_asked=settings.block_size_asked,
            connector=asked_connector(config.kv_transfer_config) if is_wrapped(config.kv_transfer_config) else None,
        )

    @property
    def cells_per_block(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def total_cells_per_block(self) -> int:
        """Of all workers: KV heads of the model, in all layers."""
        return (self.total_layers or self.num_layers) * self.num_kv_heads * self.num_ranks

    @property
    def block_bytes(self) -> int:
        if self.windows:
            return self.num_kv_heads * self.windows.block_bytes
        if self.drafts:
            return self.drafts.block_bytes
        own = self.cells_per_block * self.layout.cell_bytes
        return own if self.drafter is None else own + self.layout.block_size * self._draft_elements * self._itemsize

    @property
    def _draft_elements(self) -> int:
        """Elements of a token in all layers of the draft model."""
        if self.drafter is None:
            return 0
        return self.drafter.num_layers * self.drafter.num_kv_heads * 2 * self.drafter.head_dim

    @property
    def _itemsize(self) -> int:
        """Bytes of an element of the dense policy."""
        return self.layout.dense_dtype.itemsize

    @property
    def total_block_bytes(self) -> int:
        """Of a block in all workers."""
        return self.block_bytes * self.total_cells_per_block // self.cells_per_block

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def dense_bytes(self, num_tokens: int, window_tokens: int) -> int:
        """Requests in a 16-bit cache: their tokens in full layers, a draft model's too, and what window layers see."""
        cells = num_tokens * self.num_layers + window_tokens * (self.windows.hybrid.num_windows if self.windows else 0)
        own = cells * self.num_kv_heads * 2 * self.layout.head_dim * DENSE_BYTES
        return own + num_tokens * self._draft_elements * DENSE_BYTES

    @property
    def dense_bytes_per_token(self) -> int:
        """A token in a 16-bit cache; where there are window layers, of a request of max_model_len tokens."""
        seen = self.windows.tokens_seen(self.max_model_len) if self.windows else 0
        return self.dense_bytes(self.max_model_len, seen) // self.max_model_len

    @property
    def blocks_per_request(self) -> int:
        """Blocks that a request of max_model_len tokens holds; of window layers as many as vLLM counts."""
        of_windows = self.windows.most_blocks(self.max_model_len, self.in_flight) if self.windows else 0
        return held_blocks(self.layout, self.max_model_len) + of_windows + self._draft_blocks

    @property
    def _draft_blocks(self) -> int:
        """Blocks that a request of max_model_len tokens holds for a draft model's layers alone."""
        return self.drafts.blocks_for(self.max_model_len, self.max_model_len) if self.drafts else 0

    @property
    def effective_bytes_per_token(self) -> float:
        """A token of a request of max_model_len tokens, its tail and sinks counted."""
        return self.blocks_per_request * self.block_bytes / self.max_model_len

    @property
    def dense_capacity_tokens(self) -> int:
        """Tokens that a 16-bit cache of the same bytes would hold."""
        return self.pool_bytes // self.dense_bytes_per_token

    @property
    def effective_capacity_tokens(self) -> int:
        """Tokens that fit, in requests of max_model_len tokens.

        vLLM logs the same figure, unless the policy evicts: vLLM then counts what a prompt takes before that.
        """
        return int(self.num_blocks / self.blocks_per_request * self.max_model_len)

    @property
    def requested_ratio(self) -> float:
        """16 over the bits of a sealed element, times the tokens over the tokens kept; the mean bits of two codecs."""
        eviction, tokens = self.layout.policy.eviction, self.max_model_len
        share = 1.0
        if eviction:
            limit = request_limit(eviction, self.layout.policy, {})
            share = limit.target(tokens) / tokens if limit else 1.0
        kept_bits = share * self.layout.bits_per_element()
        if self.layout.other_formats:
            kept_bits += (1 - share) * self.layout.bits_per_element(1)
        return 8 * DENSE_BYTES / kept_bits

    @property
    def effective_ratio(self) -> float:
        """How many times fewer bytes than a 16-bit cache a request of max_model_len tokens holds."""
        return self.dense_bytes_per_token / self.effective_bytes_per_token

    def pages(self, free_blocks: int, num_running: int, holding: Holding | None = None) -> dict[str, int]:
        """Pages of the pool by state; they add up to the pool without vLLM's null block.

        Blocks of window layers and of a draft model count as dense, with as many pages as one of the others has.

        Args:
            holding: what the running requests hold, where the scheduler says so (policies that evict). Without it,
                every running request is known to hold `private_blocks`, and sinks count as sealed; of window layers and
                of a draft model it is taken to hold what a request of max_model_len tokens does.
        """
        used = max(self.num_blocks - 1 - free_blocks, 0)
        kept = min(holding.kept, used) if holding else 0
        of_windows = self.windows.held_blocks(self.max_model_len) if self.windows else 0
        each = self.layout.private_blocks + of_windows + self._draft_blocks
        dense = holding.dense + holding.window if holding else num_running * each
        dense = min(dense, used - kept) if self.layout.has_pages else used
        blocks = {"free": free_blocks, "dense": dense, "kept": kept, "sealed": used - kept - dense}
        per_block = self.cells_per_block * (self.layout.tiles_per_block if self.layout.has_pages else 1)
        return {state: count * per_block for state, count in blocks.items()}

    def held_ratio(self, holding: Holding) -> float | None:
        """How many times fewer bytes than a 16-bit cache of their tokens running requests hold; None: they hold none.

        Whole blocks count, state, tail and sinks included; a prompt that is not evicted yet counts as it is.
        """
        if not holding.blocks:
            return None
        return self.dense_bytes(holding.tokens, holding.window_tokens) / (holding.blocks * self.block_bytes)

    def table(self) -> str:
        """The startup table."""
        policy, layout = self.layout.policy, self.layout
        table = Table(title=f"policy {policy.name}", show_header=False, title_justify="left")
        rows = [
            ("keys / values", describe_codecs(layout)),
            ("layers", f"{self.num_layers} x {self.num_kv_heads} KV heads x head_dim {layout.head_dim}, "
             f"{describe_layers(layout)}"),
            *([("windows", describe_windows(self.windows, self.num_kv_heads))] if self.windows else []),
            ("kernels", f"{self.kernels_asked} requested, {self.kernels} in effect"),
            ("block size", f"{self.block_size_asked or 'auto'} requested, {layout.block_size} tokens in effect"),
            ("kept dense", describe_dense(layout)),
            *([("calibration", self.calibration)] if self.calibration else []),
            *([("transforms", policy.transforms.describe())] if policy.transforms.of_layer else []),
            ("evicts", describe_eviction(layout)),
            ("what goes", describe_retention(layout)),
            ("bytes per token", f"{self.dense_bytes_per_token:,} in a 16-bit cache, "
             f"{self.effective_bytes_per_token:,.0f} in effect"),
            ("compression", f"{self.requested_ratio:.2f}x requested, {self.effective_ratio:.2f}x in effect "
             f"(requests of {self.max_model_len:,} tokens, tail and sinks counted)"),
            ("capacity", f"{self.pool_bytes / 2**20:,.0f} MiB: {self.dense_capacity_tokens:,} tokens at 16 bits, "
             f"{self.effective_capacity_tokens:,} in effect"),
            ("self-test", self.self_test),
            ("switched off", describe_switched_off(layout)),
            *([("speculation", describe_speculation(layout))] if layout.draft_tokens else []),
            *([("draft model", describe_drafter(self.drafter, self.drafts))] if self.drafter else []),
            *([("connector", describe_connector(self.connector, self.block_bytes, layout))] if self.connector else []),
            ("refused", "--kv-cache-dtype (not proven with this cache)"),
        ]  # fmt: skip
        for row in rows:
            table.add_row(*row)
        console = Console(width=120, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(table)
        return "\n".join(line.rstrip() for line in capture.get().strip().splitlines())


def describe_codecs(layout: PageLayout, number: int = 0) -> str:
    """How sealed K and V are written, in one line; `number`: of the format."""
    key, value = layout.formats[number].key, layout.formats[number].value
    if key is None or value is None:
        dtype = str(layout.dense_dtype).removeprefix("torch.")
        return f"dense{' pages' if layout.has_pages else ''}, {dtype}: {layout.bits_per_element():g} bits per element"
    shapes = {half: TileShape(half, layout.tile_tokens, layout.head_dim) for half in Half}
    return (
        f"K {key.describe(shapes[Half.KEY])}; V {value.describe(shapes[Half.VALUE])}; "
        f"{layout.bits_per_element(number):.2f} bits per element"
        + ("" if layout.is_uniform else " on average over the layers")
    )


def describe_layers(layout: PageLayout) -> str:
    """Which layers have other codecs than the policy's, in one line."""
    if layout.is_uniform:
        return "all the same"
    assert layout.num_layers is not None
    named = sorted(layer.index % layout.num_layers for layer in layout.policy.layers)
    own = (f"layer {index}: {describe_codecs(layout.of_layer(index))}" for index in named)
    return "all the same but " + "; ".join(own)


def describe_windows(groups: WindowGroups, num_kv_heads: int) -> str:
    """The layers that the policy leaves alone, and what their blocks cost, in one line."""
    window, page = groups.hybrid.window, num_kv_heads * groups.page_bytes
    of_full = f", and {groups.full_waste:.1%} of the others'" if groups.full_waste > 0 else ""
    return (
        f"{groups.hybrid.num_windows} more layers keep the last {window:,} tokens, dense: {page:,} bytes for "
        f"{groups.block_size} tokens of each, in {groups.num_groups} groups whose blocks are the pool's; "
        f"{groups.waste:.1%} of their blocks is unused{of_full}"
    )


def describe_eviction(layout: PageLayout) -> str:
    """What is dropped from prompts, in one line."""
    eviction = layout.policy.eviction
    if eviction is None:
        return "nothing"
    share = f"1 of {eviction.rate:g} tokens" if eviction.rate else f"{eviction.max_tokens} tokens"
    schedule = eviction.schedule
    when = f"at every {schedule.chunk_tokens} tokens and at their end" if schedule.chunk_tokens else "at their end"
    later = f", and later ({schedule.name}, every {schedule.interval} tokens)" if schedule.decodes else ""
    spared = ", ".join(map(str, layout.spared_layers))
    how = f"scored by {eviction.scorer.name}, {eviction.budget.name} budget"
    if eviction.formats:
        return f"nothing; divides prompts {when}: {share} a KV head keep their codec, {how}"
    return f"prompts {when}{later}, to {share} a KV head: {how}" + (f"; layers {spared} keep all" if spared else "")


def describe_retention(layout: PageLayout) -> str:
    """What becomes of tokens that are not kept, in one line."""
    eviction = layout.policy.eviction
    if eviction is None:
        return "nothing"
    mass = layout.tile_format.mass is not None
    if layout.other_formats:
        return f"{eviction.retention.name}: the others stay as {describe_codecs(layout, 1)}; {_describe_pages(layout)}"
    if not layout.is_uniform:
        return f"{eviction.retention.name}; {_describe_pages(layout)}"
    return f"{eviction.retention.name}{', with a log-mass beside each token of a page' if mass else ''}"


def _describe_pages(layout: PageLayout) -> str:
    """The kept pages that tiles of several sizes share, and what stays unused of them and of a strip."""
    layers = layout.each_layer(layout.num_layers or 1)
    sizes = sorted({tile_format.tile_bytes for layer in layers for tile_format in layer.formats}, reverse=True)
    page, strip = PageSize.of(layout.kept_page_bytes, sizes), (layout.num_layers or 1) * layout.cell_bytes
    tiles = " or ".join(
        f"{count} of {size} bytes ({waste:.1%} unused)"
        for count, size, waste in zip(page.tiles, sizes, page.waste, strict=True)
    )
    rest = strip % page.page_bytes / strip
    return f"pages of {page.page_bytes} bytes hold tiles, {tiles}, and fill a block but for {rest:.1%}"


def describe_switched_off(layout: PageLayout) -> str:
    """What vLLM does otherwise and this policy does not let it do, in one line."""
    eviction = layout.policy.eviction
    if eviction and eviction.scorer.collects:
        return f"prefix cache hits: {eviction.scorer.name} sums over all queries of a request"
    if eviction and eviction.schedule.chunk_tokens:
        return "prefix cache hits, for prompts that are cut as they arrive"
    return "nothing: prefix caching, chunked prefill and preemption work on compressed pages"


def describe_speculation(layout: PageLayout) -> str:
    """What a step does with drafts, in one line."""
    tail = f"a tail of {layout.tail_slots} slots takes rejected ones back" if layout.has_pages else "none is in a page"
    return f"{layout.draft_tokens} drafts a step; {tail}"


def describe_connector(name: str, block_bytes: int, layout: PageLayout) -> str:
    """What a KV connector moves, in one line."""
    return f"{name} moves sealed tiles: {block_bytes:,} bytes for {layout.block_size} tokens in all layers"


def describe_drafter(layers: DraftLayers, drafts: DraftGroup | None) -> str:
    """The draft model's cache, in one line."""
    shape = f"{layers.num_layers} x {layers.num_kv_heads} KV heads x head_dim {layers.head_dim}, every token dense"
    if drafts is None:
        return f"{shape}, in the blocks of the model's layers"
    return f"{shape}: {drafts.token_bytes:,} bytes a token, blocks of {drafts.block_size} ({drafts.waste:.0%} unused)"


def describe_dense(layout: PageLayout) -> str:
    """Which tokens of a compressed request stay dense."""
    if not layout.has_pages:
        return "every token"
    if layout.policy.dense_pages:
        return f"every token; the unfinished tile of {layout.tile_tokens} tokens in a block of its own"
    dtype = str(layout.dense_dtype).removeprefix("torch.")
    return (
        f"the unfinished tile of {layout.tile_tokens} tokens and the first {layout.policy.sink_tokens}, in {dtype}: "
        f"{layout.tail_blocks} + {layout.sink_blocks} blocks a request"
    )
