"""The benchmark without engines: what it refuses, its arithmetic, its prompts and its simulation."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvserve.arguments.parser import public_argv
from kvserve.bench import command, main, suites
from kvserve.bench.capacity import CapacityHost
from kvserve.bench.capacity import run as run_capacity
from kvserve.bench.command import Bench, pick_windows
from kvserve.bench.options import parse
from kvserve.bench.simulation import (
    hadamard_transform,
    round_trip_min_max,
    simulate_keys,
    simulate_values,
    simulated_attention,
)
from kvserve.bench.stock_attention import StockAttention
from kvserve.codecs.affine import Affine
from kvserve.errors import ChildError, UsageError
from kvserve.measuring.children import Child, describe_end
from kvserve.measuring.engines import Generated
from kvserve.measuring.machine import cpu_info, machine_id
from kvserve.measuring.results import Row, SuiteResult, interleave, ratios, spread
from kvserve.measuring.shape import ModelShape
from kvserve.pages.layout import PageLayout
from kvserve.pages.reference import decode_page, encode_page, hadamard
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy
from kvserve.prose import Prose

SHAPE = ModelShape(num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)


def silent(line: str) -> None:
    """No progress in tests."""


# -- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--policies", "none"], "must contain stock"),
        (["--policies", "stock,kivi-3bit"], "'kivi-3bit'"),
        (["--suite", "speed"], "there is no suite 'speed'"),
        (["--suite", "quality"], "needs --text FILE"),
        (["--suite", "identity", "--policies", "stock,int8"], "needs none among --policies"),
        (["--repeats", "0"], "--repeats must be"),
        (["--windows", "some"], "--windows must be"),
        (["--text", "/does/not/exist"], "cannot read --text"),
        (["--model", "/does/not/exist"], "is not a Hugging Face folder"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_wrong_command_line_exits_2_with_one_sentence(
    argv: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvserve bench: error: ")
    assert part in error
    assert len(error.splitlines()) == 1


def test_suites_that_cannot_run_are_named_as_left_out() -> None:
    options = parse(["--policies", "stock,kivi-2bit"])
    assert set(options.left_out) == {"identity", "quality", "server"}
    assert not set(options.left_out) & set(options.suites)


def test_context_and_number_of_sequences_can_be_chosen() -> None:
    assert (parse([]).sizes.context, parse([]).sizes.sequences) == (4096, 8)
    sizes = parse(["--context", "1024", "--sequences", "3"]).sizes
    assert (sizes.context, sizes.sequences) == (1024, 3)
    with pytest.raises(UsageError, match="--sequences"):
        parse(["--sequences", "0"])


def test_result_files_do_not_say_where_things_lie() -> None:
    argv = ["--text", "/a/b/text.txt", "--out=/x/y.json", "--model", "models/m", "--quick"]
    assert public_argv(argv) == ["--text", "text.txt", "--out=y.json", "--model", "m", "--quick"]


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_every_repeat_runs_every_name_once_and_starts_one_further() -> None:
    order = interleave(["a", "b", "c"], 4)
    assert order[:6] == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]
    assert order[9] == (3, "a")
    assert all(sorted(name for r, name in order if r == repeat) == ["a", "b", "c"] for repeat in range(4))


def test_ratios_are_taken_within_a_repeat() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_a_target_is_met_by_the_median() -> None:
    assert Row("s", "p", "m", "x", spread([1.0, 3.0, 4.0]), 3.0).is_met
    assert not Row("s", "p", "m", "x", spread([1.0, 3.0, 4.0]), 2.9, "<=").is_met
    assert Row("s", "p", "m", "x", spread([1.0])).is_met is None


def test_perplexity_of_uniform_guesses_is_their_number() -> None:
    assert suites.perplexity([-10 * math.log(7)], 10) == pytest.approx(7)


def test_windows_are_spread_over_the_text() -> None:
    tokens = list(range(105))
    assert [window[0] for window in pick_windows(tokens, 10, 3)] == [0, 40, 90]  # round(4.5) is 4
    assert len(pick_windows(tokens, 10, None)) == 10
    with pytest.raises(ValueError, match="needs 200"):
        pick_windows(tokens, 200, 1)


def test_cpu_model_and_flags_are_read_from_cpuinfo() -> None:
    info = cpu_info("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512f\n")
    assert info == {"cpu": "Some CPU", "isa": ["avx2", "fma", "avx512f"]}


# -- suites against engines that are not there ----------------------------------------------------------------------


class FakeEngine:
    """Answers as an engine would, at a fixed speed."""

    def __init__(self, seconds: float, offset: int = 0) -> None:
        self.seconds, self.offset = seconds, offset

    def call(self, method: str, **kwargs: Any) -> Any:
        if method == "decode_steps":
            return [self.seconds] * kwargs["num_steps"]
        if method == "log_likelihoods":
            return [-self.seconds * len(window) for window in kwargs["windows"]]
        outputs = [[sum(prompt) + self.offset] * kwargs["max_tokens"] for prompt in kwargs["prompts"]]
        return Generated(outputs, self.seconds)


def row_of(result: SuiteResult, policy: str, metric: str) -> Row:
    return next(row for row in result.rows if row.policy == policy and metric in row.metric)


def test_speed_is_stock_time_over_policy_time() -> None:
    hosts = {"stock": FakeEngine(3.0), "kivi-2bit": FakeEngine(1.0)}
    found = suites.step(hosts, [[1, 2]], 4, 2, silent)
    assert row_of(found, "kivi-2bit", "speed").measured.median == pytest.approx(3.0)
    assert row_of(found, "kivi-2bit", "speed").is_met
    found = suites.prefill(hosts, [1, 2, 3], 2, silent)
    assert row_of(found, "kivi-2bit", "time").measured.median == pytest.approx(1 / 3)
    found = suites.throughput(hosts, [[1], [2]], 8, 2, silent)
    assert row_of(found, "stock", "tokens per second").measured.median == pytest.approx(16 / 3)
    assert row_of(found, "kivi-2bit", "throughput").measured.median == pytest.approx(3.0)


@pytest.mark.parametrize(("offset", "same"), [(0, 2), (1, 0)])
def test_identity_counts_prompts_with_equal_tokens(offset: int, same: int) -> None:
    hosts = {"stock": FakeEngine(1.0), "none": FakeEngine(1.0, offset), "int8": FakeEngine(1.0)}
    found = suites.identity(hosts, [[1], [2, 3]], 4, 2, silent)
    assert row_of(found, "none", "tokens").measured.median == same
    assert row_of(found, "none", "tokens").is_met is (same == 2)
    assert row_of(found, "stock", "again").measured.median == 2


def test_quality_compares_engine_and_simulation_on_the_same_windows() -> None:
    hosts = {"stock": FakeEngine(1.0), "kivi-2bit": FakeEngine(1.1)}
    found = suites.quality(hosts, FakeEngine(1.05), [[1] * 11], 3, silent)
    assert len(found.raw["log_likelihoods_nats"]["kivi-2bit"]["simulations"]) == 3
    assert row_of(found, "kivi-2bit", "over simulated").measured.median == pytest.approx(
        100 * (math.exp(0.05 * 11 / 10) - 1)
    )
    assert row_of(found, "kivi-2bit", "over simulated").is_met is False


class Direct:
    """Calls an object in this process as Child calls one in another."""

    def __init__(self, host: object) -> None:
        self.host = host

    def call(self, method: str, **kwargs: Any) -> Any:
        return getattr(self.host, method)(**kwargs)


@pytest.mark.slow  # imports vLLM
def test_capacity_is_what_the_block_manager_holds() -> None:
    result = run_capacity(
        Direct(CapacityHost(SHAPE, "float32")), ["none", "kivi-4bit", "kivi-2bit", "kv-compress-2bit"], 4096
    )
    medians = {(row.policy, row.metric[-6:]): row.measured.median for row in result.rows}
    assert medians["none", "s fp32"] == 1
    assert medians["kivi-2bit", "16-bit"] > medians["kivi-4bit", "16-bit"] > 3
    assert medians["kv-compress-2bit", "16-bit"] > 14
    assert medians["kivi-2bit", "s fp32"] > 1.9 * medians["kivi-2bit", "16-bit"]


def test_the_result_file_holds_rows_raw_samples_and_the_machine(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
    (model / "config.json").write_text(json.dumps(config))
    argv = ["--suite", "step,needle", "--model", str(model), "--out", str(tmp_path / "deep" / "out.json")]
    bench = Bench(parse(argv), public_argv(argv))
    hosts = {"stock": FakeEngine(3.0), "kivi-2bit": FakeEngine(1.0)}
    bench._measure("step", lambda: suites.step(hosts, [[1]], 2, 2, silent))

    def fail() -> SuiteResult:
        raise ChildError("the process died")

    bench._measure("needle", fail)
    content = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert content["schema"] == 1
    assert content["model"] == {"name": "model", "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
    assert {"command", "machine", "versions", "settings", "started", "seconds"} <= set(content)
    assert content["settings"]["seed"] == 0
    assert content["raw"]["step"]["step_seconds"]["stock"] == [[3.0, 3.0], [3.0, 3.0]]
    assert content["failed"] == {"needle": "the process died"}
    fields = {"suite", "policy", "metric", "unit", "measured", "target", "sense", "is_met"}
    assert content["rows"] and all(set(row) == fields for row in content["rows"])
    assert str(tmp_path) not in json.dumps(content)


# -- child processes ------------------------------------------------------------------------------------------------


def test_a_child_answers_reports_errors_and_notices_its_death() -> None:
    with Child("test", "collections:Counter", {"a": 3, "b": 1}) as child:
        assert child.call("most_common") == [("a", 3), ("b", 1)]
        with pytest.raises(ChildError, match="AttributeError"):
            child.call("no_such_method")
        child._process.kill()
        with pytest.raises(ChildError, match=r"died \(SIGKILL, by the system where memory ran out\)"):
            child.call("most_common")
    with pytest.raises(ChildError, match="ModuleNotFoundError"):
        Child("test", "no_such_module:Thing", {})


@pytest.mark.parametrize(
    ("code", "words"),
    [(-4, "SIGILL, an instruction that this CPU"), (-11, "SIGSEGV"), (3, "exit code 3"), (None, "still running"),
     (-99, "signal 99")],
)  # fmt: skip
def test_the_end_of_a_process_is_said_in_words(code: int | None, words: str) -> None:
    assert describe_end(code).startswith(words)


def test_a_suite_whose_child_dies_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_model_folder", lambda model: tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))

    def die(self: Bench) -> SuiteResult:
        with Child("operator", "collections:Counter", {}) as child:
            os.kill(child._process.pid, signal.SIGILL)
            child.call("most_common")
        raise AssertionError("not reached")

    monkeypatch.setattr(Bench, "_operator", die)
    monkeypatch.setattr(Bench, "_capacity", lambda self: SuiteResult([], {}))
    out = tmp_path / "result.json"
    argv = ["--suite", "operator,capacity", "--policies", "stock", "--dtype", "bfloat16", "--out", str(out)]
    assert main(argv) == 1
    content = json.loads(out.read_text())
    assert set(content["raw"]) == {"capacity"}
    assert "SIGILL" in content["failed"]["operator"] and "operator: failed:" in capsys.readouterr().err


HF_CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}


# -- stock's attention ----------------------------------------------------------------------------------------------


def test_amx_is_asked_for_where_vllm_would_use_it_and_named_where_it_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True) or len(asked) == 1)
    shape = ModelShape(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64)
    assert StockAttention(shape, torch.float32, 1, 1, 128).isa == "vec" and not asked
    assert StockAttention(shape, torch.bfloat16, 1, 1, 128).isa == "amx" and asked == [True]
    with pytest.raises(RuntimeError, match=r"does not let the process use.*--dtype float32"):
        StockAttention(shape, torch.bfloat16, 1, 1, 128)


# -- machines and their records -------------------------------------------------------------------------------------

CPUINFO = "vendor_id : {}\ncpu family : {}\nmodel : {}\nmodel name : Some CPU\nflags : {}\n"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "found"),
    [
        ("AuthenticAMD", 25, 17, "avx512f avx512_bf16", "cpu-zen4"),
        ("AuthenticAMD", 25, 97, "avx512f avx512_bf16", "cpu-zen4"),
        ("AuthenticAMD", 25, 1, "avx2", "cpu-zen3"),
        ("AuthenticAMD", 26, 2, "avx512f", "cpu-zen5"),
        ("GenuineIntel", 6, 143, "avx512f amx_tile", "cpu-spr"),
        ("GenuineIntel", 6, 207, "avx512f amx_tile", "cpu-emr"),
        ("GenuineIntel", 6, 85, "avx512f avx512_vnni", "cpu-clx"),
        ("GenuineIntel", 6, 85, "avx512f", "cpu-skx"),
        ("GenuineIntel", 6, 200, "", "cpu-genuineintel-6-200"),
    ],
)
def test_a_machine_is_named_by_the_generation_of_its_cpu(
    vendor: str, family: int, model: int, flags: str, found: str
) -> None:
    assert machine_id(CPUINFO.format(vendor, family, model, flags)) == found


def test_a_machine_without_cpuinfo_is_named_by_its_architecture() -> None:
    assert machine_id("").startswith("cpu-") and " " not in machine_id("")


@pytest.mark.parametrize(
    ("suites", "dtype", "name"),
    [
        (["operator"], "float32", "cpu-spr-operator.json"),
        (["operator"], "bfloat16", "cpu-spr-operator-bfloat16.json"),
        (["step", "prefill"], "float32", "cpu-spr-step-prefill.json"),
    ],
)
def test_a_folder_gets_a_record_named_after_machine_suite_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suites: list[str], dtype: str, name: str
) -> None:
    monkeypatch.setattr("kvserve.bench.options.this_machine", lambda: "cpu-spr")
    argv = ["--suite", ",".join(suites), "--dtype", dtype, "--out"]
    assert parse([*argv, str(tmp_path)]).out == tmp_path / name
    assert parse([*argv, str(tmp_path / "own.json")]).out == tmp_path / "own.json"


# -- prompts --------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """One token per word, in order of appearance."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, **kwargs: Any) -> Any:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return type("Encoding", (), {"input_ids": [self.words.index(word) for word in text.split()]})

    def apply_chat_template(self, messages: list[Mapping[str, str]], **kwargs: Any) -> str:
        return f"<user> {messages[0]['content']} </user> <assistant>"

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
def test_the_needle_lies_at_the_depth_asked_for(depth: float) -> None:
    tokenizer = WordTokenizer()
    prompt = Prose(tokenizer, None, seed=3).needle(500, depth)
    text = tokenizer.decode(prompt.tokens)
    assert len(prompt.tokens) == 500
    assert len(prompt.answer) == 7
    assert text.count(prompt.answer) == 1
    assert tokenizer.decode(prompt.tokens[prompt.position :]).startswith(f"The secret number is {prompt.answer}.")
    assert prompt.position / 500 == pytest.approx(depth, abs=0.06)
    assert text.startswith("<user>") and text.endswith("</user> <assistant>")


def test_slices_have_the_length_asked_for_and_differ() -> None:
    prose = Prose(WordTokenizer(), "one two three four five six seven", seed=0)
    assert len(prose.slice(20)) == 20
    assert len({tuple(prose.slice(3)) for _ in range(20)}) > 1


def test_disjoint_slices_share_no_place_and_fewer_are_the_first_of_more() -> None:
    prose = Prose(WordTokenizer(), " ".join(f"word{number}" for number in range(100)), seed=4)
    slices = prose.disjoint(9, 11)
    assert [len(found) for found in slices] == [9] * 11
    assert len({token for found in slices for token in found}) == 99  # every word is a token of its own
    assert prose.disjoint(9, 3) == slices[:3]
    assert prose.disjoint(9, 11) != Prose(WordTokenizer(), "a " * 100, seed=5).disjoint(9, 11)
    with pytest.raises(ValueError, match="12 disjoint slices of 9 tokens need a longer text: it has 11"):
        prose.disjoint(9, 12)


# -- simulation -----------------------------------------------------------------------------------------------------


def random_rows(heads: int, tokens: int, seed: int = 0, head_dim: int = 64) -> torch.Tensor:
    return torch.randn(heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)[0]


def test_a_simulated_dense_policy_is_plain_attention() -> None:
    query, key, value = random_rows(4, 100), random_rows(2, 100, 1), random_rows(2, 100, 2)
    found = simulated_attention(query, key, value, 64**-0.5, load_policy("none"))
    torch.testing.assert_close(found, causal_attention(query, key, value))


def test_a_simulated_policy_is_plain_attention_within_the_first_tile_and_close_to_it_at_8_bits() -> None:
    query, key, value = random_rows(4, 200), random_rows(2, 200, 1), random_rows(2, 200, 2)
    expected = causal_attention(query, key, value)
    first = simulated_attention(query, key, value, 64**-0.5, load_policy("kivi-2bit"))[:, :64]
    torch.testing.assert_close(first, expected[:, :64], atol=2e-3, rtol=2e-3)
    fine = simulated_attention(query, key, value, 64**-0.5, load_policy("int8"))
    assert (fine - expected).square().mean() < 1e-4 * expected.square().mean()


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("name", ["int8", "kivi-4bit", "kivi-2bit", "boost-2bit"])
def test_the_simulation_agrees_with_the_pages_it_does_not_know(name: str, head_dim: int) -> None:
    policy = load_policy(name)
    assert policy.key is not None and policy.value is not None
    layout = PageLayout.build(policy, head_dim, policy.tile_tokens, torch.float32)
    key, value = random_rows(1, 64, 1, head_dim), random_rows(1, 64, 2, head_dim)
    stored = value[0] @ hadamard(head_dim) if policy.value.rotates else value[0]
    page_key, page_value = decode_page(encode_page(key[0], stored, layout, policy.sink_tokens), layout)
    read = page_value @ hadamard(head_dim) if policy.value.rotates else page_value
    sinks = policy.sink_tokens
    found = simulate_keys(key, policy.key, policy.tile_tokens, sinks)[0]
    assert (found[sinks:] - page_key[sinks:]).square().mean() < 1e-6
    assert (simulate_values(value, policy.value)[0] - read).square().mean() < 1e-6


def test_sinks_do_not_widen_the_range_of_their_group() -> None:
    key = random_rows(1, 64)
    key[:, :4] *= 1000
    found = simulate_keys(key, Affine(bits=4, group_size=64), 64, 4)
    assert (found[:, 4:] - key[:, 4:]).abs().max() < 0.3


def test_the_fast_hadamard_transform_is_orthonormal() -> None:
    for head_dim in (64, 96):
        x = random_rows(1, 8, head_dim=head_dim)
        torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)
        torch.testing.assert_close(hadamard_transform(x), x @ hadamard(head_dim))


def test_quantised_values_stay_within_half_a_step() -> None:
    x = random_rows(1, 64)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 3
    assert ((round_trip_min_max(x, 2, -1) - x).abs() <= step * 0.51).all()


def test_an_unfinished_tile_stays_as_it_is() -> None:
    policy = Policy(name="p", summary="", key=Affine(bits=2, group_size=64), value=load_policy("kivi-2bit").value)
    assert policy.key is not None
    key = random_rows(1, 100)
    found = simulate_keys(key, policy.key, 64, 0)
    assert torch.equal(found[:, 64:], key[:, 64:]) and not torch.equal(found[:, :64], key[:, :64])
