"""The probe: every kind of damage is found, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvserve.attention.base import LayerSpec
from kvserve.attention.native import available_isas
from kvserve.codecs.registry import CODECS
from kvserve.pages.kept import arena_of, kept_page, read_header
from kvserve.pages.layout import PageLayout
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from kvserve.probe.distances import KERNEL_LIMIT, LayerReport, ProbeReport, complaints, layers_text
from kvserve.probe.history import LayerHistory
from kvserve.probe.request import plan_test, prompt_tokens
from tests.cases.attention_cases import make_batch
from tests.cases.damages import DAMAGES, LAYERS_OF, Before, decodes, shifted_sections, tables_of_another_head
from tests.cases.doctor_cases import DAMAGED_LAYER, Damage, Machine, Request, Step

pytestmark = pytest.mark.skipif(not available_isas(), reason="no kernel library is built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_in_the_layer_that_has_it(name: str) -> None:
    policy, damage = DAMAGES[name]
    machine = Machine(load_policy(policy), damage=damage, **LAYERS_OF.get(name, {}))
    report = machine.run()
    broken, whole = report.layers[DAMAGED_LAYER], report.layers[1 - DAMAGED_LAYER]
    print(f"{name}: kernel {broken.kernel:.3g}, codec {broken.codec:.3g}")
    (sentence,) = [found for found in complaints(report, machine.num_rows) if "should hold" in found]
    assert sentence.startswith(f"layer {DAMAGED_LAYER} of 2: ")
    assert broken.kernel > 5 * KERNEL_LIMIT
    assert whole.kernel < KERNEL_LIMIT


CODED = ("kivi-2bit", "boost-2bit", "gear-2bit", "kvquant-2bit", "cq-4c8b")
SHIFTED = {
    f"{name}: {section}": (name, damage)
    for name in CODED
    for section, damage in shifted_sections(load_policy(name)).items()
}


def test_the_sections_of_every_codec_are_damaged() -> None:
    stages = {stage.name for name in CODED for _, codec in load_policy(name).codecs for stage in codec.chain()}
    assert stages == set(CODECS)


@pytest.mark.parametrize("name", SHIFTED)
def test_a_section_that_is_shifted_by_an_element_is_found(name: str) -> None:
    policy, damage = SHIFTED[name]
    report = Machine(load_policy(policy), damage=damage).run()
    broken, whole = report.layers[DAMAGED_LAYER], report.layers[1 - DAMAGED_LAYER]
    assert broken.kernel > 5 * KERNEL_LIMIT
    assert whole.kernel < KERNEL_LIMIT


@pytest.mark.parametrize("policy", ["kvquant-2bit", "cq-4c8b"])
def test_tables_of_another_head_are_found(policy: str) -> None:
    report = Machine(load_policy(policy), damage=Before(decodes(tables_of_another_head))).run()
    assert report.layers[DAMAGED_LAYER].kernel > 5 * KERNEL_LIMIT
    assert report.layers[1 - DAMAGED_LAYER].kernel < KERNEL_LIMIT


def test_there_are_more_than_twenty_kinds_of_damage() -> None:
    assert len(DAMAGES) >= 20


class _OneBlockTwice(Damage):
    """The block manager gives a request the same block for two tiles; kernels and probe see the same table."""

    def before(self, step: Step) -> None:
        row, first = step.batch.block_table, step.attention.layout.tile_row(1)
        row[0, first + 1] = row[0, first]
        step.batch = replace(step.batch, block_table=row)


def test_a_block_table_that_is_wrong_for_everybody_is_found() -> None:
    assert "should hold" in Machine(load_policy("kivi-4bit"), damage=_OneBlockTwice()).complaints()[0]


def test_a_step_that_begins_where_the_last_one_did_not_end_is_found() -> None:
    machine = Machine(load_policy("int8"))
    probe = machine.probe.layers[0]
    machine.run()
    rows = torch.zeros(1, 2, 64)
    wrong = make_batch(machine.layout, [7], [1], torch.zeros(1, 8, dtype=torch.int32))
    probe.observe(rows.repeat(1, 3, 1), rows, rows, rows.repeat(1, 3, 1), machine.arena[:, :, 0], wrong)
    assert "begins behind token 7" in complaints(machine.probe.report(), machine.num_rows)[0]


def test_weights_that_a_codec_cannot_hold_are_called_that() -> None:
    machine = Machine(load_policy("int8"))
    machine.spread = machine.spread * 0 + 1e5  # float16 ends at 65504
    found = machine.complaints()
    assert len(found) == 1 and found[0].endswith("these weights need more bits")


def test_queries_that_were_not_seen_are_missed() -> None:
    machine = Machine(load_policy("int8"))
    report = machine.run()
    assert complaints(report, machine.num_rows + 1) == [
        f"layers 0 and 1 answered {machine.num_rows} queries of {machine.num_rows + 1}"
    ]


# -- no damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
def test_shipped_policies_raise_no_alarm(policy: str) -> None:
    assert Machine(load_policy(policy), seed=1).complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", policy_names())
def test_shipped_policies_raise_no_alarm_over_twenty_seeds(policy: str, dtype: torch.dtype) -> None:
    for seed in range(20):
        machine = Machine(load_policy(policy), seed, dtype)
        report = machine.run()
        assert complaints(report, machine.num_rows) == []
        assert report.worst("kernel").kernel < KERNEL_LIMIT / 4, "the limit keeps its distance from rounding"


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("none", {"sliding_window": 96}),
        ("kivi-2bit", {"sliding_window": 96}),
        ("kivi-2bit", {"block_tiles": 2}),
        ("kv-compress-2bit", {"block_tiles": 2}),
    ],
)
def test_windows_and_blocks_of_several_tiles_raise_no_alarm(policy: str, changes: dict) -> None:
    assert Machine(load_policy(policy), **changes).complaints() == []


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("none", []), ("kivi-2bit", []), ("boost-2bit", []), ("h2o", []), ("kv-compress-2bit", []),
        ("snapkv", ["eviction.retention=compensate"]),
    ],
)  # fmt: skip
def test_capped_logits_and_learned_sinks_raise_no_alarm(policy: str, changes: list[str]) -> None:
    assert Machine(load_policy(policy, changes), soft_cap=2.0, sinks=True).complaints() == []


def test_layers_that_keep_all_their_tokens_raise_no_alarm() -> None:
    machine = Machine(load_policy("kv-compress-2bit", ["eviction.rate=1.5", "eviction.spare_layers=[1]"]))
    assert machine.complaints() == []
    cut, spared = (layer.history for layer in machine.probe.layers)
    assert all(len(kept) > len(few) for kept, few in zip(spared.kept, cut.kept, strict=True))


@pytest.mark.parametrize("layers", ["{0: int8}", "{1: dense}", "{0: dense, 1: int8}"])
@pytest.mark.parametrize("scorer", ["window-attention", "key-norm", "accumulated-attention"])
def test_evicted_layers_with_pages_of_their_own_raise_no_alarm(layers: str, scorer: str) -> None:
    changes = ["codec=kivi-2bit", f"layers={layers}", f"eviction.scorer={scorer}", "eviction.rate=2"]
    machine = Machine(load_policy("snapkv", changes))
    assert machine.complaints() == []
    histories = [layer.history for layer in machine.probe.layers]
    (kept,) = {len(head) for history in histories for head in history.kept}
    assert histories[0].end and kept


def test_pages_of_one_layer_do_not_lie_where_those_of_another_are() -> None:
    changes = ["codec=kivi-2bit", "layers={1: int8}", "eviction.scorer=key-norm"]
    machine = Machine(load_policy("snapkv", changes), block_tiles=3)
    assert machine.complaints() == []
    assert [layer.tiles_per_page() for layer in machine.layouts] == [3, 1]


RETENTIONS = [
    ("snapkv", ["eviction.retention=compensate"]),
    ("snapkv", ["eviction.retention={name: merge, threshold: 0.2}"]),
    ("kv-compress-2bit", ["eviction.retention=compensate"]),
    ("h2o", ["eviction.retention=compensate", "eviction.schedule={name: every-n, interval: 64}", "eviction.rate=2"]),
    ("snapkv", ["eviction.retention={name: merge, threshold: 0.2}", "eviction.spare_layers=[0]", "eviction.rate=1.5"]),
    (
        "kv-compress-live",
        ["eviction.retention={name: merge, threshold: 0.2}", "eviction.schedule={name: every-n, interval: 64}"],
    ),
]


@pytest.mark.parametrize(("policy", "changes"), RETENTIONS)
def test_rows_that_stand_for_several_tokens_raise_no_alarm(policy: str, changes: list[str]) -> None:
    machine = Machine(load_policy(policy, changes))
    assert machine.complaints() == []
    history = machine.probe.layers[DAMAGED_LAYER].history
    assert all((mass > 0).any() for mass in history.log_mass)


class _ForgetsMasses(Damage):
    """Kept rows count once, whatever they stand for."""

    def stored(self, machine: Machine, request: Request) -> None:
        if request.kept.end:
            arena = arena_of(machine.arena[:, :, DAMAGED_LAYER], machine.layout)
            for head in range(machine.spec.num_kv_heads):
                (run,) = read_header(arena, request.row[0], head).runs
                for page in range(run.first_page, run.first_page + machine.layout.run_pages(run.num_tokens)):
                    machine.layout.tile_format.log_mass(kept_page(arena, machine.layout, request.kept, page)).zero_()


@pytest.mark.parametrize("retention", ["compensate", "{name: merge, threshold: 0.2}"])
def test_forgotten_log_masses_are_found(retention: str) -> None:
    machine = Machine(load_policy("snapkv", [f"eviction.retention={retention}"]), damage=_ForgetsMasses())
    (found,) = machine.complaints()
    assert found.startswith(f"layer {DAMAGED_LAYER} of 2: ") and "should hold" in found


def test_a_maximum_of_tokens_is_lowered_so_that_a_short_prompt_is_cut() -> None:
    policy = load_policy("snapkv", ["eviction.rate=null", "eviction.max_tokens=1024"])
    machine = Machine(policy)
    assert machine.complaints() == []
    assert machine.probe.layers[0].history.end > 0 and machine.plan.extra_args


# -- distances ------------------------------------------------------------------------------------------------------


def test_the_codec_distance_knows_nothing_of_what_the_codec_should_do() -> None:
    machine = Machine(load_policy("int8"))
    expected = LayerHistory.expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerHistory, "expected", lambda self, query: expected(self, query) * 2)
        patch.setattr(machine, "damage", _Doubled())
        report = machine.run()
    assert report.layers[DAMAGED_LAYER].kernel < KERNEL_LIMIT
    assert "layer 1 of 2: the codec loses too much" in complaints(report, machine.num_rows)[-1]


class _Doubled(Damage):
    """Kernels and expectation share one mistake; only the exact answer tells."""

    def after(self, step: Step) -> None:
        step.output *= 2


def test_cuts_cost_more_than_codes_and_the_cache_distance_counts_both() -> None:
    whole, cut = (Machine(load_policy(name)).run().layers[0] for name in ("int8", "streaming-llm"))
    assert whole.cache == whole.codec < 0.01
    assert cut.codec < 0.01 and 0.3 < cut.cache, "of 12 rows behind the cut; those of the prompt lost nothing"


def test_a_layer_can_answer_like_a_dense_cache() -> None:
    machine = Machine(load_policy("kivi-2bit"))
    for layer in machine.probe.layers:
        layer.answers_densely = True
    history = machine.probe.layers[0].history
    outputs = []

    class Keep(Damage):
        def after(self, step: Step) -> None:
            outputs.append((step.query, step.output))

    machine.damage = Keep()
    machine.run()
    query, output = outputs[-1]
    torch.testing.assert_close(output, machine.probe.layers[DAMAGED_LAYER].history.dense(query))
    assert history.num_tokens == machine.plan.prompt_len + machine.plan.output_tokens


def test_a_dense_answer_is_plain_causal_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout.build(load_policy("kivi-2bit"), 64, 64, torch.float32)
    history = LayerHistory(layout, LayerSpec(6, 2, 0.1))
    query, key, value = (torch.randn(100, heads, 64, generator=generator) for heads in (6, 2, 2))
    history.append(key, value)
    found = history.dense(query)
    rows = (key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), *(part.transpose(0, 1) for part in rows), is_causal=True, scale=0.1
    )
    torch.testing.assert_close(found, expected.transpose(0, 1))


def test_ranks_bring_their_heads_together() -> None:
    one = LayerReport(3, 9, [0.1], [0.2], [0.3], 0.2, 0.3, 1.0)
    two = LayerReport(3, 9, [0.4], [0.5], [0.6], 0.5, 0.6, 1.0)
    ranks = [ProbeReport([one], ["a"]).to_dict(), ProbeReport([two], ["a"]).to_dict()]
    assert ProbeReport.of_ranks(ranks) == ProbeReport(
        [LayerReport(3, 9, [0.1, 0.4], [0.2, 0.5], [0.3, 0.6], 0.5, 0.6, 1.0)], ["a"]
    )


def test_layers_are_listed_shortly() -> None:
    assert layers_text([4]) == "layer 4" and layers_text([0, 29]) == "layers 0 and 29"
    assert layers_text(list(range(30))) == "layers 0, 1, 2, 3, 4, ... and 29"


# -- the requests of the self-test ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "kivi-2bit", "kv-compress", "kv-compress-live"])
@pytest.mark.parametrize("max_model_len", [1, 16, 100, 8192])
def test_the_self_test_fits_into_the_longest_request(policy: str, max_model_len: int) -> None:
    layout = PageLayout.build(load_policy(policy), 64, 64, torch.float32)
    plan = plan_test(layout, max_model_len)
    assert 1 <= plan.first_len <= plan.prompt_len and plan.output_tokens >= 1
    assert plan.prompt_len + plan.output_tokens <= max(max_model_len, 2)


def test_a_model_without_a_tokenizer_gets_random_tokens() -> None:
    tokens = prompt_tokens(None, 100, 50)
    assert len(tokens) == 50 and max(tokens) < 100 and tokens == prompt_tokens(None, 100, 50)
