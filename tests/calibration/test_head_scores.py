"""Heads that look for what came before: scores against sums over single tokens, and against transformers' attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvserve.attention.base import LayerSpec
from kvserve.calibrate.heads import joined
from kvserve.calibration.artefact import Cache, CalibrationError, read
from kvserve.calibration.head_scores import HeadScores, Repeats, head_scores, highest, of_kv_heads
from kvserve.calibration.methods.razor import Razor
from kvserve.cli import main
from kvserve.policies.loading import load_policy

PROMPT = Repeats(2, 16, 3)


def scores_of_weights(weights: torch.Tensor, prompt: Repeats) -> tuple[float, float]:
    """Echo and induction of one head from its probabilities [tokens, tokens], token by token."""
    echo = induction = 0.0
    for position in range(prompt.period, prompt.period * prompt.repeats):
        for earlier in range(position % prompt.period, position, prompt.period):
            echo += float(weights[prompt.start + position, prompt.start + earlier])
            induction += float(weights[prompt.start + position, prompt.start + earlier + 1])
    count = prompt.period * (prompt.repeats - 1)
    return echo / count, induction / count


@pytest.mark.parametrize("with_cap_and_sinks", [False, True])
def test_scores_are_the_mean_attention_to_earlier_occurrences_and_to_what_followed_them(
    with_cap_and_sinks: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(PROMPT.num_tokens, 6, 8, generator=generator) * 3
    key = torch.randn(PROMPT.num_tokens, 2, 8, generator=generator)
    sinks = torch.randn(6, generator=generator) if with_cap_and_sinks else None
    found = head_scores(query, key, LayerSpec(6, 2, 0.3, None, 0, 1.5 if with_cap_and_sinks else None, sinks), PROMPT)
    seen = torch.ones(PROMPT.num_tokens, PROMPT.num_tokens).tril().bool()
    for head in range(6):
        logits = query[:, head].double() @ key[:, head // 3].double().T * 0.3
        logits = 1.5 * (logits / 1.5).tanh() if with_cap_and_sinks else logits
        weights = logits.exp() * seen
        of_sink = 0.0 if sinks is None else sinks[head].exp()
        weights = weights / (weights.sum(1, keepdim=True) + of_sink)
        expected = scores_of_weights(weights, PROMPT)
        assert (float(found.echo[head]), float(found.induction[head])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("shift", "kind"), [(0, "echo"), (1, "induction")])
def test_a_head_that_looks_for_one_of_them_has_that_score(shift: int, kind: str) -> None:
    """Keys are their token's own direction; the query asks for the token itself, or for the one behind it."""
    own = torch.eye(PROMPT.period).repeat(PROMPT.repeats, 1)
    key = torch.cat([torch.zeros(PROMPT.start, PROMPT.period), own])[:, None]
    query = torch.cat([torch.zeros(PROMPT.start, PROMPT.period), own.roll(-shift, 0)])[:, None]
    found = head_scores(query, key, LayerSpec(1, 1, 30.0), PROMPT)._asdict()
    other = found["induction" if kind == "echo" else "echo"]
    # An echo query sees itself too: of 2 or 3 equal tokens it has 1 or 2 earlier ones.
    assert float(found[kind]) == pytest.approx((1 / 2 + 2 / 3) / 2 if kind == "echo" else 1, abs=0.05)
    assert float(other) < 0.05


def test_a_kv_head_has_the_best_of_its_queries_and_at_least_one_is_chosen() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.3, 0.0, 0.9, 0.4]])
    of_heads = of_kv_heads(scores, 2)
    assert torch.equal(of_heads, torch.tensor([[0.5, 0.2], [0.3, 0.9]]))
    assert highest(of_heads, 0.01).tolist() == [[False, False], [False, True]]
    assert highest(of_heads, 0.5).tolist() == [[True, False], [False, True]]
    assert int(highest(torch.rand(30, 3), 0.14).sum()) == 13
    assert highest(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]


def test_the_heads_of_either_kind_are_whole() -> None:
    echo, induction = torch.zeros(10, 20), torch.zeros(10, 20)
    echo[3, 7], echo[2, 0], induction[1, :14], induction[9, 19] = 0.9, 0.8, 0.5, 0.7
    tables = Razor(induction=0.075).choose(HeadScores(echo, induction), 10)
    assert torch.equal(tables["heads.echo"], of_kv_heads(echo, 10))
    expected = torch.zeros(10, 10, dtype=torch.int8)
    expected[3, 3], expected[9, 9], expected[1, :7] = 1, 1, 1  # 1 % of 100 heads, and 7.5 %, rounded
    assert torch.equal(tables["heads.whole"], expected)


def test_the_prompt_repeats_different_tokens_and_fits_the_context() -> None:
    vocabulary, method = range(100, 1100), Razor()
    tokens, prompt = method.prompt(vocabulary, [7], 8192, 0)
    assert prompt == Repeats(1, 512, 4) and len(tokens) == prompt.num_tokens == 2049
    assert tokens[0] == 7 and tokens[1:513] == tokens[513:1025] == tokens[-512:]
    assert len(set(tokens[1:513])) == 512 and set(tokens[1:]) <= set(vocabulary)
    assert tokens == method.prompt(vocabulary, [7], 8192, 0)[0] != method.prompt(vocabulary, [7], 8192, 1)[0]
    assert method.prompt(vocabulary, [], 1000, 0)[1] == Repeats(0, 250, 4)
    assert method.prompt(range(40), [], 1000, 0)[1].period == 40
    with pytest.raises(ValueError, match=r"4 times 16 different tokens do not fit a context of 63 tokens"):
        method.prompt(vocabulary, [], 63, 0)


def test_scores_of_ranks_are_put_in_their_heads_places() -> None:
    cache = Cache(2, 4, 64)
    ranks = [
        {layer: (first, [layer + first / 10] * 4, [0.5] * 4) for layer in range(2)} for first in (0, 2)
    ]  # two KV heads, four query heads each
    echo, induction = joined(ranks, cache, 2)
    assert echo.tolist()[1] == pytest.approx([1.0] * 4 + [1.2] * 4) and (induction == 0.5).all()
    with pytest.raises(CalibrationError, match="of all heads of its 2 layers"):
        joined(ranks[:1], cache, 2)


# -- with a model ---------------------------------------------------------------------------------------------------


def test_a_model_is_calibrated_and_its_policy_keeps_those_heads_whole(tiny: Path, tmp_path: Path, capsys) -> None:
    """Against the probabilities that transformers gives out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvserve.calibration.fingerprint import fingerprint
    from kvserve.engine.layer_tables import find_calibration

    file, cache = tmp_path / "razor.safetensors", Cache(2, 2, 64)
    options = ["--dtype", "float32", "--set", "period=64", "--out", str(file)]
    assert main(["calibrate", "--model", str(tiny), "--method", "razor", *options]) == 0, capsys.readouterr().err
    found = read(file, fingerprint(tiny), cache, "")
    assert (found.origin.corpus, found.origin.num_tokens, found.origin.importance) == ("random-tokens", 256, "none")

    method, tokenizer = found.origin.method, AutoTokenizer.from_pretrained(tiny)
    assert isinstance(method, Razor)
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    tokens, prompt = method.prompt(vocabulary, [], 2047, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        weights = torch.stack(model(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0]
    scores = torch.tensor([[scores_of_weights(head, prompt) for head in layer] for layer in weights])
    best = scores.unflatten(1, (2, 3)).amax(2)  # [layers, kv_heads, 2]
    tables = found.head_tables()
    torch.testing.assert_close(tables["heads.echo"], best[..., 0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(tables["heads.induction"], best[..., 1], rtol=1e-3, atol=1e-6)
    expected = {int(best[..., kind].argmax()) for kind in (0, 1)}
    assert set(tables["heads.whole"].flatten().nonzero()[:, 0].tolist()) == expected

    policy = load_policy("razor", [f"calibration={file}"])
    assert policy.eviction.budget.whole == "calibrated"
    fitted = policy.with_head_tables(find_calibration(policy, str(tiny), cache).head_tables())
    assert fitted.eviction.budget.whole == tuple(sorted((head // 2, head % 2) for head in expected))


def test_a_policy_without_its_calibration_and_one_of_rows_are_refused(tiny: Path, tmp_path: Path) -> None:
    from kvserve.calibration.fits import check_fits
    from kvserve.calibration.methods.kvquant import Kvquant
    from kvserve.checks import check_calibration
    from kvserve.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"reads a table heads\.whole"):
        check_calibration(load_policy("razor", ["calibration=null"]))
    with pytest.raises(UnsupportedError, match="nothing reads the calibration"):
        check_calibration(load_policy("razor", ["eviction.budget=uniform"]))
    with pytest.raises(ValueError, match=r"reads a table heads\.whole .* \(kvquant\) has none"):
        check_fits(load_policy("razor"), Kvquant(), 64)
    with pytest.raises(ValueError, match="no calibration has been read"):
        load_policy("razor").eviction.budget.allocate(torch.zeros(1, 2, 640), 64, 8)
