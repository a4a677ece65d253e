"""Capped logits and learned sinks: the CPU's kernels against softmaxes in float64, however tokens are kept."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvserve.attention.base import LayerSpec, PagedAttention, Stored
from kvserve.attention.native import NativeAttention, available_isas
from kvserve.attention.reference import ReferenceAttention
from kvserve.pages.kept import NOT_KEPT
from tests.cases.attention_cases import Case, build_case, make_policy, plain_logits, plain_softmax
from tests.cases.codec_cases import KEYS, VALUES
from tests.cases.kept_cases import LAYERS, Ask, KeptCase, build_kept_case

ISAS = available_isas()
FAMILIES = ["int8", "kivi-4", "kivi-2", "boosted", "dense-pages"]
KINDS: dict[str, dict[str, Any]] = {
    "capped": {"soft_cap": 2.0}, "sinks": {"sinks": True}, "both": {"soft_cap": 2.0, "sinks": True},
}  # fmt: skip
BOTH = KINDS["both"]
INTEGERS = 4e-4  # what rounding factors of codes to integers leaves
# Evicted or whole, one row or a few, a prompt, a token that completes a tile, heads that keep nothing.
ASKS = (
    Ask(128, 200, 1, (70, 3, 0, 124)), Ask(0, 70, 1), Ask(64, 71, 9, (60, 17, 1, 40)), Ask(0, 0, 75), Ask(0, 127, 1),
    Ask(0, 0, 1),
)  # fmt: skip


@functools.cache
def kept_case(family: str, kind: str, **options: Any) -> tuple[KeptCase, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """A step over every place that tokens can have, and its answers by layer."""
    case = build_kept_case(make_policy(family), list(ASKS), **KINDS[kind], **options)
    return case, {layer: case.expected(layer) for layer in LAYERS}


@functools.cache
def compared_case(family: str, computed: tuple[int, ...], new_tokens: tuple[int, ...], **options: Any) -> Any:
    """A step with the reference's answers."""
    case = build_case(make_policy(family), computed=list(computed), new_tokens=list(new_tokens), **options)
    return case, *case.run(case.reference)


def plain_answers(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers and LSE of a step in which every token is dense, float64."""
    outputs, sums, row = [], [], 0
    spec, window = case.spec, case.spec.sliding_window or 10**6
    lengths, past = case.batch.seq_lens.tolist(), zip(case.past_key, case.past_value, strict=True)
    for length, (past_key, past_value) in zip(lengths, past, strict=True):
        new = slice(row, row + length - len(past_key))
        key, value = (
            torch.cat(both).to(case.layout.dense_dtype).double().repeat_interleave(spec.group, 1)
            for both in ((past_key, case.key[new]), (past_value, case.value[new]))
        )
        for p, query in enumerate(case.query[new].double(), len(past_key)):
            seen = slice(max(0, p + 1 - window), p + 1)
            logits = plain_logits(torch.einsum("hd,thd->ht", query, key[seen]) * spec.scale, spec)
            weights, lse = plain_softmax(logits, spec.sink_logits)
            outputs.append(torch.einsum("ht,thd->hd", weights, value[seen]))
            sums.append(lse)
        row = new.stop
    return torch.stack(outputs), torch.stack(sums)


def check(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], most: float) -> None:
    for mine, wanted in zip(found, expected, strict=True):
        assert (mine.double() - wanted.double()).abs().max() <= most


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_answers_as_a_plain_softmax(family: str, kind: str) -> None:
    case, expected = kept_case(family, kind)
    for layer in LAYERS:
        check(case.run(ReferenceAttention(case.layout, case.spec), layer), expected[layer], 2e-5)


def test_caps_and_sinks_are_no_small_matter_in_these_cases() -> None:
    case, expected = kept_case("int8", "both")
    for missing in ({"soft_cap": None}, {"sink_logits": None}):
        output, lse = case.run(ReferenceAttention(case.layout, replace(case.spec, **missing)), LAYERS[0])
        assert (output - expected[LAYERS[0]][0]).abs().max() > 0.1
        assert (lse - expected[LAYERS[0]][1]).abs().max() > 0.1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_native_kernels_answer_as_a_plain_softmax(family: str, kind: str, isa: str) -> None:
    case, expected = kept_case(family, kind)
    for layer in LAYERS:
        check(case.run(NativeAttention(case.layout, case.spec, isa), layer), expected[layer], INTEGERS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mass", [None, 3.0])
@pytest.mark.parametrize("group", [1, 5, 8])
def test_groups_of_any_size_and_log_masses_behind_the_cap(group: int, mass: float | None, isa: str) -> None:
    case, expected = kept_case("kivi-4", "both", group=group, mass=mass, head_dim=96)
    for layer in LAYERS:
        check(case.run(NativeAttention(case.layout, case.spec, isa), layer), expected[layer], INTEGERS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", [*(f"{key}+affine" for key in KEYS), *(f"affine+{value}" for value in VALUES)])
def test_every_codec_matches_the_reference(family: str, isa: str) -> None:
    case, *expected = compared_case(family, (70, 128), (1, 9), **BOTH)
    check(case.run(NativeAttention(case.layout, case.spec, isa, case.tables)), expected, 5e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 80), (7, 256)])
def test_dense_tokens_and_windows_answer_as_a_plain_softmax(
    group: int, head_dim: int, window: int | None, isa: str
) -> None:
    options = {"group": group, "head_dim": head_dim, "sliding_window": window}
    case, *by_reference = compared_case("dense", (0, 15, 100, 33), (1, 1, 1, 70), **options, **BOTH)
    expected = plain_answers(case)
    check(by_reference, expected, 2e-5)
    check(case.run(NativeAttention(case.layout, case.spec, isa)), expected, 2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [7, 130])
@pytest.mark.parametrize("family", ["int8", "boosted"])
def test_windows_over_pages_match_the_reference(family: str, window: int, isa: str) -> None:
    case, *expected = compared_case(family, (63, 200, 128), (1, 1, 70), sliding_window=window, **BOTH)
    check(case.run(NativeAttention(case.layout, case.spec, isa)), expected, INTEGERS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["kivi-2", "dense"])
def test_a_sink_counts_once_where_a_context_is_divided(family: str, isa: str) -> None:
    case, *expected = compared_case(family, (2048, 4199, 69), (1, 1, 1), num_kv_heads=1, group=2, **BOTH)
    if family == "dense":
        check(expected, plain_answers(case), 2e-5)
    check(case.run(NativeAttention(case.layout, case.spec, isa)), expected, INTEGERS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("new_tokens", [1, 2])
@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_logits_of_every_size_are_capped_exactly(soft_cap: float, new_tokens: int, isa: str) -> None:
    """The LSE of a request's first token is its only logit."""
    logits = torch.cat([torch.linspace(-1, 1, 129), torch.linspace(-400, 400, 129), torch.tensor([0.0, 1e-6, 1e30])])
    count = len(logits)
    case = build_case(
        make_policy("dense"), computed=[0] * count, new_tokens=[new_tokens] * count, num_kv_heads=1, group=1,
        soft_cap=soft_cap,
    )  # fmt: skip
    case.query.zero_()[:, 0, 0], case.key.zero_()[:, 0, 0] = 1.0, 1.0
    case.query[::new_tokens, 0, 0] = logits / case.spec.scale
    _, lse = case.run(NativeAttention(case.layout, case.spec, isa))
    expected = soft_cap * torch.tanh(logits.double() / soft_cap)
    torch.testing.assert_close(lse[::new_tokens, 0].double(), expected, rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("isa", ISAS)
def test_sinks_at_both_ends(isa: str) -> None:
    """-inf is no sink at all, bit for bit; one that takes everything leaves zeros, and no NaN."""
    case, _ = kept_case("boosted", "sinks")
    native = functools.partial(NativeAttention, case.layout, isa=isa)
    none = case.run(native(spec=replace(case.spec, sink_logits=None)), 0)
    absent = case.run(native(spec=replace(case.spec, sink_logits=torch.full((6,), -torch.inf))), 0)
    assert all(torch.equal(*pair) for pair in zip(none, absent, strict=True))
    output, lse = case.run(native(spec=replace(case.spec, sink_logits=torch.full((6,), 1e4))), 0)
    assert (output == 0).all() and (lse == 1e4).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_logit_that_is_not_a_number_is_not_capped_to_one(isa: str) -> None:
    case = build_case(make_policy("dense"), computed=[0], new_tokens=[2], soft_cap=2.0)
    case.query[1, 0, 0] = torch.nan
    output, _ = case.run(NativeAttention(case.layout, case.spec, isa))
    assert output[1, 0].isnan().all() and output[1, 1:].isfinite().all()


# -- what tokens receive -----------------------------------------------------------------------------------------------


def query_rows(rows: int, spec: LayerSpec) -> torch.Tensor:
    return torch.randn(rows, spec.num_heads, 64, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize(("power", "reduce"), [(1, "sum"), (2, "sum"), (1, "max")])
def test_attention_sums_are_those_of_a_plain_softmax(power: int, reduce: str, isa: str) -> None:
    case = build_case(make_policy("dense"), computed=[133], new_tokens=[1], **BOTH)
    keys = case.past_key[0].to(case.layout.dense_dtype).double().repeat_interleave(case.spec.group, 1)
    query, probabilities = query_rows(40, case.spec), torch.zeros(40, 6, 133, dtype=torch.float64)
    for row in range(40):
        seen = 133 - 40 + row + 1
        logits = torch.einsum("hd,thd->ht", query[row].double(), keys[:seen]) * case.spec.scale
        probabilities[row, :, :seen], _ = plain_softmax(plain_logits(logits, case.spec), case.spec.sink_logits)
    powers = probabilities**power
    expected = powers.amax(0) if reduce == "max" else powers.sum(0)
    stored = Stored(case.cells, case.batch.block_table[0], 133)
    found = attention_of(case, isa).attention_sums(query, stored, power, reduce)
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-6)


def attention_of(case: Case | KeptCase, isa: str) -> PagedAttention:
    if isa == "reference":
        return ReferenceAttention(case.layout, case.spec)
    return NativeAttention(case.layout, case.spec, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mass", [None, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_sums_of_evicted_requests_match_the_reference(family: str, mass: float | None, isa: str) -> None:
    if family == "dense-pages" and mass:
        pytest.skip("dense pages have no log-masses")
    case, _ = kept_case(family, "both", mass=mass)
    for layer in LAYERS:
        for r in (0, 1, 2, 4):
            stored = Stored(case.arena[:, :, layer], case.batch.block_table[r], case.asks[r].computed, kept_of(case, r))
            query = query_rows(5, case.spec)
            found, expected = (
                attention_of(case, kernels).attention_sums(query, stored) for kernels in (isa, "reference")
            )
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)
            assert (found.sum(1) < 5).all()


def kept_of(case: KeptCase, r: int) -> Any:
    return case.kept_of(r) if case.asks[r].end else NOT_KEPT


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("family", ["kivi-2", "dense-pages"])
def test_what_tokens_and_sinks_receive_is_one_for_every_query(family: str, group: int, isa: str) -> None:
    case, expected = kept_case(family, "both", group=group, exact=True)
    attention, asked = attention_of(case, isa), [0, 1, 4, 5]
    for layer in LAYERS:
        lse = expected[layer][1]
        shares = (case.spec.sink_logits.double() - lse).exp().view(len(lse), -1, group).sum(-1)
        for power in (1, 2):
            sums = case.received(attention, layer, power, asked)
            by_reference = case.received(ReferenceAttention(case.layout, case.spec), layer, power, asked)
            for r in asked:
                torch.testing.assert_close(sums[r], by_reference[r], rtol=1e-3, atol=2e-5)
                row = sum(ask.new for ask in case.asks[:r])
                if power == 1:
                    total = (sums[r] - 1).double().sum(1) + shares[row]
                    torch.testing.assert_close(total, torch.full_like(total, group), rtol=1e-4, atol=1e-3)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [NativeAttention, ReferenceAttention])
def test_caps_and_sinks_that_kernels_cannot_use_are_refused(kernels: type[PagedAttention]) -> None:
    layout = build_case(make_policy("kivi-2"), computed=[0], new_tokens=[1]).layout
    for cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="soft_cap must be positive and finite, or None"):
            kernels(layout, LayerSpec(6, 2, 0.1, soft_cap=cap))
    for sinks in (torch.zeros(2), torch.zeros(6).bfloat16(), torch.zeros(12)[::2], torch.zeros(6, 1)):
        with pytest.raises(ValueError, match=r"sink_logits must be contiguous float32 \[6\]"):
            kernels(layout, LayerSpec(6, 2, 0.1, sink_logits=sinks))
