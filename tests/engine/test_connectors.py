"""vLLM's KV connectors over kvserve's tiles: a second engine finds the first one's prefix."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from kvserve.connectors import PARAMS_KEY, Identity, asked_connector, check_connector, wrapped
from kvserve.default_model import prepare_default_model
from kvserve.engine.identity import MANIFEST, check_storage, claim_storage
from kvserve.engine.own_requests import own_request_id
from kvserve.engine.request_check import RequestCheck
from kvserve.engine.tile_connector import FORWARDED, ExampleTiles, NixlTiles, TileConnector
from kvserve.errors import UnsupportedError
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy, policy_content
from tests.cases.engine_cases import engine, free_blocks, random_prompts, steps
from tests.cases.greedy import assert_same_texts
from tests.cases.tiny_models import make_tiny_model

BLOCK = 64
PROMPTS = random_prompts([5, 64, 65, 128, 400, 700])
NO_SINKS = {"sink_tokens": 0}
IDENTITY = Identity.of("int8", {"tile_tokens": 64}, "", "weights", "bytes")


def connector_config(folder: Path, name: str = "ExampleConnector") -> dict[str, Any]:
    return {
        "kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }  # fmt: skip


def transfer(folder: Path) -> KVTransferConfig:
    return KVTransferConfig(**wrapped(connector_config(folder)))


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# Engines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("llama-gqa-64"))


def ask(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[RequestOutput]:
    """Greedy answers; without the prompts' log-probabilities, for which vLLM reads no prefix."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def answers(model: Path, policy: str, folder: Path | None) -> dict[str, Any]:
    """What an engine of its own says, and how many tokens of its prompts it found."""
    options = {"kv_transfer_config": transfer(folder)} if folder else {}
    changes = NO_SINKS if load_policy(policy).sink_tokens else {}
    # The first step computes whole prompts: of what comes in several, ExampleConnector would save the first alone.
    with engine(model, policy, changes, skip_tokenizer_init=True, max_num_batched_tokens=2048, **options) as llm:
        before = free_blocks(llm)
        outputs = ask(llm, PROMPTS, 80)
        again = ask(llm, PROMPTS[-1:], 1)[0] if folder else None
        assert free_blocks(llm) == before
    found = {"texts": [steps(output) for output in outputs], "cached": [output.num_cached_tokens for output in outputs]}
    return found | {"again": again and again.num_cached_tokens, "bytes": stored_bytes(folder) if folder else 0}


@pytest.mark.parametrize("policy", ["kivi-2bit", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_second_engine_finds_the_prefixes_of_the_first(model: Path, policy: str, tmp_path: Path) -> None:
    plain = answers(model, policy, None)
    first, second = (answers(model, policy, tmp_path / "kv") for _ in range(2))
    assert first["cached"] == [0] * len(PROMPTS)
    # Whole tiles; this connector of vLLM's leaves two tokens to compute.
    assert second["cached"] == [(len(prompt) - 2) // BLOCK * BLOCK for prompt in PROMPTS]
    assert_same_texts(plain["texts"], first["texts"])
    assert_same_texts(plain["texts"], second["texts"])
    assert first["bytes"] == second["bytes"] > 0
    assert first["again"] == second["again"] == 640  # tiles that were loaded serve later requests


@pytest.mark.slow
def test_the_files_are_smaller_by_what_the_policy_saves(model: Path, tmp_path: Path) -> None:
    dense, compressed = (answers(model, name, tmp_path / name)["bytes"] for name in ("none", "kivi-2bit"))
    layouts = [
        PageLayout.build(load_policy(name), 64, BLOCK, torch.float32, num_layers=2) for name in ("none", "kivi-2bit")
    ]
    expected = layouts[0].cell_bytes / layouts[1].cell_bytes
    assert dense / compressed == pytest.approx(expected, rel=0.15)  # every file has a header


def test_an_engine_with_other_pages_is_refused_before_it_loads(model: Path, tmp_path: Path) -> None:
    claim_storage(transfer(tmp_path / "kv"), IDENTITY)
    with pytest.raises(Exception, match=r"has the pages of policy int8, not kivi-2bit as it is here; name another"):
        answers(model, "kivi-2bit", tmp_path / "kv")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "kivi-4bit", "kvquant-3bit", "skvq-2bit"])
def test_the_default_model_answers_alike_with_and_without(policy: str, tmp_path: Path) -> None:
    model = prepare_default_model()
    plain, _, second = (answers(model, policy, folder) for folder in (None, tmp_path / "kv", tmp_path / "kv"))
    assert second["cached"][-1] == 640
    assert_same_texts(plain["texts"], second["texts"])


# Rows


class Inner:
    """A connector that keeps what it is told."""

    def __init__(self, found: tuple[int | None, bool] = (0, False)) -> None:
        self.found, self.told = found, {}

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.found

    def update_state_after_alloc(self, request: Any, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.told["blocks"] = [[block.block_id for block in group] for group in blocks.blocks]

    def build_connector_meta(self, step: SchedulerOutput) -> SchedulerOutput:
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.told["finished"] = block_ids
        return True, {"remote_block_ids": (block_ids,)}


def connector(inner: Inner, kind: type[TileConnector] = NixlTiles) -> Any:
    made: Any = object.__new__(kind)
    made.inner, made.identity, made.left_out, made.loaded = inner, IDENTITY, set(), set()
    made.layout = PageLayout.build(load_policy("int8"), 64, BLOCK, torch.float32)
    return made


def request(num_tokens: int, params: dict[str, Any] | None = None, computed: int = 0, **changes: Any) -> Any:
    plain = {"prompt_token_ids": [1] * num_tokens, "lora_request": None, "cache_salt": None, "num_preemptions": 0}
    return SimpleNamespace(
        num_tokens=num_tokens, num_computed_tokens=computed, kv_transfer_params=params,
        **({"request_id": "new"} | plain | changes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "here", "found", "loaded"),
    [(700, 0, 640, 640), (640, 0, 640, 576), (641, 0, 640, 640), (700, 128, 512, 512), (700, 0, 690, 640),
     (63, 0, 63, 0), (64, 0, 64, 0), (700, 640, 0, 0), (200, 192, -64, 0), (65, 64, 1, 0)],
)  # fmt: skip
def test_whole_tiles_are_loaded_and_a_token_is_left(prompt: int, here: int, found: int, loaded: int) -> None:
    assert connector(Inner((found, True))).get_num_new_matched_tokens(request(prompt), here) == (loaded, loaded > 0)


def test_a_connector_that_does_not_know_yet_is_asked_again() -> None:
    assert connector(Inner((None, False))).get_num_new_matched_tokens(request(700), 0) == (None, False)


def test_a_connector_sees_the_tile_blocks_of_a_row_in_their_order() -> None:
    made = connector(Inner())
    private = made.layout.private_blocks
    row = list(range(10, 10 + private + 3))
    blocks = KVCacheBlocks(([SimpleNamespace(block_id=index) for index in row],))  # type: ignore[arg-type]
    made.update_state_after_alloc(request(300), blocks, 0)
    assert made.inner.told["blocks"] == [row[private:]]
    # One tile more than is sealed, of a step that was thrown away.
    made.request_finished(request(300, computed=150), row)
    assert made.inner.told["finished"] == row[private : private + 2]


def new_request(row: list[int], num_tokens: int = 1) -> NewRequestData:
    return NewRequestData(
        req_id="new", prompt_token_ids=[1] * num_tokens, mm_features=[], sampling_params=None, pooling_params=None,
        block_ids=(row,), num_computed_tokens=0, lora_request=None,
    )  # fmt: skip


def test_a_step_is_translated_in_a_copy() -> None:
    made = connector(Inner())
    private = made.layout.private_blocks
    row = list(range(20, 24 + private))
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.resumed_req_ids = ["runs", "waits", "resumed"], {"resumed"}
    cached.new_block_ids = [([7, 8],), None, (row,)]
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs, step.scheduled_cached_reqs = [new_request(row)], cached
    seen: Any = made.build_connector_meta(step)
    assert seen.scheduled_new_reqs[0].block_ids == (row[private:],)
    assert seen.scheduled_cached_reqs.new_block_ids == [([7, 8],), None, (row[private:],)]
    assert step.scheduled_new_reqs[0].block_ids == (row,) and cached.new_block_ids[2] == (row,)


def step_of(row: list[int], prompt: int, scheduled: int) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs, step.num_scheduled_tokens = [new_request(row, prompt)], {"new": scheduled}
    return step


def rows_for_files(made: ExampleTiles, row: list[int], prompt: int, scheduled: int) -> list[tuple[list[int], ...]]:
    seen: Any = made.build_connector_meta(step_of(row, prompt, scheduled))
    return [one.block_ids for one in seen.scheduled_new_reqs]


def test_files_are_of_prompts_that_one_step_completes_and_have_the_null_block_for_what_is_not_sealed() -> None:
    made = connector(Inner(), ExampleTiles)
    private = list(range(made.layout.private_blocks))
    assert rows_for_files(made, [*private, 50, 51], 130, 130) == [([50, 51, 0],)]
    assert rows_for_files(made, private, 5, 5) == [([0],)], "an empty row is no index"
    assert rows_for_files(made, [*private, 50], 130, 100) == []
    made.update_state_after_alloc(request(130), KVCacheBlocks(([],)), 64)
    assert rows_for_files(made, [*private, 50], 130, 10) == [([50, 0, 0],)]
    assert rows_for_files(made, [*private, 50], 130, 10) == [], "it is loaded once"


@pytest.mark.parametrize(
    "change",
    [{"prompt_token_ids": None}, {"lora_request": object()}, {"cache_salt": "x"}, {"request_id": own_request_id("t")}],
)
def test_prompts_whose_pages_are_not_those_of_their_tokens_alone_are_in_no_file(change: dict[str, Any]) -> None:
    made = connector(Inner((64, False)), ExampleTiles)
    special = request(130, **change)
    made.on_new_request(special)
    assert made.get_num_new_matched_tokens(special, 0) == (0, False)
    assert special.request_id != "new" or rows_for_files(made, [*range(9), 50, 51], 130, 130) == []
    made.request_finished(special, [])
    assert made.get_num_new_matched_tokens(request(130), 0) == (64, False)


def test_a_request_that_comes_back_loads_nothing_from_a_file() -> None:
    """vLLM's connector would look for a file that is named after its answer, too."""
    made = connector(Inner((64, False)), ExampleTiles)
    assert made.get_num_new_matched_tokens(request(130, num_preemptions=1), 0) == (0, False)


def test_whatever_vllm_asks_a_connector_reaches_the_wrapped_one() -> None:
    asked = {name for name, value in vars(KVConnectorBase_V1).items() if callable(value) or isinstance(value, property)}
    own = {name for name in vars(TileConnector)}
    left = {name for name in asked if not name.startswith("_")} - own
    assert left <= {"role", "supports_divergent_local_hybrid_hits"}, f"{left}: forward them, or say why not"
    assert set(FORWARDED) <= own


# Whose tiles they are


def test_blocks_of_an_engine_with_other_pages_are_not_loaded() -> None:
    theirs = IDENTITY._replace(content="other", policy="kivi-2bit")._asdict()
    params = {"remote_block_ids": ([1, 2, 3],), PARAMS_KEY: theirs}
    made = connector(Inner((640, True)))
    assert made.get_num_new_matched_tokens(request(700, params), 0) == (0, False)
    assert made.get_num_new_matched_tokens(request(700, {"remote_block_ids": ([1],)}), 0) == (0, False)
    params[PARAMS_KEY] = IDENTITY._asdict()
    assert made.get_num_new_matched_tokens(request(700, params), 0) == (640, True)


def test_a_server_refuses_a_request_with_blocks_of_other_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimpleNamespace(identity=IDENTITY, policy=None)
    monkeypatch.setattr(RequestCheck, "server", server)
    params = {"remote_block_ids": [[1]], PARAMS_KEY: IDENTITY._asdict()}
    RequestCheck.validate_params(SamplingParams(extra_args={"kv_transfer_params": params}))
    RequestCheck.validate_params(SamplingParams(extra_args={"kv_transfer_params": {"do_remote_decode": True}}))
    with pytest.raises(ValueError, match=r"blocks of policy none of kvserve, not int8 as it is here; serve both"):
        RequestCheck.validate_params(SamplingParams(extra_args={"kv_transfer_params": {"remote_block_ids": [[1]]}}))


def test_an_engine_says_whose_its_blocks_are_and_takes_no_more_than_it_has_room_for() -> None:
    made = connector(Inner())
    _, params = made.request_finished(request(300, computed=300), list(range(20)))
    assert params is not None and IDENTITY.difference(params[PARAMS_KEY]) is None
    private = made.layout.private_blocks
    blocks = KVCacheBlocks(([SimpleNamespace(block_id=index) for index in range(private + 2)],))  # type: ignore[arg-type]
    asked = {"remote_block_ids": ([5, 6, 7, 8],)}
    made.update_state_after_alloc(request(300, asked), blocks, 128)
    assert asked["remote_block_ids"] == ([5, 6],)


def test_what_a_policy_says_of_itself_does_not_count_and_what_it_sets_does() -> None:
    content = policy_content(load_policy("int8"))
    one = Identity.of("int8", content, "", "m", "p")
    assert (
        one.difference(Identity.of("mine", content | {"summary": "x", "name": "mine"}, "", "m", "p")._asdict()) is None
    )
    other = Identity.of("int8", content | {"sink_tokens": 8}, "", "m", "p")
    assert "policy int8, not int8 as it is here" in str(one.difference(other._asdict()))
    for name in ("calibration", "model", "pages"):
        assert f"another {name}" in str(one.difference(one._replace(**{name: "x"})._asdict()))
    assert one.difference(None) and one.difference("text")


def test_a_storage_belongs_to_the_pages_that_came_first(tmp_path: Path) -> None:
    storage = transfer(tmp_path / "kv")
    claim_storage(storage, IDENTITY)
    claim_storage(storage, IDENTITY)
    assert [file.name for file in (tmp_path / "kv").iterdir()] == [MANIFEST]
    with pytest.raises(UnsupportedError, match="another calibration: , here x; name another shared_storage_path"):
        check_storage(storage, IDENTITY._replace(calibration="x"))
    (tmp_path / "kv" / MANIFEST).write_text("no JSON")
    with pytest.raises(UnsupportedError, match="cannot read"):
        check_storage(storage, IDENTITY)


def test_files_of_which_nothing_says_whose_they_are_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    with pytest.raises(UnsupportedError, match=r"nothing says whose the files in .* are; name an empty"):
        claim_storage(transfer(tmp_path), IDENTITY)


# What is refused


@pytest.mark.parametrize(
    ("policy", "changes", "options", "reason"),
    [
        ("snapkv", {}, {}, "policy snapkv gives back tiles that a KV connector would move"),
        ("kivi-2bit", {}, {}, "keeps 8 first tokens in blocks beside them; add --policy-set sink_tokens=0"),
        ("int8", {"kv_connector": "LMCacheConnectorV1"}, {}, "and not 'LMCacheConnectorV1'; use one of them"),
        ("int8", {"kv_connector_extra_config": {}}, {}, "needs a folder of its own; add shared_storage_path"),
        ("int8", {"kv_load_failure_policy": "recompute"}, {}, "drop kv_load_failure_policy"),
        ("int8", {}, {"speculates": True}, "drop --speculative-config"),
        ("int8", {}, {"tensor_parallel_size": 2}, "drop --tensor-parallel-size"),
    ],
)  # fmt: skip
def test_what_a_connector_cannot_move_is_refused(
    policy: str, changes: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = connector_config(tmp_path) | changes
    for form in (config, json.dumps(config)):
        with pytest.raises(UnsupportedError, match=reason):
            check_connector(form, load_policy(policy), **options)


def test_a_wrapped_connector_is_known_by_vllms_name(tmp_path: Path) -> None:
    config = wrapped(connector_config(tmp_path))
    assert asked_connector(config) == asked_connector(KVTransferConfig(**config)) == "ExampleConnector"
    check_connector(config, load_policy("int8"))


def test_a_connector_that_nobody_wrapped_is_refused_with_what_to_add(model: Path, tmp_path: Path) -> None:
    bare = KVTransferConfig(**connector_config(tmp_path))
    wanted = '"kv_connector": "ExampleTiles", "kv_connector_module_path": "kvserve.engine.tile_connector"'
    options = {"skip_tokenizer_init": True, "kv_transfer_config": bare}
    with pytest.raises(UnsupportedError) as refused, engine(model, "int8", **options):
        pass
    assert wanted in str(refused.value)
