"""`kvserve eval` without engines: its tasks, its arithmetic, what it keeps and what it refuses."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kvserve.cli import main
from kvserve.default_model import prepare_default_model
from kvserve.errors import TextError
from kvserve.evals import command
from kvserve.evals.distances import distances
from kvserve.evals.engine import Request
from kvserve.evals.items import TaskItem
from kvserve.evals.options import SUITES, TEXT, parse
from kvserve.evals.report import equal_tokens, rows, verdicts
from kvserve.evals.source import Source
from kvserve.evals.statistics import bootstrap, quantile, share_interval
from kvserve.evals.tasks.base import Example, TaskError, score
from kvserve.evals.tasks.registry import TASKS
from kvserve.evals.text import windows

LENGTH = 700


@pytest.fixture(scope="module")
def source() -> Source:
    from transformers import AutoTokenizer

    return Source(AutoTokenizer.from_pretrained(prepare_default_model()))


# -- tasks ----------------------------------------------------------------------------------------------------------


def needle_oracle(context: str, question: str) -> list[str]:
    found = re.findall(r"secret number of (\S+) is (\d+)\.", context)
    return [value for name, value in found if name in question]


def key_value_oracle(context: str, question: str) -> list[str]:
    pairs = dict(re.findall(r'"(\w+)": "(\w+)"', context))
    return [value for key, value in pairs.items() if f'"{key}"' in question]


def variable_oracle(context: str, question: str) -> list[str]:
    origins = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context))
    value = re.findall(r"the value (\d+)", question)[0]

    def value_of(name: str) -> str:
        return value_of(origins[name]) if name in origins else name

    return [name for name in origins if value_of(name) == value]


def most_frequent(words: Sequence[str], count: int) -> list[str]:
    """Only where the last one is more frequent than the next."""
    found = Counter(words).most_common(count + 1)
    assert found[count - 1][1] > found[count][1]
    return [word for word, _ in found[:count]]


ORACLES = {
    "single-needle": needle_oracle, "multi-key-needle": needle_oracle, "multi-value-needle": needle_oracle,
    "multi-query-needle": needle_oracle, "key-value": key_value_oracle, "variable-tracking": variable_oracle,
    "common-words": lambda context, _: most_frequent(re.findall(r"\d+\. (\w+)\n", context), 10),
    "frequent-words": lambda context, _: most_frequent(re.findall(r"\b[a-z]{6}\b", context.split("\n\n", 1)[1]), 3),
}  # fmt: skip


def texts(source: Source, example: Example) -> tuple[str, str]:
    return source.tokenizer.decode(example.context), source.tokenizer.decode(example.question)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [LENGTH, 2000])
def test_the_answers_are_those_that_reading_the_context_gives(source: Source, name: str, length: int) -> None:
    for seed in "01":
        example = TASKS[name].example(source, length, 0.5, seed)
        assert sorted(ORACLES[name](*texts(source, example))) == sorted(example.answers)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_prompt_and_another_one_gives_another(source: Source, name: str) -> None:
    first, again, other = (TASKS[name].example(source, LENGTH, 0.5, seed) for seed in ("0", "0", "1"))
    assert first == again
    assert first.context != other.context


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [LENGTH, 4001])
def test_a_prompt_has_the_asked_length(source: Source, name: str, length: int) -> None:
    example = TASKS[name].example(source, length, 0.5, "0")
    found = len(example.context) + len(example.question)
    assert found <= length
    assert found == length or (name in ("key-value", "common-words", "frequent-words") and found > 0.95 * length)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_answer_lies_at_the_asked_depth(source: Source, name: str, depth: float) -> None:
    context, _ = texts(source, TASKS[name].example(source, 2000, depth, "0"))
    body = context.index("\n\n") + 2
    found = (context.index(TASKS[name].example(source, 2000, depth, "0").answers[0]) - body) / (len(context) - body)
    assert found == pytest.approx(depth, abs=0.04)


@pytest.mark.parametrize("name", TASKS)
def test_a_length_without_room_is_refused_with_the_one_that_has(source: Source, name: str) -> None:
    with pytest.raises(TaskError, match=f"task {name} needs a length of at least") as refusal:
        TASKS[name].example(source, 50, 0.5, "0")
    needed = int(re.findall(r"at least (\d+)", str(refusal.value))[0])
    example = TASKS[name].example(source, needed, 0.5, "0")
    assert sorted(ORACLES[name](*texts(source, example))) == sorted(example.answers)


def test_a_question_and_its_context_are_the_whole_chat(source: Source) -> None:
    example = TASKS["single-needle"].example(source, LENGTH, 0.5, "0")
    context, question = texts(source, example)
    assert context.startswith(source.chat.head) and source.chat.tail in question
    assert source.chat.head and source.chat.tail


def test_the_score_is_the_share_of_expected_strings() -> None:
    assert score("They are 1,234 and Lima.", ["1234", "LIMA", "5"]) == pytest.approx(2 / 3)


class BaseModelTokenizer:
    """Without a chat template; a text begins with token 1."""

    bos_token_id, chat_template = 1, None

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        if not isinstance(text, str):
            return SimpleNamespace(input_ids=[self(one, add_special_tokens).input_ids for one in text])
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [2 + len(word) for word in text.split()])


def test_prompts_of_a_model_without_a_chat_template_begin_with_its_first_token() -> None:
    source = Source(BaseModelTokenizer())
    example = TASKS["single-needle"].example(source, 300, 0.5, "0")
    assert example.context[0] == 1 and 1 not in example.context[1:] + example.question
    assert len(example.context) + len(example.question) == 300
    for window in windows(source.encode("word " * 200), 2, 80, 20, source.start):
        assert window.context[0] == 1 and 1 not in window.context[1:]
        assert 80 - 63 <= len(window.context) <= 80


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    samples = np.random.default_rng(1).normal(3, 2, 400)
    found, half = bootstrap(samples), 1.96 * samples.std(ddof=1) / 20
    assert found.value == pytest.approx(samples.mean())
    assert found.low == pytest.approx(samples.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(samples.mean() + half, abs=0.1 * half)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    found = [bootstrap(rng.exponential(1.0, 60), seed=index) for index in range(200)]
    assert 0.88 < np.mean([estimate.low <= 1 <= estimate.high for estimate in found]) <= 0.99


def test_positions_of_one_text_are_resampled_together() -> None:
    texts = np.repeat(np.arange(8.0)[:, None], 100, axis=1)  # all variation is between texts
    assert bootstrap(texts) == bootstrap(texts[:, 0])
    assert bootstrap(texts.ravel()).high - bootstrap(texts.ravel()).low < 1 < bootstrap(texts).high - 3.5


def test_a_quantile_is_that_of_all_positions() -> None:
    samples = np.random.default_rng(3).random((20, 50))
    found = bootstrap(samples, quantile(0.99))
    assert found.value == pytest.approx(np.quantile(samples, 0.99))
    assert found.low < found.value < found.high


def test_equal_scores_have_an_interval_by_the_rule_of_three() -> None:
    found = share_interval(np.full(30, 100.0), 0, 100)
    assert (found.value, found.high) == (100, 100)
    assert 0.95**30 > 0.2 > (found.low / 100) ** 30 == pytest.approx(0.05)
    assert share_interval(np.array([0.0, 100.0] * 20), 0, 100) == bootstrap(np.array([0.0, 100.0] * 20))


def test_one_sample_has_no_interval() -> None:
    value, low, high = bootstrap(np.array([2.0]))
    assert value == 2 and np.isnan([low, high]).all()


def test_distances_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, found = (torch.randn(5, 40, generator=generator).log_softmax(-1) for _ in range(2))
    tokens = [3, 1, 4, 1, 5]
    result = distances(dense.numpy(), found.numpy(), tokens)
    expected = torch.nn.functional.kl_div(found, dense, log_target=True, reduction="none").sum(-1)
    assert result.kl == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.agrees == (dense.argmax(-1) == found.argmax(-1)).int().tolist()
    assert result.logprobs == pytest.approx([row[token].item() for row, token in zip(found, tokens, strict=True)])


def test_equal_distributions_are_exactly_zero_apart() -> None:
    dense = torch.randn(3, 1000).log_softmax(-1).numpy()
    result = distances(dense, dense.copy(), [0, 1, 2])
    assert result.kl == [0, 0, 0] and result.agrees == [1, 1, 1]
    with pytest.raises(ValueError, match="cannot compare"):
        distances(dense, dense[:2], [0, 1, 2])


def test_windows_do_not_overlap_and_reach_the_end() -> None:
    tokens = list(range(1000))
    found = windows(tokens, 4, 200, 50)
    assert [len(window.continuation) for window in found] == [50] * 4
    assert len({len(window.context) % 64 for window in found}) == 4
    both = [window.context + window.continuation for window in found]
    assert all(part == list(range(part[0], part[-1] + 1)) for part in both)
    assert all(a[-1] < b[0] for a, b in pairwise(both)) and both[-1][-1] == 999
    with pytest.raises(TextError, match="has 999 tokens and 4 windows of 250 need 1000"):
        windows(tokens[:-1], 4, 200, 50)


def test_tokens_are_equal_until_the_first_that_differs() -> None:
    assert equal_tokens([1, 2, 9, 4], [1, 2, 3, 4]) == 2
    assert equal_tokens([1, 2], [1, 2]) == 2


# -- verdicts -------------------------------------------------------------------------------------------------------


def raw_results(scores: Sequence[float], lost_nats: float, spread: float = 0.01) -> dict[str, Any]:
    """Forty questions and ten windows, `lost_nats` below the dense cache on average."""
    rng = random.Random(0)
    dense = [[-2 + rng.gauss(0, 1) for _ in range(20)] for _ in range(10)]
    lost = [lost_nats + rng.gauss(0, spread) for _ in dense]
    text = {
        "windows": [
            {"kl": [0.1] * 20, "agrees": [1] * 20, "dense_logprobs": row, "logprobs": [p - loss for p in row]}
            for row, loss in zip(dense, lost, strict=True)
        ],
        "greedy_tokens": [[1, 2, 3]] * 10,
    }
    questions = [{"length": 512, "depth": None, "question": "after", "score": score} for score in scores]
    return {TEXT: text, "multi-value-needle": questions}


@pytest.mark.parametrize(
    ("scores", "lost_nats", "spread", "text", "task"),
    [
        ([0.0] * 100 + [1.0] * 100, 0.1, 0.01, "worse than none", "worse than none"),
        ([1.0] * 200, 0.0, 0.001, "at most 1% worse than none", "at most 5 points worse than none"),
        ([1.0] * 190 + [0.0] * 10, 0.0, 0.2, "not decided", "worse than none"),
    ],
)
def test_a_verdict_says_what_the_interval_excludes(scores, lost_nats, spread, text, task) -> None:
    dense = raw_results([1.0] * len(scores), 0.0, 0.0)
    found = verdicts({"none": dense, "int8": raw_results(scores, lost_nats, spread)}, ["int8"])
    assert len(found) == 2
    assert "perplexity" in found[0] and text in found[0].split(": ")[2]
    assert "after compression" in found[1] and task in found[1].split(": ")[2]


def test_few_questions_decide_nothing() -> None:
    dense = raw_results([1.0] * 12, 0.0)
    assert "not decided" in verdicts({"none": dense, "int8": dense}, ["int8"])[1]
    worse = raw_results([0.0] * 7, 0.5)
    for result in (worse[TEXT]["windows"], worse[TEXT]["greedy_tokens"]):
        del result[7:]
    found = verdicts({"none": raw_results([1.0] * 7, 0.0), "int8": worse}, ["int8"])
    assert len(found) == 2 and all("not decided by 7 samples" in sentence for sentence in found)


def test_scores_are_given_by_question_length_and_depth_where_they_vary() -> None:
    def cells(lengths: Sequence[int], depths: Sequence[float | None]) -> list[dict[str, Any]]:
        results = [
            {"length": length, "depth": depth, "question": "inside", "score": depth or 0.25}
            for length in lengths for depth in depths
        ]  # fmt: skip
        return [dict(row.cell) | {"value": row.measured.value} for row in rows({"p": {"task": results}}, ["p"])]

    assert cells([512], [None, None]) == [{"question": "inside", "value": 25}]
    assert cells([512], [0.5, 1.0])[1:] == [
        {"question": "inside", "depth": 0.5, "value": 50}, {"question": "inside", "depth": 1.0, "value": 100},
    ]  # fmt: skip
    assert [set(cell) - {"question", "value"} for cell in cells([64, 128], [0.5, 1.0])] == [
        set(), *[{"length"}] * 2, *[{"length", "depth"}] * 4,
    ]  # fmt: skip


def test_a_dense_cache_that_differs_from_itself_is_reported() -> None:
    dense = raw_results([1.0], 0.0)
    assert "all KL figures hold this noise" in verdicts({"none": dense}, ["none"])[0]
    for window in dense[TEXT]["windows"]:
        window["kl"] = [0.0] * 20
    assert verdicts({"none": dense}, ["none"]) == []


def test_perplexity_over_none_is_that_of_the_mean_loss() -> None:
    found = rows({"none": raw_results([1.0], 0.0, 0.0), "int8": raw_results([1.0], 0.5, 0.0)}, ["none", "int8"])
    by_metric = {(row.policy, row.metric): row.measured.value for row in found}
    assert by_metric["int8", "perplexity over none"] == pytest.approx(100 * (np.exp(0.5) - 1))
    assert by_metric["none", "perplexity over none"] == 0


# -- a run, with an engine that is not there -------------------------------------------------------------------------


class FakeEngine:
    """Knows no answer; writes uniform distributions."""

    started: ClassVar[list[str]] = []
    failing: ClassVar[set[str]] = set()
    start_seconds = 0.0

    def __init__(self, name: str, config: Any, host: str) -> None:
        self.started.append(name)

    def __enter__(self) -> FakeEngine:
        if self.started[-1] in self.failing:
            raise command.ChildError("the process died")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def call(self, method: str, requests: Sequence[Request] = ()) -> Any:
        if method == "info":
            return {"worker_threads": 1}
        for request in requests:
            assert len(request.prompt) + len(request.forced) + request.free <= SUITES["quick"].longest
            if request.record:
                np.save(request.record, np.full((len(request.forced), 49152), -10.8, np.float32))
        return [[1] * request.free for request in requests]


ARGUMENTS = [
    "--policies", "int8", "--tasks", "text,key-value", "--examples", "1", "--windows", "2", "--text",
    "text.txt",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the text that ARGUMENTS name."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Nothing is said here. " * 400)


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(command, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(FakeEngine, "failing", set())
    return FakeEngine


def test_what_is_finished_is_not_run_again(fake_engines: type[FakeEngine], tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    fake_engines.failing = {"int8"}
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 1
    assert "int8: failed: the process died" in capsys.readouterr().err
    assert (tmp_path / "result.dense" / "dense-1.npy").exists()

    fake_engines.failing, fake_engines.started = set(), []
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    assert fake_engines.started == ["none", "int8"]  # `none` only to see that its distributions are there
    content = json.loads(out.read_text())
    assert set(content["raw"]["int8"]) == set(content["raw"]["none"]) == {"text", "key-value"}
    assert not (tmp_path / "result.dense").exists()

    fake_engines.started = []
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    assert fake_engines.started == []
    assert main(["eval", *ARGUMENTS, "--tasks", "key-value", "--policies", "kivi-4bit", "--out", str(out)]) == 0
    assert fake_engines.started == ["kivi-4bit"]
    assert set(json.loads(out.read_text())["raw"]) == {"none", "int8", "kivi-4bit"}


def test_without_the_dense_cache_nothing_else_is_measured(fake_engines: type[FakeEngine], capsys) -> None:
    fake_engines.failing = {"none"}
    assert main(["eval", *ARGUMENTS]) == 1
    assert fake_engines.started == ["none"]
    assert "none: failed: the process died" in capsys.readouterr().err


def test_dense_distributions_without_their_result_file_are_made_again(fake_engines, tmp_path: Path) -> None:
    out, stale = tmp_path / "result.json", tmp_path / "result.dense" / "dense-0.npy"
    stale.parent.mkdir()
    np.save(stale, np.zeros((8, 49152), np.float32))
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    figures = {row["metric"]: row for row in json.loads(out.read_text())["rows"]}
    assert figures["mean KL from none"]["measured"]["value"] == 0


def test_a_question_is_in_the_prompt_or_forced_behind_the_compressed_context(source: Source) -> None:
    class Host:
        def call(self, method: str, requests: Sequence[Request]) -> list[list[int]]:
            self.requests = requests
            return [source.encode(answer) for answer in ("It is 1,234.", "nothing")]

    host, counted = Host(), []
    item = TaskItem("single-needle", source, parse(["--examples", "1"]))
    inside, after = item.run(host, lambda: counted.append(1))
    whole, split = host.requests
    assert whole.prompt == split.prompt + split.forced and not whole.forced
    assert split.forced == item.questions[0].example.question
    assert (inside["question"], inside["answer"]) == ("inside", "It is 1,234.")
    assert (after["question"], after["answer"]) == ("after", "nothing")
    assert inside["expected"] == after["expected"] and inside["score"] == after["score"] == 0
    assert len(counted) == item.num_requests == 2


def test_policies_that_are_written_otherwise_and_mean_the_same_are_gone_on_with(fake_engines, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    for policy in content["policies"].values():
        policy["tile_tokens"] = 64  # the default
        del policy["layers"]
    out.write_text(json.dumps(content))
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["raw"] == content["raw"]


def test_a_result_file_of_another_run_is_not_mixed_in(fake_engines, tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 0
    assert main(["eval", *ARGUMENTS, "--seed", "1", "--out", str(out)]) == 2
    assert "holds results made with other settings" in capsys.readouterr().err
    changed = json.loads(out.read_text())
    changed["policies"]["int8"]["sink_tokens"] = 4
    out.write_text(json.dumps(changed))
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 2
    assert "holds results made with other policy int8" in capsys.readouterr().err
    out.write_text("[]")
    assert main(["eval", *ARGUMENTS, "--out", str(out)]) == 2
    assert "is no result of kvserve eval" in capsys.readouterr().err


def test_the_dense_cache_is_no_distance_from_itself(fake_engines, tmp_path: Path, capsys) -> None:
    assert main(["eval", *ARGUMENTS, "--out", str(tmp_path / "result.json")]) == 0
    figures = {row["metric"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert figures["mean KL from none"]["measured"] == {"value": 0, "low": 0, "high": 0}
    assert figures["same most likely token as none"]["measured"]["value"] == 100
    assert "question after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--policies", "kivi-3bit"], "there is no policy 'kivi-3bit'"),
        (["--policies", "kv-compress@0"], "rate"),
        (["--tasks", "needle"], "--tasks takes all, or some of text, single-needle"),
        (["--questions", "before"], "--questions takes all, or some of inside, after"),
        (["--suite", "huge"], "--suite takes quick or full"),
        (["--lengths", "12"], "--lengths takes whole numbers from 64"),
        (["--lengths", "600.5"], "--lengths takes whole numbers from 64"),
        (["--lengths", "100", "--tasks", "common-words"], "task common-words needs a length of at least"),
        (["--lengths", "9000"], "the model takes 8192; lower --lengths"),
        (["--depths", "2"], "--depths takes numbers from 0 to 1"),
        (["--examples", "0"], "--examples must be a whole number of at least 1"),
        (["--continuation", "1"], "--continuation must be a whole number of at least 2"),
        (["--windows", "9000"], "give a longer --text, or fewer --windows"),
        (["--text", "/nowhere"], "cannot read --text /nowhere"),
        (["--model", "/nowhere"], "the model folder /nowhere does not exist"),
        (["--model", "some/name"], "neither a Hugging Face folder nor a downloaded model"),
    ],
)
def test_refused_command_lines(arguments: list[str], part: str, fake_engines: type[FakeEngine], capsys) -> None:
    assert main(["eval", *arguments]) == 2
    assert part in capsys.readouterr().err
    assert not fake_engines.started


def test_two_policies_cannot_have_one_name(tmp_path: Path, capsys) -> None:
    (tmp_path / "int8.yaml").write_text("name: mine\nsummary: mine\ncodec: int8\n")
    assert main(["eval", "--policies", f"int8,{tmp_path}/int8.yaml"]) == 2
    assert "would both be called int8" in capsys.readouterr().err
    found = parse(["--policies", "kivi-4bit,none,kv-compress@4"])
    assert list(found.policies) == [
        "none",
        "kivi-4bit",
        "kv-compress@4",
    ]
