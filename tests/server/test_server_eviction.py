"""A server whose policy evicts, over HTTP: the report of each answer, and /metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from openai import BadRequestError, InternalServerError, OpenAI

from kvserve.accounting.plan import widest_request
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy
from tests.cases.dashboard import wanted_series
from tests.cases.engine_cases import STORY
from tests.cases.server_cases import MODEL, metrics, server

pytestmark = [pytest.mark.server, pytest.mark.slow]

POLICY = "kv-compress-2bit"
PROMPT = STORY * 10 + "In the morning"


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with server(POLICY, 64_000_000, "--max-num-seqs", "8") as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=300)


def test_before_the_first_request_no_metric_knows_of_one(base_url: str) -> None:
    """The self-test evicted, and /ready has made the model generate. The first test of this server."""
    samples = metrics(base_url)
    dense, effective = (samples["kvserve:kv_bytes_per_token", kind] for kind in ("dense", "effective"))
    assert samples["kvserve:compression_ratio", "effective"] == pytest.approx(dense / effective)
    assert samples["kvserve:kv_tokens_evicted_total", POLICY] == 0
    assert not any(name.startswith("kvserve:kept_tokens") for name, _ in samples)
    assert samples["kvserve:pages", "kept"] == samples["kvserve:pages", "dense"] == 0
    assert samples["vllm:external_prefix_cache_queries_total", ""] == 0


def test_both_kinds_of_answer_carry_the_report(client: OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0)
    messages = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, temperature=0)
    for answer in (completion, chat):
        report = answer.kv_transfer_params["kvserve"]  # type: ignore[attr-defined]
        assert report["tokens_cached"] == answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
        assert report["tokens_kept"] < report["tokens_cached"] / 2
        assert 2 < report["rate_effective"] <= report["rate_requested"] == 4
        assert 0 < report["bytes_held"] < report["tokens_cached"] * 30 * 3 * 2 * 64 * 2 / 4


def test_several_answers_and_streams_work_as_before(client: OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt=PROMPT, n=2, max_tokens=5, temperature=1.0)
    assert len(completion.choices) == 2
    assert "kvserve" in completion.kv_transfer_params  # type: ignore[attr-defined]
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, stream=True))
    assert len(chunks) == 5
    stopped = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", stop=["7"], temperature=0, max_tokens=40)
    assert stopped.choices[0].finish_reason == "stop"


def test_a_request_that_a_tight_pool_can_never_hold_is_refused_and_holds_up_nobody() -> None:
    layout = PageLayout.build(load_policy(POLICY, []), 64, 64, torch.float32, query_group=3, num_layers=30)
    num_blocks = widest_request(layout, 2048)
    with server(POLICY, (num_blocks + 1) * layout.cell_bytes * 30 * 3, "--max-num-seqs", "8") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        for create in (
            lambda **xargs: client.completions.create(model=MODEL, prompt=STORY * 28, max_tokens=9, **xargs),
            lambda **xargs: client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": STORY * 28}], max_tokens=9, **xargs
            ),
        ):
            for stream in (False, True):
                with pytest.raises(BadRequestError, match=f"pool of {num_blocks} blocks can never hold"):
                    create(stream=stream, extra_body={"vllm_xargs": {"kvserve_rate": 1.3}})
            assert create().usage.completion_tokens == 9
        # Batches are not rendered ahead: the scheduler refuses.
        with pytest.raises(InternalServerError):
            client.post("/chat/completions/batch", cast_to=object, body={
                "model": MODEL, "messages": [[{"role": "user", "content": STORY * 28}]], "max_tokens": 9,
                "vllm_xargs": {"kvserve_rate": 1.3},
            })  # fmt: skip
        assert client.completions.create(model=MODEL, prompt=STORY * 28, max_tokens=2).usage.completion_tokens == 2


def test_metrics_count_evictions_and_settle_after_an_aborted_stream(client: OpenAI, base_url: str) -> None:
    before = metrics(base_url)["kvserve:kv_tokens_evicted_total", POLICY]
    report = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5).kv_transfer_params["kvserve"]  # type: ignore[attr-defined]
    evicted = metrics(base_url)["kvserve:kv_tokens_evicted_total", POLICY] - before
    assert evicted == pytest.approx(report["tokens_cached"] - report["tokens_kept"], abs=0.01)
    with client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=900, stream=True) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        samples = metrics(base_url)
        assert samples["kvserve:pages", "kept"] > 0 and samples["kvserve:pages", "dense"] > 0
    # Prefix hits let one prompt hold the blocks of many tokens for a while, but never fewer than these bits allow.
    assert 4 < samples["kvserve:compression_ratio", "effective"] < samples["kvserve:compression_ratio", "requested"]
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="One more step lets the gauges settle.", max_tokens=2)
    samples = metrics(base_url)
    assert samples["kvserve:pages", "kept"] == samples["kvserve:pages", "dense"] == 0
    total = sum(samples["kvserve:pages", state] for state in ("free", "dense", "kept", "sealed"))
    assert total == samples["kvserve:pages", "free"] + samples["kvserve:pages", "sealed"] > 0


def test_the_dashboard_and_the_alerts_read_metrics_that_exist(client: OpenAI, base_url: str) -> None:
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    assert wanted_series(evicts=True) <= {name for name, _ in metrics(base_url)}
