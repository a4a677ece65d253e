"""Every shipped policy with every feature of one engine; docs/compatibility.md shows what came out.

Each test is a cell of the matrix. It asserts that the feature works, and returns what the cell says. `make matrix` runs
them all with KVSERVE_MATRIX naming the result file; the page is made from that by benchmarks/reports/compatibility.py.
Features that need an engine of their own: test_compatible_engines.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvserve.default_model import prepare_default_model
from kvserve.engine.backend import backend_for
from kvserve.engine.builder import graph_support
from kvserve.engine.settings import EngineSettings
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from tests.cases.engine_cases import MIB, engine, free_blocks, steps
from tests.cases.greedy import NEAR_TIE_NATS, Step, assert_same_texts, differs_only_behind_a_near_tie
from tests.cases.matrix import CHOOSES_BY_REQUEST, NUM_TOKENS, POLICIES, checked, complete, story_prompts, write_cells

SCHEMA = {"type": "object", "properties": {"boats": {"type": "integer"}}, "required": ["boats"]}


@dataclass
class Served:
    """A policy in a roomy engine that fills prompts at once, six prompts and their greedy texts."""

    policy: str
    llm: LLM
    prompts: list[list[int]]
    texts: list[list[Step]] = field(default_factory=list)

    @property
    def same_texts(self) -> bool:
        """Whether a request's text depends on the request's tokens alone."""
        return self.policy not in CHOOSES_BY_REQUEST


@pytest.fixture(scope="module", params=POLICIES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with engine(
        prepare_default_model(), request.param, kv_cache_memory_bytes=256 * MIB, max_num_batched_tokens=1024,
        enable_lora=True, max_loras=2, max_lora_rank=8, enable_prompt_embeds=True, scheduling_policy="priority",
    ) as llm:  # fmt: skip
        prompts = story_prompts(llm)
        found = Served(request.param, llm, prompts)
        found.texts = [steps(one) for one in complete(llm, prompts, skip_reading_prefix_cache=True)]
        yield found


@pytest.fixture(scope="module", autouse=True)
def result_file() -> Iterator[None]:
    yield
    write_cells()


def cell(feature: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """A test whose returned text is the matrix's cell; a test that fails is a cell too."""

    def wrap(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def test(served: Served, **fixtures: Any) -> None:
            with checked(served.policy, feature) as cells:
                cells[feature] = check(served, **fixtures)

        return pytest.mark.slow(test)

    return wrap


@cell("prefix cache")
def test_a_prefix_hit_gives_the_text_of_a_miss(served: Served) -> str:
    served.llm.reset_prefix_cache()
    miss, hit = (complete(served.llm, served.prompts[:1])[0] for _ in range(2))
    if served.same_texts:
        assert differs_only_behind_a_near_tie(steps(miss), steps(hit))
    assert miss.num_cached_tokens == 0
    return "yes" if hit.num_cached_tokens else "computes the whole prompt"


@cell("batching")
def test_a_request_alone_gets_the_text_it_gets_among_others(served: Served) -> str:
    alone = [steps(complete(served.llm, [prompt], skip_reading_prefix_cache=True)[0]) for prompt in served.prompts[:2]]
    if served.same_texts:
        assert all(differs_only_behind_a_near_tie(*pair) for pair in zip(served.texts[:2], alone, strict=True))
    return "yes"


@cell("n > 1")
def test_several_answers_to_one_prompt_are_each_the_greedy_one(served: Served) -> str:
    (output,) = complete(served.llm, served.prompts[:1], n=2, temperature=1e-5)
    assert len(output.outputs) == 2
    for answer in output.outputs:
        alone = replace_answers(output, [answer])
        if served.same_texts:
            assert differs_only_behind_a_near_tie(served.texts[0], steps(alone))
    return "yes"


def replace_answers(output: RequestOutput, answers: list[CompletionOutput]) -> RequestOutput:
    found = copy(output)
    found.outputs = answers
    return found


@cell("prompt log-probabilities")
def test_log_probabilities_of_a_prompt_are_those_before_eviction(served: Served) -> str:
    (output,) = complete(served.llm, served.prompts[:1], prompt_logprobs=0, max_tokens=1)
    assert output.prompt_logprobs is not None
    found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]
    assert len(found) == len(served.prompts[0]) - 1
    assert all(-30 < logprob <= 0 for logprob in found)
    return "before eviction" if load_policy(served.policy).eviction else "yes"


@cell("structured output")
def test_an_answer_follows_a_json_schema(served: Served) -> str:
    limits = StructuredOutputsParams(json=SCHEMA)
    (output,) = complete(served.llm, served.prompts[:1], structured_outputs=limits, ignore_eos=False, max_tokens=60)
    text = served.llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)
    if output.outputs[0].finish_reason == "stop":
        assert isinstance(json.loads(text)["boats"], int)
    else:  # a number that grew until the tokens were spent
        assert text.lstrip().startswith("{")
    return "yes"


@cell("LoRA")
def test_an_adapter_changes_its_own_requests_alone(served: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Beside each other in a batch; pages that an adapter's request computed serve no other request."""
    adapter = LoRARequest("turned", 1, str(random_adapter(tmp_path_factory.mktemp("adapter"), served.llm)))
    served.llm.reset_prefix_cache()
    prompts = [served.prompts[0]] * 2
    mixed = [complete(served.llm, prompts, lora_request=[adapter, None]) for _ in range(2)]
    for turned, plain in mixed:
        assert turned.outputs[0].token_ids != plain.outputs[0].token_ids
        if served.same_texts:
            assert differs_only_behind_a_near_tie(served.texts[0], steps(plain))
            assert differs_only_behind_a_near_tie(steps(mixed[0][0]), steps(turned))
    return "yes"


def random_adapter(folder: Path, llm: LLM) -> Path:
    """A LoRA of rank 8 on the queries of all layers, large enough to change a text."""
    config, generator = llm.llm_engine.model_config.hf_text_config, torch.Generator().manual_seed(0)
    heads = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    weights = {}
    for layer in range(config.num_hidden_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, config.hidden_size, generator=generator) / 8
        weights[f"{name}.lora_B.weight"] = torch.randn(heads, 8, generator=generator) / 8
    save_file(weights, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 256, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@cell("prompt embeddings")
def test_embeddings_of_a_prompt_give_the_text_of_its_tokens(served: Served) -> str:
    table = safetensors_entry(prepare_default_model(), "model.embed_tokens.weight")
    prompt: Any = {"prompt_embeds": table[torch.tensor(served.prompts[0])].float()}
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    (output,) = served.llm.generate([prompt], sampling, use_tqdm=False)
    if served.same_texts:
        assert differs_only_behind_a_near_tie(served.texts[0], steps(output))
    return "yes"


def safetensors_entry(folder: Path, name: str) -> torch.Tensor:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as content:
        return content.get_tensor(name)


@cell("priorities")
def test_a_request_of_higher_priority_is_answered_first_and_all_get_their_texts(served: Served) -> str:
    core, order = served.llm.llm_engine, []
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for number, prompt in enumerate(served.prompts):  # each fills most of a step
        long = (prompt * 6)[:1000]
        core.add_request(str(number), {"prompt_token_ids": long}, sampling, priority=len(served.prompts) - number)
    while core.has_unfinished_requests():
        order += [output.request_id for output in core.step() if output.finished]
    assert sorted(order) == sorted(map(str, range(len(served.prompts)))) and order[0] != "0"
    served.llm.reset_prefix_cache()  # it has prompts that begin with these, which a policy would not cut
    texts = [steps(one) for one in complete(served.llm, served.prompts, priority=list(range(len(served.prompts))))]
    if served.same_texts:
        assert_same_texts(served.texts, texts)
    return "yes"


@cell("beam search")
def test_a_beam_of_one_is_the_greedy_text_where_nothing_is_evicted(served: Served) -> str:
    """Every step of a beam is a request of its own, whose prompt has what was generated: evicted anew."""
    prompt: Any = {"prompt_token_ids": served.prompts[0]}
    one, two = (served.llm.beam_search([prompt], BeamSearchParams(width, 8, ignore_eos=True))[0] for width in (1, 2))
    assert len(two.sequences) == 2 and two.sequences[0].cum_logprob >= two.sequences[1].cum_logprob
    if load_policy(served.policy).eviction:
        return "each token is a prompt of its own"
    greedy = [step.token for step in served.texts[0][:8]]
    found = [str(token) for token in one.sequences[0].tokens[-8:]]
    first = next((i for i, pair in enumerate(zip(greedy, found, strict=True)) if pair[0] != pair[1]), None)
    assert first is None or served.texts[0][first].margin < NEAR_TIE_NATS
    return "yes"


@cell("reset of the prefix cache")
def test_nothing_is_found_in_a_prefix_cache_that_was_reset(served: Served) -> str:
    complete(served.llm, served.prompts[:1])
    assert served.llm.reset_prefix_cache()
    (output,) = complete(served.llm, served.prompts[:1])
    assert output.num_cached_tokens == 0
    if served.same_texts:
        assert differs_only_behind_a_near_tie(served.texts[0], steps(output))
    return "yes"


@cell("sleep mode")
def test_vllm_itself_has_no_sleep_on_a_cpu(served: Served) -> str:
    assert not current_platform.is_sleep_mode_available()
    return "vLLM: on a GPU alone"


@cell("abort")
def test_an_aborted_request_gives_all_blocks_back(served: Served) -> str:
    core, before = served.llm.llm_engine, free_blocks(served.llm)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    core.add_request("aborted", {"prompt_token_ids": served.prompts[0]}, params)
    while not any(len(output.outputs[0].token_ids) > 3 for output in core.step()):
        pass
    assert free_blocks(served.llm) < before
    core.abort_request(["aborted"])
    core.step()
    assert free_blocks(served.llm) == before
    return "yes"


@cell("sliding-window models")
def test_window_layers_join_the_others_or_are_refused(served: Served) -> str:
    backend = backend_for(settings_of(served.policy))
    window = SlidingWindowSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=96)
    try:
        spec = backend.customize_spec(window)
    except UnsupportedError:
        assert load_policy(served.policy).eviction
        return "refused"
    return "whole sequence is kept" if spec is not window else "yes"


@cell("full CUDA graphs of decode steps")
def test_full_graphs_are_claimed_for_steps_that_cannot_evict(served: Served) -> str:
    claimed = graph_support(settings_of(served.policy))
    assert claimed in (AttentionCGSupport.NEVER, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE)
    return "no" if claimed == AttentionCGSupport.NEVER else "claimed; no GPU has run them"


def settings_of(policy: str) -> EngineSettings:
    return EngineSettings(load_policy(policy), 64, torch.bfloat16, kernels="triton", num_layers=30)
