"""What kvserve relies on in vLLM's KV connectors: their schedulers get kvserve's rows through the wrapper, for real."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import worker as offloading_worker
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from kvserve.connectors import PARAMS_KEY, wrapped
from kvserve.engine import settings as engine_settings
from kvserve.engine.tile_connector import NixlTiles, OffloadingTiles, TileConnector
from tests.cases.engine_cases import engine
from tests.cases.tiny_models import make_tiny_model

BLOCK, PROMPT = 64, 300  # four sealed tiles and the start of a fifth


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The configurations of an int8 engine, and the tensors that a connector registers."""
    init_none_hash(sha256)
    folder = make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("llama-gqa-64"))
    with engine(folder, "int8", skip_tokenizer_init=True, kv_cache_memory_bytes=8 << 20) as llm:
        core = llm.llm_engine.engine_core.engine_core
        config, kv_cache_config = llm.llm_engine.vllm_config, core.scheduler.kv_cache_config
        layers = config.compilation_config.static_forward_context
        caches = {name: layer.kv_cache for name, layer in layers.items() if hasattr(layer, "kv_cache")}
        yield SimpleNamespace(config=config, kv_cache_config=kv_cache_config, caches=caches)


def make_manager(served: Any) -> KVCacheManager:
    return KVCacheManager(
        served.kv_cache_config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK,
        enable_caching=True,
    )  # fmt: skip


def with_connector(served: Any, name: str, **extra: Any) -> Any:
    config = copy.copy(served.config)
    asked = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    config.kv_transfer_config = KVTransferConfig(**wrapped(asked))
    return config


def make_request(name: str, params: dict[str, Any] | None = None) -> Request:
    sampling = SamplingParams(max_tokens=8, extra_args={"kv_transfer_params": params} if params else None)
    return Request(
        name, list(range(1, PROMPT + 1)), sampling, None, block_hasher=get_request_block_hasher(BLOCK, sha256)
    )


def admit(connector: TileConnector, manager: KVCacheManager, request: Request) -> SchedulerOutput:
    """As vLLM's scheduler admits a request whose whole prompt fits in a step; returns the step."""
    connector.on_new_request(request)
    found, is_async = connector.get_num_new_matched_tokens(request, 0)
    loads = bool(found and is_async)
    blocks = manager.allocate_slots(
        request, 0 if loads else PROMPT - (found or 0), num_external_computed_tokens=found or 0,
        delay_cache_blocks=loads,
    )  # fmt: skip
    assert blocks is not None
    connector.update_state_after_alloc(request, manager.get_blocks(request.request_id), found or 0)
    step = SchedulerOutput.make_empty()
    if not loads:
        new = NewRequestData.from_request(request, manager.get_block_ids(request.request_id))
        step.scheduled_new_reqs, step.num_scheduled_tokens = [new], {request.request_id: PROMPT}
        request.num_computed_tokens = PROMPT
    return step


def tiles_of(connector: TileConnector, manager: KVCacheManager, request: Request) -> list[int]:
    (row,) = manager.get_block_ids(request.request_id)
    return row[connector.layout.private_blocks :]


def nixl(served: Any) -> NixlTiles:
    """The wrapper around the scheduler's side of NIXL, which needs no network library until it shakes hands."""
    made: Any = object.__new__(NixlTiles)
    config = with_connector(served, "NixlConnector", kv_recompute_threshold=0)
    settings = engine_settings.EngineSettings.from_vllm_config(served.config)
    assert settings is not None
    made.layout = settings.layout(64)
    made.identity = settings.identity(served.config.model_config)
    made.inner = NixlPullConnectorScheduler(config, "engine", served.kv_cache_config)
    made.inner.request_finished_all_groups = made.inner.request_finished  # as NixlConnector has it
    return made


def test_nixl_pulls_the_tiles_of_a_prompt_into_the_tiles_of_a_row(served: Any) -> None:
    here, there = make_manager(served), make_manager(served)
    giver, taker = nixl(served), nixl(served)
    for number in range(3):  # rows of other ids on the two sides
        there.allocate_slots(make_request(f"other {number}"), 65)
    prefilled = make_request("prefilled", {"do_remote_decode": True})
    admit(giver, here, prefilled)
    prefilled.status = RequestStatus.FINISHED_LENGTH_CAPPED
    (row,) = here.get_block_ids("prefilled")
    delays, params = giver.request_finished(prefilled, row)
    sealed = tiles_of(giver, here, prefilled)[: PROMPT // BLOCK]
    assert delays and params is not None and list(params["remote_block_ids"][0]) == sealed
    assert giver.identity.difference(params[PARAMS_KEY]) is None

    decoded = make_request("decoded", params)
    admit(taker, there, decoded)
    _, local, here_already, waits = taker.inner._reqs_need_recv["decoded"]  # type: ignore[attr-defined]
    assert waits and here_already == (0,)
    assert list(local[0]) == tiles_of(taker, there, decoded)
    assert len(local[0]) == len(decoded.kv_transfer_params["remote_block_ids"][0]) == 4


def test_nixl_asks_for_no_tile_that_would_leave_nothing_to_compute(served: Any) -> None:
    taker, manager = nixl(served), make_manager(served)
    params = {
        "do_remote_prefill": True, "remote_block_ids": ([9, 8, 7, 6],), "remote_engine_id": "e", "remote_host": "h",
        "remote_request_id": "r", "remote_port": 1, "tp_size": 1, PARAMS_KEY: taker.identity._asdict(),
    }  # fmt: skip
    request = make_request("short", params)
    request.prompt_token_ids = request.prompt_token_ids[:256]  # type: ignore[index]
    del request._all_token_ids[256:]
    request.num_prompt_tokens = 256
    assert taker.get_num_new_matched_tokens(request, 0) == (192, True)
    manager.allocate_slots(request, 0, num_external_computed_tokens=192, delay_cache_blocks=True)
    taker.update_state_after_alloc(request, manager.get_blocks("short"), 192)
    assert request.kv_transfer_params["remote_block_ids"] == ([9, 8, 7],)


@pytest.fixture
def offloading(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[OffloadingTiles]:
    monkeypatch.setattr(engine_settings, "check_transfer", lambda config: None)  # which refuses it on a CPU
    config = with_connector(served, "OffloadingConnector", cpu_bytes_to_use=64 << 20)
    made = OffloadingTiles(config, KVConnectorRole.SCHEDULER, served.kv_cache_config)
    yield made
    made.shutdown()


def test_offloading_stores_the_sealed_tiles_under_their_hashes(served: Any, offloading: OffloadingTiles) -> None:
    manager = make_manager(served)
    offloading.bind_kv_cache_manager(manager)
    request = make_request("stored")
    meta: Any = offloading.build_connector_meta(admit(offloading, manager, request))
    (job,) = meta.store_jobs.values()
    assert list(job.src_spec.block_ids) == tiles_of(offloading, manager, request)[: PROMPT // BLOCK]


def test_offloading_copies_whole_blocks_of_the_arena(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All KV heads and layers of a block lie together, so one region has them, whatever the order within."""
    monkeypatch.setattr(offloading_worker, "derive_canonical_mappings", lambda *_: {})
    made: Any = object.__new__(offloading_worker.OffloadingConnectorWorker)
    made.vllm_config, made.kv_cache_config = served.config, served.kv_cache_config
    regions: list[Any] = []
    made._init_worker = regions.append
    made.register_kv_caches(served.caches)
    (region,) = regions[0].tensors
    num_blocks = served.kv_cache_config.num_blocks
    arena = next(iter(served.caches.values())).untyped_storage()
    assert region.page_size_bytes * num_blocks <= arena.nbytes() < region.page_size_bytes * (num_blocks + 1)
    before = torch.zeros(0, dtype=torch.uint8).set_(arena)
    region.tensor[3].fill_(7)
    touched = (before.view(-1)[: region.page_size_bytes * num_blocks].view(num_blocks, -1) == 7).all(1)
    assert touched.nonzero().flatten().tolist() == [3]


def test_the_connectors_are_registered_under_these_names(tmp_path: Path) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvserve.connectors import WRAPPERS

    for name, wrapper in WRAPPERS.items():
        config = KVTransferConfig(**wrapped({"kv_connector": name, "kv_role": "kv_both"}))
        assert KVConnectorFactory.get_connector_class(config).__name__ == wrapper
        assert name in KVConnectorFactory._registry
