"""Teacher forcing in the engine: the recorded distributions are the model's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from kvserve.evals.distances import distances
from kvserve.evals.engine import EvalHost, Request, until_end
from kvserve.evals.forcing import PROCESSOR, ForcedTokens
from tests.cases.engine_cases import engine, random_prompts
from tests.cases.tiny_models import VOCAB_SIZE, make_tiny_model

END_TOKEN = 2  # in the configuration of Llama


def model_logprobs(model: torch.nn.Module, request: Request) -> np.ndarray:
    """What plain Transformers thinks before each forced token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt, *request.forced]])).logits[0].float()
    return logits.log_softmax(-1)[len(request.prompt) - 1 : -1].numpy()


def model_greedy(model: torch.nn.Module, request: Request) -> list[int]:
    tokens = [*request.prompt, *request.forced]
    for _ in range(request.free):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-request.free :] if request.free else []


def host_of(llm) -> EvalHost:
    host = EvalHost.__new__(EvalHost)
    host.llm = llm
    return host


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("model"))


def test_the_dense_policy_records_what_transformers_computes(model_folder: Path, tmp_path: Path) -> None:
    """Prompts in chunks of 128, several at once, of different lengths, so that rows of the batch move."""
    prompts = random_prompts([300, 40, 130, 129, 260], VOCAB_SIZE)
    forced = random_prompts([20, 3, 0, 40, 9], VOCAB_SIZE, seed=1)
    requests = [
        Request(prompt, tokens, free=5, record=tmp_path / f"{index}.npy" if tokens else None, ends=False)
        for index, (prompt, tokens) in enumerate(zip(prompts, forced, strict=True))
    ]
    with engine(model_folder, "none", logits_processors=[PROCESSOR], skip_tokenizer_init=True) as llm:
        host = host_of(llm)
        answers = host.complete(requests)
        recorded = [np.load(request.record) if request.record else None for request in requests]
        assert host.complete(requests) == answers
        again = [np.load(request.record) if request.record else None for request in requests]
        ending = Request(prompts[0], [5, END_TOKEN, 6, END_TOKEN], free=4, ends=False)
        assert host.complete([ending, *requests])[1:] == answers
        assert host._end_tokens() == {END_TOKEN}

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for request, answer, found, same in zip(requests, answers, recorded, again, strict=True):
        assert answer == model_greedy(model, request)
        if found is not None:
            np.testing.assert_allclose(found, model_logprobs(model, request), atol=1e-3)
            result = distances(found, same, request.forced)
            assert set(result.kl) == {0.0} and set(result.agrees) == {1}


def test_an_answer_is_what_comes_before_the_first_end_token() -> None:
    assert until_end([4, 5, 2, 6, 2], {2, 3}) == [4, 5]
    assert until_end([4, 5], {2}) == [4, 5]


# -- the processor alone --------------------------------------------------------------------------------------------


def processor_with(*requests: tuple[dict | None, list[int]]) -> ForcedTokens:
    """One row for each (extra_args, output tokens)."""
    processor = ForcedTokens(None, torch.device("cpu"), False)
    added = [(row, SimpleNamespace(extra_args=extra), None, out) for row, (extra, out) in enumerate(requests)]
    processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    return processor


def test_only_rows_with_forced_tokens_are_changed_and_only_until_the_last() -> None:
    output: list[int] = []
    processor = processor_with((None, []), ({"forced_token_ids": [4, 2]}, output))
    for token in (4, 2):
        logits = processor.apply(torch.randn(2, 10))
        assert logits[1].argmax() == token and logits[1].isfinite().sum() == 1 and logits[0].isfinite().all()
        output.append(token)
    free = torch.randn(2, 10)
    assert torch.equal(processor.apply(free.clone()), free)


def test_a_chunk_of_the_prompt_is_overwritten_by_the_next(tmp_path: Path) -> None:
    output: list[int] = []
    extra = {"forced_token_ids": [4, 2], "record_path": str(tmp_path / "x.npy")}
    processor = processor_with((extra, output))
    chunk, first, second = torch.randn(3, 1, 10)
    processor.apply(chunk.clone())
    processor.apply(first.clone())
    output.append(4)
    processor.apply(second.clone())
    expected = torch.cat([first, second]).log_softmax(-1)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected.numpy())


def test_a_request_that_moves_takes_its_tokens_along() -> None:
    processor = processor_with((None, []), ({"forced_token_ids": [4]}, []))
    move = (1, 0, MoveDirectionality.UNIDIRECTIONAL)
    processor.update_state(BatchUpdate(1, removed=[], added=[], moved=[move]))
    assert processor.apply(torch.randn(1, 10)).argmax() == 4


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"forced_token_ids": "12"}, "must be a list of token ids"),
        ({"forced_token_ids": [-1]}, "must be a list of token ids"),
        ({"record_path": "x.npy"}, "record_path needs forced_token_ids"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(extra: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        ForcedTokens.validate_params(SimpleNamespace(extra_args=extra))
