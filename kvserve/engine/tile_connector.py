"""vLLM's KV connectors over kvserve's pages: they see a row of blocks like any other's.

Seam: `vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1`, and the connectors of
`KVConnectorFactory`. A connector takes block i of a request for its tokens [i * block_size, (i + 1) * block_size). A
row of kvserve's starts with private blocks, which nobody else may read; what follows are tile blocks in the order of
their tokens. So a wrapped connector gets the tile blocks' ids alone, wherever vLLM gives it ids, and no more of them
than are sealed. What it loads are whole tiles, and at least the last token of a request is left to compute.

Two engines read each other's tiles where policy, calibration, model and blocks are the same
(kvserve.connectors.Identity): beside files that lies in a manifest; in a request it goes with the ids of the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from kvserve.connectors import PARAMS_KEY
from kvserve.engine.identity import claim_storage
from kvserve.engine.log import logger
from kvserve.engine.own_requests import is_own
from kvserve.engine.settings import EngineSettings

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
    from vllm.v1.request import Request

NULL_BLOCK = 0  # vLLM's own; its bytes mean nothing
# What has no ids of blocks in it, or ids as the worker's cells have them.
FORWARDED = (
    *("get_mem_pool_context", "bind_connector_metadata", "clear_connector_metadata", "has_connector_metadata"),
    *("register_kv_caches", "set_host_xfer_buffer_ops", "finish_forward", "reset_capture_state"),
    *("handle_preemptions", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"),
    *("get_finished", "get_transfer_results", "get_block_ids_with_load_errors", "shutdown", "get_kv_connector_stats"),
    *("get_kv_connector_kv_cache_events", "get_handshake_metadata", "build_connector_worker_meta"),
    *("bind_kv_cache_manager", "bind_gpu_block_pool", "get_loaded_kv_cache_group_ids"),
    *("get_external_cache_hit_sources", "on_new_request", "update_connector_output", "register_finished_partial_tail"),
    *("take_events", "has_pending_block_frees", "has_pending_push_work", "get_finished_count"),
    *("set_xfer_handshake_metadata", "set_xfer_handshake_metadata_pp_aware", "reset_cache"),
)


class TileConnector(KVConnectorBase_V1):
    """A connector of vLLM's, `INNER`, that moves tiles.

    Attributes:
        inner: that connector.
        identity: what its tiles are those of.
    """

    INNER: ClassVar[str]

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = EngineSettings.from_vllm_config(vllm_config)
        assert settings is not None
        self.layout = settings.layout(vllm_config.model_config.get_head_size())
        self.identity = settings.identity(vllm_config.model_config)
        if role == KVConnectorRole.SCHEDULER:
            claim_storage(vllm_config.kv_transfer_config, self.identity)
        config = copy.copy(vllm_config)
        config.kv_transfer_config = replace(
            vllm_config.kv_transfer_config, kv_connector=self.INNER, kv_connector_module_path=None
        )
        self.inner: KVConnectorBase_V1 = self.inner_class()(config, role, kv_cache_config)

    @classmethod
    def inner_class(cls) -> Any:
        return KVConnectorFactory.get_connector_class_by_name(cls.INNER)

    # -- row order -----------------------------------------------------------------------------------------------

    def tiles(self, row: Sequence[Any]) -> list[Any]:
        """What of a row, of ids or blocks, are tile blocks."""
        assert not self.layout.sink_blocks, "sinks lie between tile blocks; see kvserve.connectors.check_connector"
        return list(row[self.layout.private_blocks :])

    def _of_groups(self, groups: Sequence[Sequence[Any]]) -> tuple[list[Any], ...]:
        assert len(groups) == 1, "layers of another kind have groups of their own; see kvserve.checks.check_hybrid"
        return tuple(self.tiles(row) for row in groups)

    def _new(self, step: SchedulerOutput) -> list[NewRequestData]:
        """Requests that begin, with their tile blocks."""
        return [replace(one, block_ids=self._of_groups(one.block_ids)) for one in step.scheduled_new_reqs]

    def _cached(self, cached: CachedRequestData) -> CachedRequestData:
        """Requests that run on get tile blocks only; those that come back, a new row."""
        resumed, new = cached.resumed_req_ids, zip(cached.req_ids, cached.new_block_ids, strict=True)
        rows = [self._of_groups(ids) if ids and req_id in resumed else ids for req_id, ids in new]
        return replace(cached, new_block_ids=rows)

    # -- scheduler -----------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As many whole tile blocks as the connector has, behind those that are here; a self-test computes its own."""
        if is_own(request.request_id) or self._is_of_others(request):
            return 0, False
        found, is_async = self.inner.get_num_new_matched_tokens(request, num_computed_tokens)
        if found is None:
            return None, is_async
        size = self.layout.block_size
        most = (request.num_tokens - 1) // size * size
        found = min((num_computed_tokens + found) // size * size, most) - num_computed_tokens
        return (found, is_async) if found > 0 else (0, False)

    def _is_of_others(self, request: Request) -> bool:
        """Whether the request names blocks of an engine with other pages; a server refuses it before."""
        try:
            self.identity.check_remote_blocks(request.kv_transfer_params)
        except ValueError as error:
            logger.error("request %s is computed anew: %s", request.request_id, error)
            return True
        return False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The row's tile blocks; of the remote's, as many as are loaded or here."""
        tiles = KVCacheBlocks(self._of_groups(blocks.blocks))
        params = request.kv_transfer_params
        if params and params.get("remote_block_ids") and num_external_tokens:
            count = len(tiles.blocks[0])
            params["remote_block_ids"] = tuple(list(ids[:count]) for ids in params["remote_block_ids"])
        self.inner.update_state_after_alloc(request, tiles, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Of a copy of the step, with tile blocks for rows."""
        new = self._new(scheduler_output)
        state = scheduler_output.kv_connector_block_state
        if state is not None:
            resolve = state.resolve_block_ids
            state = replace(state, resolve_block_ids=lambda req_id: self._of_groups(resolve(req_id)))
        cached = self._cached(scheduler_output.scheduled_cached_reqs)
        return self.inner.build_connector_meta(
            replace(
                scheduler_output, scheduled_new_reqs=new, scheduled_cached_reqs=cached, kv_connector_block_state=state
            )
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The sealed tile blocks, and whose they are."""
        sealed = self.tiles(block_ids)[: request.num_computed_tokens // self.layout.block_size]
        delays, params = self._inner_finished(request, sealed)
        if params and params.get("remote_block_ids"):
            params[PARAMS_KEY] = self.identity._asdict()
        return delays, params

    def _inner_finished(self, request: Request, sealed: list[int]) -> tuple[bool, dict[str, Any] | None]:
        all_groups: Callable[..., Any] | None = getattr(self.inner, "request_finished_all_groups", None)
        if all_groups is not None:
            result: tuple[bool, dict[str, Any] | None] = all_groups(request, (sealed,))
            return result
        return self.inner.request_finished(request, sealed)

    @property
    def requires_kv_delivery(self) -> bool:
        return self.inner.requires_kv_delivery

    # -- worker --------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.inner.start_load_kv(forward_context, **kwargs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.inner.wait_for_layer_load(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self.inner.save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)

    def wait_for_save(self) -> None:
        self.inner.wait_for_save()

    # -- asked of the class --------------------------------------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """None: cells have kvserve's own layout, whose blocks are whole."""
        return None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(cls.inner_class().requires_piecewise_for_cudagraph(extra_config))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return cls.inner_class().build_kv_connector_stats(data)

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> Any:
        return cls.inner_class().build_prom_metrics(*args)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: TileConnector, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    return method


for _name in FORWARDED:
    if _name not in TileConnector.__dict__:
        setattr(TileConnector, _name, _forward(_name))


class ExampleTiles(TileConnector):
    """Files of prompts, on a disk that several engines share.

    vLLM's connector names a file after a prompt's tokens, writes what the first step of a request computes, and expects
    of a row that it has all blocks of the file. So it gets to see requests whose pages are those of their tokens alone,
    saves prompts that one step completes, and loads for requests that have not begun.
    """

    INNER = "ExampleConnector"

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.left_out: set[str] = set()
        self.loaded: set[str] = set()  # by the next step

    def on_new_request(self, request: Request) -> None:
        has_own_pages = request.lora_request is not None or request.cache_salt is not None
        if has_own_pages or request.prompt_token_ids is None or is_own(request.request_id):
            self.left_out.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.request_id in self.left_out or request.num_preemptions:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.loaded.add(request.request_id)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def _new(self, step: SchedulerOutput) -> list[NewRequestData]:
        """Those to save or to load, with the null block where a tile is not sealed yet: nobody reads that."""
        loaded, self.loaded = self.loaded, set()
        new = []
        for one in super()._new(step):
            prompt, scheduled = len(one.prompt_token_ids or ()), step.num_scheduled_tokens[one.req_id]
            is_whole = one.num_computed_tokens + scheduled >= prompt and one.req_id not in self.left_out
            if is_whole or one.req_id in loaded:
                (tiles,) = one.block_ids
                missing = cdiv(prompt, self.layout.block_size) - len(tiles)
                new.append(replace(one, block_ids=(tiles + [NULL_BLOCK] * missing,)))
        return new

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.left_out.discard(request.request_id)
        self.loaded.discard(request.request_id)
        return super().request_finished(request, block_ids)


class OffloadingTiles(TileConnector):
    """Main memory behind a GPU's."""

    INNER = "OffloadingConnector"


class NixlTiles(TileConnector):
    """From engines that read prompts to those that answer."""

    INNER = "NixlConnector"


class NixlPullTiles(TileConnector):
    """As NixlTiles, where vLLM's default is another."""

    INNER = "NixlPullConnector"
