"""End to end: the `kvserve` command, its HTTP server and the official `openai` client, on the default model.

The server's pool is so small that a handful of concurrent requests preempt each other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.cases.dashboard import wanted_series
from tests.cases.engine_cases import STORY
from tests.cases.greedy import Step, assert_same_texts, steps_of
from tests.cases.server_cases import MODEL, metrics, server

pytestmark = pytest.mark.server

POLICY = "kivi-2bit"
POOL_BYTES = 16_000_000  # about 60 blocks of the default model


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with server(POLICY, POOL_BYTES, "--enforce-eager") as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=300)


def complete(client: OpenAI, prompt: str, max_tokens: int = 40) -> str:
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return completion.choices[0].text


def greedy_steps(client: OpenAI, prompt: str, max_tokens: int = 150) -> list[Step]:
    completion = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    return steps_of(logprobs.tokens, logprobs.top_logprobs)


def test_health_and_ready_answer_200(base_url: str) -> None:
    assert httpx.get(f"{base_url}/health").status_code == 200
    assert httpx.get(f"{base_url}/ready").status_code == 200


def test_chat_answers_correctly(client: OpenAI) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=40)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_the_question_in_readme_is_answered_as_readme_says(base_url: str) -> None:
    """README's own request, which leaves sampling and length to the server."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"^curl [^\n]*/v1/chat/completions -H '[^']*' -d '(.*?)'$", readme, re.MULTILINE | re.DOTALL)
    (quoted,) = re.findall(r'^The answer is "(.*?)"', readme, re.MULTILINE)
    assert set(json.loads(body)) == {"model", "messages"}
    for _ in range(10):
        response = httpx.post(f"{base_url}/v1/chat/completions", json=json.loads(body), timeout=300).json()
        (choice,) = response["choices"]
        assert choice["finish_reason"] == "stop" and choice["message"]["content"] == quoted


def test_a_streamed_answer_is_the_unstreamed_one(client: OpenAI) -> None:
    arguments = {"model": MODEL, "messages": [{"role": "user", "content": "Name three colours."}], "temperature": 0}
    whole = client.chat.completions.create(**arguments, max_tokens=60).choices[0].message.content
    chunks = client.chat.completions.create(**arguments, max_tokens=60, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_prefix_hit_gives_the_text_of_a_miss(client: OpenAI, base_url: str) -> None:
    prompt = "A tale for a rainy night. " + STORY * 4 + "In the morning"
    hits_before = metrics(base_url)["vllm:prefix_cache_hits_total", ""]
    miss = complete(client, prompt)
    hit = complete(client, prompt)
    assert metrics(base_url)["vllm:prefix_cache_hits_total", ""] - hits_before >= 192
    assert hit == miss


@pytest.mark.slow
def test_concurrent_requests_that_preempt_each_other_give_the_text_they_give_alone(
    client: OpenAI, base_url: str
) -> None:
    names = ["Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah"]
    prompts = [f"{name} told this story. " + STORY * (3 + i % 3) + f"And {name} said:" for i, name in enumerate(names)]
    alone = [greedy_steps(client, prompt) for prompt in prompts]
    preempted_before = metrics(base_url)["vllm:num_preemptions_total", ""]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: greedy_steps(client, prompt), prompts))
    assert metrics(base_url)["vllm:num_preemptions_total", ""] > preempted_before
    assert_same_texts(alone, together)


def test_an_aborted_stream_gives_its_pages_back(client: OpenAI, base_url: str) -> None:
    with client.completions.create(
        model=MODEL, prompt=STORY * 3, max_tokens=1000, stream=True, temperature=0
    ) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        assert metrics(base_url)["kvserve:pages", "dense"] > 0
    deadline = time.monotonic() + 30
    while metrics(base_url)["vllm:num_requests_running", ""] and time.monotonic() < deadline:
        time.sleep(0.2)
    complete(client, "One more step lets the counters settle.", max_tokens=2)
    assert metrics(base_url)["kvserve:pages", "dense"] == 0


def test_metrics_say_what_is_in_effect(base_url: str) -> None:
    samples = metrics(base_url)
    assert samples["kvserve:policy_info", POLICY] == 1
    dense, effective = (samples["kvserve:kv_bytes_per_token", kind] for kind in ("dense", "effective"))
    assert dense == 30 * 3 * 2 * 64 * 2
    assert samples["kvserve:compression_ratio", "effective"] == pytest.approx(dense / effective)
    assert samples["kvserve:compression_ratio", "requested"] > samples["kvserve:compression_ratio", "effective"] > 4
    assert samples["kvserve:kv_capacity_tokens", "effective"] > 4 * samples["kvserve:kv_capacity_tokens", "dense"]
    total = sum(samples["kvserve:pages", state] for state in ("free", "dense", "sealed"))
    assert 0 < total * 2816 <= POOL_BYTES, "pages of all states make up the pool, less vLLM's null block"


def test_every_metric_names_its_model_and_engine_as_vllms_do(base_url: str) -> None:
    families = list(text_string_to_metric_families(httpx.get(f"{base_url}/metrics").text))
    (running,) = [s for family in families for s in family.samples if s.name == "vllm:num_requests_running"]
    assert running.labels == {"model_name": MODEL, "engine": "0"}
    wanted = wanted_series(evicts=False)
    found = [s for family in families for s in family.samples if s.name in wanted or s.name.startswith("kvserve:")]
    assert len(found) > 60 and all(running.labels.items() <= sample.labels.items() for sample in found)


def test_the_usual_request_options_work_on_compressed_pages(client: OpenAI) -> None:
    prompt = STORY * 2 + "He saw"
    choices = client.completions.create(
        model=MODEL, prompt=prompt, n=3, temperature=1.0, seed=3, max_tokens=20, logprobs=2, presence_penalty=0.5
    ).choices
    assert len({choice.text for choice in choices}) == 3
    assert all(len(choice.logprobs.token_logprobs) == 20 for choice in choices if choice.logprobs)
    stopped = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", stop=["7"], temperature=0, max_tokens=40)
    assert "7" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    scored = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert len(scored.choices[0].prompt_logprobs) > 100  # type: ignore[attr-defined]


def test_structured_output_follows_its_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "rainy": {"type": "boolean"}},
        "required": ["city", "rainy"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=60,
        messages=[{"role": "user", "content": STORY + "Describe the weather in one city as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}},
    )  # fmt: skip
    parsed = json.loads(answer.choices[0].message.content or "")
    assert set(parsed) == {"city", "rainy"}


def test_the_dashboard_and_the_alerts_read_metrics_that_exist(base_url: str) -> None:
    published = {name for name, _ in metrics(base_url)}
    assert wanted_series(evicts=False) and wanted_series(evicts=False) <= published
