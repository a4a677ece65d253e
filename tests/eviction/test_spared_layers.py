"""Layers that keep all their tokens: the others get what is left, and the limit still holds over all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.accounting.plan import RowStep, check_limit, plan_eviction, policy_plan
from kvserve.attention.base import Answers, LayerSpec, NewRows
from kvserve.attention.native import NativeAttention
from kvserve.budgets.base import Budget
from kvserve.checks import check_model
from kvserve.engine.builder import check_layers
from kvserve.engine.request_limits import _content, _refusal
from kvserve.engine.settings import EngineSettings
from kvserve.errors import PolicyError, UnsupportedError
from kvserve.eviction.collector import Collector
from kvserve.eviction.evictor import StepEvictor
from kvserve.pages.kept import Kept, KeptTable
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Eviction, Policy
from kvserve.policies.limits import request_limit
from kvserve.policies.loading import load_policy, policy_content, policy_from_config
from kvserve.schedules.base import Limit
from tests.cases.attention_cases import make_batch, make_policy
from tests.eviction.test_budgets import VARIANTS, cases

INF = float("inf")
MAX_LEN = 4096
SCHEDULES = [
    {"name": "end-of-prefill"},
    {"name": "end-of-prefill", "chunk_tokens": 192},
    {"name": "every-n", "interval": 50},
    {"name": "over-budget", "interval": 64},
    {"name": "over-budget", "interval": 1, "chunk_tokens": 128},
]


def sparing(spare: tuple[int, ...], num_layers: int, codec: str = "int8", **changes: object) -> PageLayout:
    parts = {"scorer": "key-norm", "budget": "uniform", "rate": 2.0} | changes
    eviction = Eviction(**parts, spare_layers=spare)
    policy = make_policy(codec).model_copy(update={"eviction": eviction})
    return PageLayout.build(policy, 64, 64, torch.float32, num_layers=num_layers)


# The division


@pytest.mark.parametrize("budget", VARIANTS, ids=repr)
@given(case=cases(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_other_layers_divide_what_spared_layers_leave_as_if_they_were_alone(budget: Budget, case, data) -> None:
    scores, page_tokens, _, _ = case
    layers = range(len(scores))
    spared = data.draw(st.lists(st.sampled_from(layers), max_size=len(layers) - 1, unique=True).map(sorted))
    others = [layer for layer in layers if layer not in spared]
    exist = -(-(scores > -INF).sum(-1) // page_tokens)
    left = data.draw(st.integers(exist[others].numel(), int(exist[others].sum()) + 2))
    choice = budget.choose(scores, page_tokens, int(exist[spared].sum()) + left, spared)
    alone = budget.part(others, range(scores.shape[1]))
    assert torch.equal(choice.pages[others], alone.choose(scores[others], page_tokens, left).pages)
    for layer in spared:
        assert torch.equal(choice.pages[layer], exist[layer])
        for head, tokens in enumerate(choice.tokens[layer]):
            assert torch.equal(tokens, (scores[layer, head] > -INF).nonzero()[:, 0])


# The accounting


@given(
    rate=st.floats(1.01, 14.9), prompt_len=st.integers(1, MAX_LEN),
    spare=st.sampled_from([(0,), (0, -1), (2, 3, -1)]), num_layers=st.sampled_from([6, 30]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_rate_takes_the_blocks_it_takes_without_spared_layers_unless_these_need_more(
    rate: float, prompt_len: int, spare: tuple[int, ...], num_layers: int
) -> None:
    changes = {"scorer": {"name": "window-attention", "window": 9}}
    layout, plain = sparing(spare, num_layers, **changes), sparing((), num_layers, **changes)
    plan = plan_eviction(layout, Limit(rate), prompt_len, MAX_LEN)
    cut = plan.last_cut(prompt_len) if plan else None
    unspared = plan_eviction(plain, Limit(rate), prompt_len, MAX_LEN)
    usual = unspared.last_cut(prompt_len).kept_blocks if unspared else prompt_len // 64
    pages_needed = len(spare) * (prompt_len // 64) + (num_layers - len(spare))
    expected = max(usual, -(-pages_needed // num_layers))
    assert (cut.kept_blocks if cut and cut.point else prompt_len // 64) == min(expected, prompt_len // 64)


@pytest.mark.parametrize("rate", [2, 4, 8])
def test_a_long_prompt_holds_the_blocks_of_its_rate_whichever_layers_are_spared(rate: int) -> None:
    for layout in (sparing((), 30), sparing((0, -1), 30)):
        plan = plan_eviction(layout, Limit(rate), 4096, MAX_LEN)
        assert plan is not None and plan.last_cut(4096)[:3] == (4096, 4096, 64 // rate)
        assert plan.held_blocks(4096) == layout.blocks_for(4096) - 64 + 64 // rate


@given(
    budget=st.integers(64, 1500), max_len=st.integers(65, 3000), prompt_len=st.integers(1, 3000),
    schedule=st.sampled_from(SCHEDULES), spare=st.sampled_from([(0,), (0, -1)]),
    num_layers=st.sampled_from([4, 12, 30]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_maximum_that_is_accepted_is_never_exceeded_on_account_of_spared_layers(
    budget, max_len, prompt_len, schedule, spare, num_layers
) -> None:
    """Up to the longest request every cut is the one that there is without spared layers; a refusal names a way out."""
    changes = {"schedule": schedule, "rate": None, "max_tokens": 64}
    layout, plain = sparing(spare, num_layers, **changes), sparing((), num_layers, **changes)
    limit = Limit(max_tokens=budget, protected=4)
    try:
        check_limit(layout, limit, max_len)
    except ValueError as error:
        enough = int(str(error).partition("allow at least ")[2].partition(",")[0])
        assert enough > budget
        limit = Limit(max_tokens=enough, protected=4)
        check_limit(layout, limit, max_len)
    plan, unspared = (plan_eviction(x, limit, min(prompt_len, max_len), max_len) for x in (layout, plain))
    assert (plan is None) == (unspared is None)
    if plan is not None:
        assert all(plan.last_cut(length) == unspared.last_cut(length) for length in range(0, max_len + 1, 13))


def test_a_maximum_below_the_least_would_be_exceeded() -> None:
    layout = sparing((0, -1), 4, rate=None, max_tokens=64)
    with pytest.raises(ValueError, match=r"2 of 4 layers keep .*; allow at least 643, lower --max-model-len"):
        check_limit(layout, Limit(max_tokens=400, protected=4), 1024)
    check_limit(layout, Limit(max_tokens=643, protected=4), 1024)
    plain = sparing((), 4, rate=None, max_tokens=64)
    cuts = [plan_eviction(x, Limit(max_tokens=642), 1024, 1024).last_cut(1024) for x in (layout, plain)]
    assert [cut.kept_blocks for cut in cuts] == [9, 8]


# The worker


STEPS = [
    ("uniform", {"schedule": "end-of-prefill", "rate": 1.5}, 1),
    ("pyramid", {"schedule": {"name": "every-n", "interval": 64}, "rate": 1.6}, 3),
    ("heads-in-layer", {"schedule": {"name": "over-budget", "interval": 32}, "rate": None, "max_tokens": 500}, 4),
    ("global-pages", {"schedule": {"name": "end-of-prefill", "chunk_tokens": 192}, "rate": 1.7}, 2),
]


class Worker:
    """One request in four layers with dense pages, cut as its plan says, and the tokens that must be there."""

    num_layers, heads, head_dim = 4, 2, 64

    def __init__(self, layout: PageLayout, prompt_len: int, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.layout, self.eviction, self.num_tokens = layout, layout.policy.eviction, num_tokens
        self.plan = policy_plan(layout, prompt_len, num_tokens)
        shape = (self.num_layers, num_tokens, self.heads, self.head_dim)
        self.key, self.value = (torch.randn(shape, generator=generator) for _ in range(2))
        self.query = torch.randn(self.num_layers, num_tokens, 2 * self.heads, self.head_dim, generator=generator)
        row = layout.blocks_for(num_tokens)
        self.row, self.next_block = torch.arange(row, dtype=torch.int32)[None], row
        self.arena = torch.full((row + 100, self.heads, self.num_layers, layout.cell_bytes), 0xFF, dtype=torch.uint8)
        kernels = NativeAttention(layout, LayerSpec(2 * self.heads, self.heads, 0.1))
        self.kernels, self.collector = kernels, Collector(self.eviction.scorer)
        self.kept, self.computed, self.num_cuts = Kept(), 0, 0
        nothing = torch.zeros(0, dtype=torch.int64)
        self.stays = [[nothing] * self.heads for _ in range(self.num_layers)]

    def step(self) -> None:
        new = self.plan.clip_step(self.computed, min(60, self.num_tokens - self.computed))
        after, following = self.computed + new, self.plan.next_cut(self.computed)
        cut = None
        if following and following.point == after:
            cut = Kept(following.end, tuple(range(self.next_block, self.next_block + following.kept_blocks)))
            self.next_block += following.kept_blocks
        collects = self.eviction.scorer.collects and following is not None
        batch = make_batch(self.layout, [self.computed], [new], self.row)
        batch.kept = KeptTable.of([self.kept]) if self.kept.end else None
        start = self.plan.window_start(following) if following else None
        start = start if start is not None and after > start else None
        row_step = RowStep("a", self.kept, cut, start, collects)
        evictor = StepEvictor(self.eviction, {0: row_step}, batch, self.num_layers, collector=self.collector)
        for layer in range(self.num_layers):
            cells, rows = self.arena[:, :, layer], slice(self.computed, after)
            query = self.query[layer, rows]
            received = evictor.before_layer(self.kernels, cells)
            stored = self.key[layer, rows], self.value[layer, rows]
            self.kernels.forward(NewRows(query, *stored), cells, batch, Answers(torch.empty_like(query)), received)
            evictor.after_layer(self.kernels, cells, query)
        if cut:
            self.expect(cut)
        self.computed = after

    def expect(self, cut: Kept) -> None:
        """Who keeps what, from the keys as the model made them."""
        first = max(self.kept.end, self.layout.policy.sink_tokens)
        held = [[torch.cat([head, torch.arange(first, cut.end)]) for head in layer] for layer in self.stays]
        spared = [layer % self.num_layers for layer in self.eviction.spare_layers]
        others = [layer for layer in range(self.num_layers) if layer not in spared]
        scores = torch.nn.utils.rnn.pad_sequence(
            [-self.key[layer, held[layer][h], h].norm(dim=-1) for layer in others for h in range(self.heads)],
            batch_first=True, padding_value=-INF,
        ).unflatten(0, (len(others), -1))  # fmt: skip
        pages_held = -(-len(held[spared[0]][0]) // 64)
        left = self.heads * (len(cut.blocks) * self.num_layers - len(spared) * pages_held)
        choice = self.eviction.budget.choose(scores, 64, left)
        for layer, chosen in zip(others, choice.tokens, strict=True):
            held[layer] = [held[layer][h][chosen[h]] for h in range(self.heads)]
        self.stays, self.kept = held, cut
        self.num_cuts += 1

    def check(self) -> None:
        for layer in range(self.num_layers) if self.kept.end else ():
            cells = self.arena[:, :, layer]
            keys, values, *_ = self.kernels.read_kept(cells, 0, self.kept)
            for head, tokens in enumerate(self.stays[layer]):
                assert torch.equal(keys[head], self.key[layer, tokens, head])
                assert torch.equal(values[head], self.value[layer, tokens, head])
        for layer in self.eviction.spare_layers if self.kept.end else ():
            whole = torch.arange(self.layout.policy.sink_tokens, self.kept.end)
            assert all(torch.equal(tokens, whole) for tokens in self.stays[layer])


@pytest.mark.parametrize(("budget", "changes", "num_cuts"), STEPS, ids=[step[0] for step in STEPS])
@pytest.mark.parametrize("spare", [(0, -1), (2,)])
def test_spared_layers_hold_every_token_through_all_cuts_and_the_others_the_budgets_choice(
    budget: str, changes: dict, num_cuts: int, spare: tuple[int, ...]
) -> None:
    worker = Worker(sparing(spare, 4, "dense-pages", budget=budget, **changes), 500, 720)
    while worker.computed < worker.num_tokens:
        worker.step()
        worker.check()
    assert worker.num_cuts >= num_cuts


def test_nothing_is_collected_in_spared_layers() -> None:
    changes = {"scorer": "accumulated-attention", "schedule": {"name": "every-n", "interval": 64}}
    worker = Worker(sparing((0, -1), 4, "dense-pages", **changes, rate=1.5), 500, 720)
    worker.expect = lambda cut: setattr(worker, "kept", cut)
    while worker.computed < worker.num_tokens:
        worker.step()
        assert worker.collector.requests["a"].keys() == {1, 2}
        for layer in (0, 3) if worker.kept.end else ():
            keys = worker.kernels.read_kept(worker.arena[:, :, layer], 0, worker.kept).keys
            assert all(torch.equal(keys[h], worker.key[layer, 4 : worker.kept.end, h]) for h in (0, 1))


def test_recent_tokens_are_counted_by_what_is_left_for_a_head() -> None:
    """H2O keeps half of what a head keeps for the newest tokens: here 6 pages less those of the spared layers."""
    changes = {"scorer": "accumulated-attention", "rate": 1.5}
    worker = Worker(sparing((0, -1), 4, "dense-pages", **changes), 576, 576)
    seen = []
    score = type(worker.eviction.scorer).score
    object.__setattr__(worker.eviction, "scorer", Recording(worker.eviction.scorer, score, seen))
    worker.collector = Collector(worker.eviction.scorer.scorer)
    worker.expect = lambda cut: setattr(worker, "kept", cut)
    while worker.computed < worker.num_tokens:
        worker.step()
    assert worker.plan.last_cut(576)[:3] == (576, 576, 6)
    assert seen == [(1, (4 * 6 - 2 * 9) // 2 * 64 + 4), (2, (4 * 6 - 2 * 9) // 2 * 64 + 4)]


class Recording:
    """A scorer that notes for how many tokens it scores."""

    def __init__(self, scorer, score, seen: list) -> None:
        self.scorer, self._score, self.seen = scorer, score, seen

    def __getattr__(self, name: str):
        return getattr(self.scorer, name)

    def score(self, view):
        self.seen.append((view.layer, view.kept_tokens))
        return self._score(self.scorer, view)


# What is refused


def spared_policy(layers: str, *overrides: str) -> Policy:
    return load_policy("snapkv", [f"eviction.spare_layers={layers}", *overrides])


def test_a_policy_with_spared_layers_survives_the_way_to_another_process() -> None:
    policy = spared_policy("[0, -1]")
    assert policy.eviction.spare_layers == (0, -1) and policy.eviction.spared_layers(30) == (0, 29)
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    assert policy_from_config({"policy": "snapkv", "set": {"eviction.spare_layers": [0, -1]}}) == policy


def test_a_layer_named_from_both_ends_is_one_layer() -> None:
    assert spared_policy("[2, -1, 0]").eviction.spared_layers(3) == (0, 2)


@pytest.mark.parametrize("layers", ["0", "first", "[first]", "[0.5]", "[true]"])
def test_spared_layers_are_a_list_of_whole_numbers(layers: str) -> None:
    with pytest.raises(
        PolicyError, match=r"eviction.spare_layers is .* a list of whole numbers, for example \[0, -1\]"
    ):
        spared_policy(layers)


@pytest.mark.parametrize(
    ("layers", "overrides", "part"),
    [
        ("[30]", [], "names layer 30, the model has the layers 0 to 29"),
        ("[-31]", [], "names layer -31"),
        (str(list(range(30))), [], "names all 30 layers"),
        ("[0, -1]", ["eviction.rate=15"], "the rate must be below 15, got 15"),
        (str(list(range(15))), [], "15 of 30 layers keep all their tokens.*below 2, got 4"),
    ],
)
def test_a_model_that_spared_layers_do_not_fit_is_refused_by_its_config(layers, overrides, part) -> None:
    config = {"num_hidden_layers": 30, "head_dim": 64}
    check_model(config, spared_policy("[0, -1]"))
    with pytest.raises(UnsupportedError, match=part):
        check_model(config, spared_policy(layers, *overrides))


def test_a_request_may_not_ask_for_less_than_spared_layers_keep() -> None:
    policy = spared_policy("[0, -1]")
    layout = PageLayout.build(policy, 64, 64, torch.float32, num_layers=30)
    state = SimpleNamespace(policy=policy, layout=layout, max_model_len=8192)

    def refusal(arguments: str) -> str | None:
        return _refusal(_content(b'{"vllm_xargs": {%s}}' % arguments.encode()), state)

    assert refusal('"kvserve_rate": 14') is None and refusal('"kvserve_off": 1') is None
    assert "below 15, got 15" in refusal('"kvserve_rate": 15')
    assert refusal('"kvserve_max_tokens": 1024') is None
    assert "up to 8192 tokens; allow at least" in refusal('"kvserve_max_tokens": 512')


def test_layers_without_a_cache_would_shift_the_others() -> None:
    settings = EngineSettings(spared_policy("[-1]"), 64, torch.bfloat16, num_layers=30)
    check_layers(settings, 30)
    with pytest.raises(UnsupportedError, match="28 of the model's 30 layers"):
        check_layers(settings, 28)


def test_a_maximum_that_cannot_hold_is_refused_when_the_engine_starts() -> None:
    policy = spared_policy("[0, -1]", "eviction.rate=null", "eviction.max_tokens=600")
    settings = EngineSettings(policy, 64, torch.bfloat16, num_layers=30)
    settings.check_own_limit(64, 4096)
    with pytest.raises(UnsupportedError, match="up to 8192 tokens; allow at least 766"):
        settings.check_own_limit(64, 8192)


def test_a_layout_needs_to_know_how_many_layers_there_are() -> None:
    with pytest.raises(ValueError, match="needs num_layers"):
        PageLayout.build(spared_policy("[0]"), 64, 64, torch.float32)


def test_a_policy_file_may_spare_layers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsummary: s\ncodec: int8\n"
        "eviction:\n  scorer: key-norm\n  budget: uniform\n  rate: 2\n  spare_layers: [0, 1, -1]\n"
    )
    policy = load_policy(str(path))
    assert policy.eviction.spared_layers(8) == (0, 1, 7)
    assert request_limit(policy.eviction, policy, {}) == Limit(2.0)
