"""`kvserve inspect`: what is drawn is what was kept, and what cannot be drawn is refused with the fix."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kvserve.cli import main
from kvserve.default_model import prepare_default_model
from kvserve.eviction.observer import Selection
from kvserve.inspect import terminal
from kvserve.inspect.result import Inspection, KeptTokens
from kvserve.policies.loading import load_policy
from tests.cases.engine_cases import STORY

LAYERS, KV_HEADS, SINKS, END, NUM_TOKENS = 3, 2, 4, 64, 70
REPORT = {"tokens_cached": 70, "tokens_kept": 20.0, "bytes_held": 12345, "rate_requested": 4.0, "rate_effective": 3.5}


@pytest.fixture
def recorded() -> tuple[KeptTokens, list[list[list[int]]]]:
    """A recording of random choices, and the positions it must show."""
    generator = torch.Generator().manual_seed(0)
    recorder, expected, counts = KeptTokens(), [], []
    for layer in range(LAYERS):
        sizes = [5 + layer, 20]
        chosen = [torch.randperm(END - SINKS, generator=generator)[:size].sort().values for size in sizes]
        scores = [torch.zeros(END - SINKS)] * len(chosen)
        sources = [head.flip(0) for head in chosen]  # rows are in any order
        recorder.selected("a", layer, Selection(SINKS, [END] * len(chosen), chosen, scores, sources))
        stays = [{*range(SINKS), *range(END, NUM_TOKENS), *(head + SINKS).tolist()} for head in chosen]
        expected.append([sorted(positions) for positions in stays])
        counts.append([size + SINKS + NUM_TOKENS - END for size in sizes])
    kept = torch.tensor(counts)
    recorder.evicted("a", NUM_TOKENS, NUM_TOKENS - kept, kept, torch.zeros_like(kept))
    return recorder, expected


@pytest.fixture
def inspection(recorded) -> Inspection:
    words = [f"w{i}" + ("\n" if i % 10 == 9 else " ") for i in range(NUM_TOKENS)]
    return Inspection("snapkv", "a-model", "1 of 4", words, recorded[0].positions, REPORT)


def test_a_recording_has_the_positions_that_stay(recorded) -> None:
    recorder, expected = recorded
    assert recorder.num_tokens == NUM_TOKENS
    assert recorder.positions == expected


def test_shares_are_those_of_the_heads_that_keep_a_token(inspection: Inspection) -> None:
    expected = np.zeros((LAYERS, NUM_TOKENS))
    for layer in range(LAYERS):
        for position in range(NUM_TOKENS):
            expected[layer, position] = np.mean([position in head for head in inspection.positions[layer]])
    np.testing.assert_allclose(inspection.layer_shares(), expected)
    np.testing.assert_allclose(inspection.token_shares(), expected.mean(0))
    assert inspection.kept_counts().tolist() == [[15 + layer, 30] for layer in range(LAYERS)]


def test_the_json_has_every_position(inspection: Inspection) -> None:
    content = json.loads(json.dumps(inspection.to_dict()))
    assert content["positions"] == inspection.positions
    assert content["kept_tokens"] == inspection.kept_counts().tolist()
    assert len(content["token_shares"]) == len(content["tokens"]) == NUM_TOKENS
    assert content["report"] == REPORT


def test_both_maps_have_a_line_for_each_layer_and_fit_the_width(inspection: Inspection) -> None:
    numbered = [line.plain for line in terminal.count_lines(inspection.kept_counts(), 120)]
    assert [line.split()[2:] for line in numbered] == [["15", "30"], ["16", "30"], ["17", "30"]]
    unnumbered = [line.plain for line in terminal.count_lines(inspection.kept_counts(), 12)]
    assert [line[-2:] for line in unnumbered] == ["▒█", "▒█", "▒█"]
    for width in (30, 200):
        lines = [line.plain for line in terminal.position_lines(inspection.layer_shares(), width)]
        assert len(lines) == LAYERS and {len(line) for line in lines} == {min(width, terminal.LABEL_WIDTH + NUM_TOKENS)}
        assert all(line[terminal.LABEL_WIDTH] == line[-1] == "█" for line in lines), "sinks and the last tokens stay"


@pytest.mark.parametrize(("share", "character"), [(0, " "), (0.19, " "), (0.21, "░"), (0.99, "█"), (1, "█")])
def test_shades(share: float, character: str) -> None:
    assert terminal.shade(share) == character


def test_the_text_without_colours_shows_what_most_heads_keep(inspection: Inspection) -> None:
    words = terminal.shaded_text(inspection, has_colors=False).plain.split()
    shares = inspection.token_shares()
    assert [set(word) == {"·"} for word in words] == [share < 0.5 for share in shares]
    assert terminal.shaded_text(inspection, has_colors=True).plain == "".join(inspection.tokens)


@pytest.mark.parametrize("color_system", [None, "truecolor"])
def test_the_drawing_says_how_much_is_kept(inspection: Inspection, color_system) -> None:
    console = Console(width=100, color_system=color_system, force_terminal=color_system is not None, highlight=False)
    with console.capture() as capture:
        terminal.draw(console, inspection)
    text = capture.get()
    assert "of 70 tokens a KV head keeps 23.0 on average, 15 to 30; 12,345 bytes" in text
    assert ("dots for tokens" in text) == (color_system is None)


def test_the_png_is_an_image(inspection: Inspection, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kvserve.inspect.png import write_png

    write_png(tmp_path / "kept.png", inspection)
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["text"], "--policy is missing; policies that evict: ada-snapkv,"),
        (["--policy", "int8", "text"], "policy int8 keeps every token; policies that evict: ada-snapkv,"),
        (["--policy", "snapkv"], "give the prompt as an argument, or a file with --prompt-file FILE"),
        (["--policy", "snapkv", "text", "--prompt-file", "x"], "give the prompt as an argument, or a file"),
        (["--policy", "snapkv", "--prompt-file", "/nowhere"], "cannot read --prompt-file /nowhere"),
        (["--policy", "snapkv", "--compression-rate", "0", "text"], "rate"),
        (["--policy", "snapkv", "--model", "./nowhere", "text"], "the model folder ./nowhere does not exist"),
    ],
)
def test_refused_command_lines(arguments: list[str], part: str, capsys) -> None:
    assert main(["inspect", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_a_png_without_matplotlib_is_refused_before_the_engine_starts(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", "--policy", "snapkv", "text", "--png", "kept.png"]) == 2
    assert 'pip install "kvserve[plot]"' in capsys.readouterr().err


def test_a_prompt_through_the_engine_keeps_what_streaming_llm_keeps(monkeypatch) -> None:
    """Its first four tokens and its newest: the only policies whose choice needs no model."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    from kvserve.inspect.engine import inspect_prompt

    for name in ("VLLM_PLUGINS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _cached_get_attn_backend.cache_clear()
    policy = load_policy("streaming-llm", ["eviction.rate=2"])
    inspection = inspect_prompt(policy, str(prepare_default_model()), STORY * 4, "float32")
    num_tokens = len(inspection.tokens)
    assert "".join(inspection.tokens) == STORY * 4
    end = num_tokens // 64 * 64
    kept_tokens = -(-(-(-num_tokens // 2) - num_tokens % 64) // 64) * 64
    expected = [*range(4), *range(end - kept_tokens + 4, num_tokens)]
    assert inspection.positions == [[expected] * 3] * 30
    assert inspection.report["tokens_kept"] == len(expected)
