"""Layers that read the KV cache of an earlier one; beside windows they are tested in test_hybrids.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from kvserve.attention.base import Batch
from kvserve.calibration.artefact import Cache
from kvserve.calibration.methods.skvq import Skvq
from kvserve.checks import ServeOptions, check_hybrid, check_options, check_sharing
from kvserve.engine.builder import StepMetadata
from kvserve.engine.probe_worker import kvserve_layers
from kvserve.engine.row_worker import RowWorker
from kvserve.engine.self_test import EXTENSION_PATH
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import hybrid_of, num_layers_of
from kvserve.pages.windows import Hybrid
from kvserve.policies.loading import load_policy
from tests.cases.engine_cases import engine, generate, prompt_logprobs, random_prompts
from tests.cases.layer_cases import attention_layer, engine_config
from tests.cases.tiny_models import FULL, WINDOW, make_tiny_model
from tests.engine.test_calibrated_engine import INT8, SKVQ, calibration_file, policy_file
from tests.engine.test_hybrids import check_self_test

# Layers 4 and 5 of 6 are read by six more. No request exceeds the windows: all layers have pages.
WIDE: dict[str, Any] = {
    "hf_overrides": {"sliding_window": 2048}, "skip_tokenizer_init": True, "max_num_batched_tokens": 1024,
    "worker_extension_cls": EXTENSION_PATH,
}  # fmt: skip
TARGETS = [None] * 6 + [4, 4, 5, 4, 4, 5]
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("kivi-2bit", {"layers": {"0": "dense", "-1": "int8"}}),
    "h2o": ("h2o", {"eviction.spare_layers": [-1], "eviction.rate": 2}),
    "snapkv": ("snapkv", {"eviction.spare_layers": [0], "eviction.rate": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("gemma3n-shared", tmp_path_factory.mktemp("gemma3n-shared") / "model")


@pytest.mark.parametrize(
    "name", ["layers", pytest.param("h2o", marks=pytest.mark.slow), pytest.param("snapkv", marks=pytest.mark.slow)]
)
def test_layers_are_counted_and_named_without_those_that_share_and_chunks_change_nothing(
    model: Path, name: str
) -> None:
    policy, changes = POLICIES[name]
    prompts = random_prompts([200, 333, 700])
    with engine(model, policy, changes, **WIDE) as llm:
        config = llm.llm_engine.vllm_config
        settings, impls = EngineSettings.from_vllm_config(config), [impl for _, impl in kvserve_layers(config)]
        assert settings is not None and settings.hybrid is None and settings.num_layers == 6
        assert [impl.index for impl in impls] == [i if target is None else target for i, target in enumerate(TARGETS)]
        check_self_test(llm)
        whole = [prompt_logprobs(output) for output in generate(llm, prompts, max_tokens=70)]
    with engine(model, policy, changes, **(WIDE | {"max_num_batched_tokens": 100})) as llm:
        chunks = [prompt_logprobs(output) for output in generate(llm, prompts)]
    for some, all_at_once in zip(chunks, whole, strict=True):
        assert some == pytest.approx(all_at_once, abs=0.02)


def test_layers_that_share_have_the_tables_of_their_target(model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", Skvq(), model, Cache(6, 2, 64))
    policy = policy_file(tmp_path, {**INT8, **SKVQ}, file)
    with engine(model, str(policy), **WIDE) as llm:
        check_self_test(llm)
        impls = [impl for _, impl in kvserve_layers(llm.llm_engine.vllm_config)]
        assert [impl.target and impls.index(impl.target) for impl in impls] == TARGETS
        for impl, target in zip(impls[6:], TARGETS[6:], strict=True):
            own = impl.attention.tables
            assert own and all(torch.equal(own[name], table) for name, table in impls[target].attention.tables.items())
        rows = RowWorker()
        rows.vllm_config = llm.llm_engine.vllm_config
        rows.kvserve_rows_start(str(tmp_path), 200)
        generate(llm, random_prompts([200]), max_tokens=1)
        assert [impl.probe is not None for impl in impls] == [target is None for target in TARGETS]
        assert {impl.probe.num_tokens for impl in impls[:6]} == {200}


# Without an engine


def shared_layers(config: Any, **options: Any) -> list[Any]:
    """A layer, and one with `options` that reads its cache."""
    first = "model.layers.0.attn"
    with set_current_vllm_config(config):
        layers = [attention_layer(config, first)]
        sharer = {"kv_sharing_target_layer_name": first} | options
        return [*layers, attention_layer(config, "model.layers.1.attn", **sharer)]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return engine_config(make_tiny_model("llama-gqa-64", tmp_path), "int8")


def test_a_layer_with_another_window_than_its_target_is_refused(config: Any) -> None:
    with pytest.raises(UnsupportedError, match="sliding_window 96 reads the KV cache of one with sliding_window None"):
        shared_layers(config, per_layer_sliding_window=96)


def test_a_target_that_is_not_there_is_refused(config: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"cache of model\.layers\.7\.attn, which is no layer of kvserve's"):
        shared_layers(config, kv_sharing_target_layer_name="model.layers.7.attn")


def test_a_step_without_the_target_ends_in_an_error(config: Any) -> None:
    _, sharer = shared_layers(config)
    table = torch.zeros(1, 4, dtype=torch.int32)
    step = StepMetadata(1, Batch(torch.tensor([0, 1]), torch.tensor([1]), table))
    cells = torch.zeros(4, 2, 64, sharer.impl.layout.cell_bytes // 64, dtype=torch.uint8)
    rows = torch.zeros(1, 4, 64)
    with pytest.raises(RuntimeError, match="ran without the layer whose cache it is"):
        sharer.impl.forward(sharer, rows, None, None, cells, step, rows)


def test_counts_leave_out_layers_that_share() -> None:
    config = {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "sliding_window": 96}
    config["layer_types"] = ([WINDOW] * 2 + [FULL]) * 4
    assert num_layers_of(config) == 6 and hybrid_of(config, 1000) == Hybrid(2, 4, 96, is_shared=True)


def test_options_that_divide_a_shared_cache_are_refused() -> None:
    policy = load_policy("int8")
    check_sharing({"num_kv_shared_layers": 10}, 1)
    check_sharing({"num_kv_shared_layers": 0}, 2)
    with pytest.raises(UnsupportedError, match="drop --pipeline-parallel-size"):
        check_sharing({"text_config": {"num_kv_shared_layers": 10}}, 2)
    check_sharing({"num_kv_shared_layers": 0}, 1, has_connector=True)
    with pytest.raises(UnsupportedError, match="drop --kv-transfer-config"):
        check_sharing({"num_kv_shared_layers": 10}, 1, has_connector=True)
    check_options(ServeOptions(kv_sharing_fast_prefill=False), policy)
    with pytest.raises(UnsupportedError, match="drop --kv-sharing-fast-prefill"):
        check_options(ServeOptions(kv_sharing_fast_prefill=True), policy)
    check_hybrid(Hybrid(4, 3, 96), policy)
    with pytest.raises(UnsupportedError, match="spread the pages over several groups"):
        check_hybrid(Hybrid(4, 3, 96, is_shared=True), policy)
