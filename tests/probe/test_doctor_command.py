"""`kvserve doctor`: what it draws, what it proposes, and one run on the default model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from kvserve.cli import main
from kvserve.doctor import command
from kvserve.doctor.examination import EndToEnd, Examination, suspects
from kvserve.doctor.proposal import LADDER, Proposal, next_codec, propose, worst_layers, write_policy
from kvserve.doctor.report import bar, draw, head_map
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy, policy_content
from kvserve.probe.distances import LayerReport, ProbeReport


def layer(index: int, codec: float = 0.1, cache: float | None = None, kernel: float = 1e-5) -> LayerReport:
    total = codec if cache is None else cache
    return LayerReport(index, 300, [kernel, 0.0], [codec, 0.0], [total, 0.0], codec, total, 1.0)


def examination(policy: str = "kivi-2bit", *layers: LayerReport, kl: float = 0.1, alone: dict | None = None):
    report = ProbeReport(list(layers) or [layer(0, 0.5), layer(1), layer(2, 0.3)])
    return Examination(policy, report, [], EndToEnd(kl, 0.9, 46), alone or {})


def drawn(found: Examination) -> str:
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as capture:
        draw(console, found)
    return capture.get()


def test_every_layer_has_its_line_and_the_worst_one_the_longest_bar() -> None:
    text = drawn(examination(alone={0: 0.2, 2: 0.05}))
    lines = [line for line in text.splitlines() if "█" in line]
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert lines[0].count("█") > lines[2].count("█") > lines[1].count("█")
    assert "0.2000" in lines[0] and "mean KL 0.1 nats" in text
    assert "kivi-2bit: fit to serve; of 3 layers 0, 2 cost most alone" in text


def test_an_unfit_policy_is_called_so_with_every_reason() -> None:
    found = replace(examination(), complaints=["layer 0 of 3: answers are not what the cache should hold"])
    assert "NOT fit to serve" in drawn(found) and "layer 0 of 3: answers" in drawn(found)
    assert not found.is_fit and found.to_dict()["fit"] is False


def test_bars_have_eighths_and_survive_infinite_values() -> None:
    assert bar(1, 1) == "█" * 20 and bar(0.5, 1) == "█" * 10 and bar(0.0125, 1) == "▎"
    assert bar(float("inf"), float("inf")) == "█" * 20 and bar(0, 0) == ""
    assert head_map(layer(0, codec=2.0)) == "█ "


def test_the_ends_are_suspects_beside_those_that_are_off_most() -> None:
    report = ProbeReport([layer(index, codec) for index, codec in enumerate([0.1, 0.4, 0.3, 0.5, 0.2])])
    assert suspects(report, 2) == [0, 1, 3, 4] and suspects(report, 0) == []


def test_the_worst_layers_are_those_that_cost_most_alone() -> None:
    assert worst_layers(examination()) == [0]
    assert worst_layers(examination(alone={0: 0.1, 2: 0.2})) == [2]
    sharing = [layer(0, 0.1), replace(layer(1, 0.5), target=0)]  # of a cache, its owner can be changed
    assert worst_layers(examination("kivi-2bit", *sharing)) == [0]
    many = [layer(index) for index in range(30)]
    assert worst_layers(examination("kivi-2bit", *many, alone={0: 0.001, 18: 0.08, 20: 0.06})) == [18, 20]


@pytest.mark.parametrize(("policy", "following"), list(zip(LADDER, [*LADDER[1:], None], strict=True)))
def test_the_next_codec_is_the_next_rung(policy: str, following: str | None) -> None:
    assert next_codec(load_policy(policy)) == following


def test_a_policy_that_loses_by_bits_gets_more_of_them() -> None:
    proposal = propose(load_policy("kivi-2bit"), examination())
    assert proposal is not None and proposal.policy.name == "kivi-2bit-doctored"
    if "layers" in Policy.model_fields:
        assert policy_content(proposal.policy)["layers"]["0"]["key"]["bits"] == 8
    else:
        assert proposal.policy.value == load_policy("boost-2bit").value


def test_a_policy_that_loses_by_evicting_keeps_more_tokens() -> None:
    few, many = ([layer(0, 0.01, 0.6), *(layer(i, 0.01, 0.2) for i in range(1, n))] for n in (2, 12))
    proposals = [propose(load_policy("kv-compress"), examination("kv-compress", *found)) for found in (few, many)]
    evictions = [proposal.policy.eviction for proposal in proposals if proposal]
    assert (evictions[0].rate, evictions[0].spare_layers) == (2, ()), "one of two layers would take the whole budget"
    assert (evictions[1].rate, evictions[1].spare_layers) == (4, (0,))
    limited = load_policy("snapkv", ["eviction.rate=null", "eviction.max_tokens=1024"])
    proposal = propose(limited, examination("snapkv", *many))
    assert proposal is not None and proposal.policy.eviction.max_tokens == 2048


def test_an_evicting_policy_that_loses_by_bits_gets_another_codec() -> None:
    proposal = propose(load_policy("kv-compress-2bit"), examination("kv-compress-2bit", layer(0, 0.5, 0.52)))
    assert proposal is not None and proposal.policy.key == load_policy("kivi-4bit").key
    assert proposal.policy.eviction == load_policy("kv-compress-2bit").eviction


def test_a_dense_cache_gets_no_proposal() -> None:
    assert propose(load_policy("none"), examination("none")) is None


def test_a_written_policy_can_be_served(tmp_path: Path) -> None:
    proposal = propose(load_policy("kv-compress-2bit"), examination("kv-compress-2bit", layer(0, 0.5, 0.52)))
    assert proposal is not None
    write_policy(tmp_path / "better.yaml", proposal)
    assert load_policy(str(tmp_path / "better.yaml")) == proposal.policy
    assert (tmp_path / "better.yaml").read_text().startswith("# Written by kvserve doctor: the codec of ")


@pytest.mark.parametrize(("kl", "is_written"), [(0.05, True), (0.1, False), (0.2, False)])
def test_a_proposal_that_is_not_better_is_not_written(kl: float, is_written: bool, tmp_path: Path) -> None:
    case = SimpleNamespace(examine=lambda examiner, policy: examination(policy.name, kl=kl))
    proposal, path = Proposal(load_policy("int8"), "a change"), tmp_path / "better.yaml"
    tried = command._try(proposal, examination(), case, None, path)  # type: ignore[arg-type]
    assert tried["written"] is path.exists() is is_written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--policy is missing"),
        (["--policy", "int9"], "there is no policy 'int9'"),
        (["--policy", "int8", "--model", "/no/such/folder"], "does not exist"),
    ],
)
def test_a_command_that_cannot_be_followed_is_refused(arguments: list[str], message: str, capsys) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_doctor_examines_the_default_model_and_writes_a_better_policy(tmp_path: Path, capsys) -> None:
    found, better = tmp_path / "found.json", tmp_path / "better.yaml"
    options = ["--policy", "kivi-2bit", "--layers", "1", "--json", str(found), "--write-policy", str(better)]
    assert main(["doctor", *options]) == 0
    content = json.loads(found.read_text())
    examined, tried = content["examination"], content["proposal"]["examination"]
    assert len(examined["report"]["layers"]) == 30 and examined["fit"]
    assert 0 < tried["end_to_end"]["kl"] < examined["end_to_end"]["kl"] < 1
    assert set(examined["alone"]) >= {"0", "29"}
    assert all(0 <= kl < examined["end_to_end"]["kl"] for kl in examined["alone"].values())
    assert load_policy(str(better)).name == "kivi-2bit-doctored"
    assert "kivi-2bit: fit to serve" in capsys.readouterr().out
