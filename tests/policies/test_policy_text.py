"""Whatever lies in a policy file or is written after --policy-set: a policy, or one sentence at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvserve.errors import PolicyError
from kvserve.policies.base import Policy
from kvserve.policies.loading import MAX_FILE_BYTES, load_policy, policy_from_config
from kvserve.policies.registry import policy_names, shipped_path
from kvserve.policies.yaml_text import MAX_DEPTH, MAX_NODES, parse

HEAD = "name: mine\nsummary: s\n"
EVICTS = HEAD + "codec: int8\neviction:\n  budget: uniform\n  rate: 4\n"


def refusal(source: Path | str, *overrides: str) -> str:
    start = time.monotonic()
    with pytest.raises(PolicyError) as caught:
        load_policy(str(source), overrides)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[a, b]: 1\n", "a key must be a word"),
        ("{a: 1}: 1\n", "a key must be a word"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("name: x\nkey:\n  ? {a: b}\n  : 2\n", "bad.yaml, line 3"),
        ("[" * 30_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("key: " + "{a: " * 10_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("".join(" " * i + "a:\n" for i in range(300)), f"nested more than {MAX_DEPTH} levels deep"),
        (bomb(12), f"more than {MAX_NODES} values"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: *b\n", "undefined alias"),
        ("x: [" + "1," * 5000 + "]\n", f"more than {MAX_NODES} values"),
        ("tile_tokens: " + "9" * 5000, "too long"),
        ("tile_tokens: 0x" + "f" * 5000, "too large"),
        ("tile_tokens: 0x_", "not a number"),
        ("tile_tokens: " + "1:" * 2000 + "1.5", "too long"),
        ("name: !!python/object/apply:os.system [ls]\n", "the tag"),
        ("name: !!timestamp x\n", "the tag"),
        ("name: a\n\tsummary: b\n", "bad.yaml, line 2"),
        ("name: a\n---\nname: b\n", "bad.yaml, line 2"),
        ("name: a\n0x1: 1\n1: 2\n", "duplicate key"),
        ("name: a\nkey: {bits: 2, bits: 4}\n", "duplicate key 'bits'"),
        ("name: \x00\n", "not valid YAML"),
        ("just words", "key: value"),
        (EVICTS + "  scorer: [1]\n", "eviction.scorer is [1], it must be the name of a scorer"),
        (EVICTS + "  scorer: 5\n", "eviction.scorer is 5, it must be the name of a scorer"),
        (EVICTS + "  scorer: window-attention\n  schedule: [1]\n", "eviction.schedule is [1]"),
        (EVICTS + "  scorer: random\n  retention: 3\n", "eviction.retention is 3, it must be the name of a retention"),
        (HEAD + "2024-99-99: 1\n", "unknown key"),
        (HEAD + "1: 1\n", "unknown key"),
        (HEAD + "null: 1\n", "unknown key"),
        (HEAD + "eviction: [1]\n", "eviction is [1]"),
        (HEAD + "codec: [int8]\n", "codec is ['int8']"),
        (HEAD + "codec: int8\nlayers: {0: [1]}\n", "layers"),
        (HEAD + "codec: int8\nlayers: {0: {1: 2}}\n", "unknown key 1"),
        (HEAD + "sink_tokens: .nan\n", "from 0 to 64"),
        (HEAD + "sink_tokens: .inf\n", "from 0 to 64"),
    ],
)  # fmt: skip
def test_text_that_is_no_policy_is_one_sentence(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert part in refusal(path)


@pytest.mark.parametrize(
    "value",
    ["[" * 5000, "9" * 5000, "0x" + "f" * 9000, "&a [*a]", "!!set {a}", "{[1]: 2}", "{a: 1, a: 2}", "x" * 10**6, "\x00",
     "[1]", "{a: 1}", ".nan", "2024-99-99", "\ud800"],
)  # fmt: skip
def test_values_of_overrides_are_as_safe_as_files(value):
    assert "key.bits" in refusal("kivi-2bit", f"key.bits={value}")


def test_only_regular_files_of_a_policys_size_are_read(tmp_path):
    pipe, folder, large, binary, odd = (tmp_path / f"{name}.yaml" for name in ("pipe", "dir", "large", "raw", "a\nb"))
    os.mkfifo(pipe)
    folder.mkdir()
    large.write_bytes(b"#" * 30 * 2**20)
    binary.write_bytes(bytes(range(256)))
    assert "not a regular file" in refusal(pipe)
    assert "directory" in refusal(folder)
    assert "longer than 64 KiB" in refusal(large)
    assert "not UTF-8" in refusal(binary)
    assert "not a regular file" in refusal("/dev/zero")
    assert "no such path" in refusal("~nobody-of-this-name/x.yaml")
    assert "no such path" in refusal("./a\0b.yaml")
    assert "File name too long" in refusal("./" + "a" * 300 + ".yaml")[-100:]
    with pytest.raises(PolicyError):
        load_policy(str(odd))


def test_a_file_as_long_as_the_limit_loads(tmp_path):
    path = tmp_path / "mine.yaml"
    text = shipped_path("kivi-2bit").read_text()
    path.write_text(text + "#" * (MAX_FILE_BYTES - len(text)))
    assert load_policy(str(path)) == load_policy("kivi-2bit")


def test_anchors_of_a_sane_size_mean_what_they_say():
    assert parse("a: &x {bits: 2}\nb: *x\nc:\n  <<: *x\n  more: 1.5\n") == {
        "a": {"bits": 2}, "b": {"bits": 2}, "c": {"bits": 2, "more": 1.5},
    }  # fmt: skip


@pytest.mark.parametrize("name", policy_names())
def test_shipped_files_mean_what_plain_yaml_says(name):
    text = shipped_path(name).read_text()
    assert parse(text) == yaml.safe_load(text)


KEYS = st.sampled_from([
    *Policy.model_fields, "codec", "bits", "group_size", "rotate", "boost_fraction", "scorer", "budget", "rate",
    "max_tokens", "spare_layers", "schedule", "window", "interval", "chunk_tokens", "index", "0", "-1", "none",
])  # fmt: skip
WORDS = st.sampled_from([
    *policy_names(), "window-attention", "uniform", "every-n", "over-budget", "global-pages", "dense", "text", "", "~",
])  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 130), st.integers(), st.floats(), WORDS, st.text(max_size=5), st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, SCALARS), inner, max_size=5)),
    max_leaves=12,
)
TOP = st.dictionaries(KEYS, VALUES, max_size=6)
PARTS = st.fixed_dictionaries(
    {"scorer": VALUES, "budget": VALUES}, optional={"rate": VALUES, "retention": VALUES, "schedule": VALUES}
)
FILES = st.one_of(
    TOP.map(lambda content: {"name": "mine", "summary": "s", **content}),
    st.builds(lambda parts: {"name": "mine", "summary": "s", "codec": "int8", "eviction": parts}, PARTS),
)
RANDOM = settings(max_examples=100, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_refuse(source: object) -> None:
    try:
        policy = load_policy(str(source)) if isinstance(source, Path) else policy_from_config({"policy": source})
    except PolicyError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(policy, Policy)


@RANDOM
@given(content=FILES)
def test_random_content_is_a_policy_or_one_sentence(tmp_path, content):
    path = tmp_path / "random.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="replace")
    load_or_refuse(path)
    load_or_refuse(content)


@RANDOM
@given(data=st.data())
def test_a_damaged_file_is_a_policy_or_one_sentence(tmp_path, data):
    text = shipped_path(data.draw(st.sampled_from(policy_names()))).read_text()
    at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
    piece = data.draw(st.one_of(st.text("{}[]:-&*!|>%@`'\"?, \t\n#~ax019._", max_size=8), st.text(max_size=4)))
    path = tmp_path / "damaged.yaml"
    path.write_text(text[:at] + piece + text[at + length :], encoding="utf-8", errors="replace")
    load_or_refuse(path)


@RANDOM
@given(key=st.lists(KEYS, min_size=1, max_size=3).map(".".join), value=st.one_of(VALUES.map(repr), st.text(max_size=9)))
def test_a_random_override_is_a_policy_or_one_sentence(key, value):
    try:
        load_policy("kv-compress", [f"{key}={value}"])
    except PolicyError as error:
        assert "\n" not in str(error)
