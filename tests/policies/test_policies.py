"""The shipped policies, the loader, and the sentences it refuses with."""

import tomllib
from pathlib import Path

import pytest
import yaml

from kvserve.checks import check_calibration
from kvserve.errors import PolicyError, UnsupportedError
from kvserve.policies.base import Policy
from kvserve.policies.loading import load_policy, policy_content, policy_from_config
from kvserve.policies.registry import configs_dir, policy_names, shipped_path
from kvserve.retention.compensate import Compensate
from kvserve.retention.evict import Evict
from kvserve.retention.merge import Merge

ROOT = Path(__file__).resolve().parents[2]


def error_of(name: str, *overrides: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(name, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_the_shipped_policies_load():
    assert {"none", "int8", "kivi-4bit", "kivi-2bit", "boost-2bit"} <= set(policy_names())
    for name in policy_names():
        policy = load_policy(name)
        assert policy.name == name
        assert policy.summary and (policy.paper or policy.is_dense or name == "random")


def test_a_path_loads_like_a_name(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped_path("kivi-2bit").read_text())
    assert load_policy(str(copy)) == load_policy("kivi-2bit")


def test_a_file_called_like_a_policy_does_not_shadow_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("int8").write_text("name: other\nsummary: not int8\n")
    assert load_policy("int8").name == "int8"


def test_overrides_apply_in_order():
    policy = load_policy(
        "kivi-2bit", ["sink_tokens=0", "key.bits=4", "value.group_size=0", "value.rotate=true", "key.bits=8"]
    )
    assert policy.key and policy.value
    assert (policy.sink_tokens, policy.key.bits, policy.value.rotates) == (0, 8, True)
    assert load_policy("kivi-2bit").sink_tokens == 8


def test_dashes_in_override_keys_are_underscores():
    assert load_policy("kivi-2bit", ["sink-tokens=8"]).sink_tokens == 8


def test_an_override_can_make_a_dense_policy_of_a_codec():
    assert load_policy("kivi-2bit", ["key=null", "value=null", "sink_tokens=0"]).is_dense


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["key.bits=3"], ["kivi-2bit", "key.bits is 3", "one of 2, 4, 8"]),
        (["key.bits=two"], ["key.bits is 'two'", "one of 2, 4, 8"]),
        (["key.bits="], ["key.bits is empty", "one of 2, 4, 8"]),
        (["sink_tokens=65"], ["sink_tokens is 65", "from 0 to 64"]),
        (["sink_tokens=-1"], ["sink_tokens is -1", "from 0 to 64"]),
        (["sink_tokens=many"], ["sink_tokens is 'many'", "from 0 to 64"]),
        (["sink_tokens=64"], ["sink_tokens must be less than tile_tokens (64)"]),
        (["value.rotate=maybe"], ["value.rotate is 'maybe'", "true or false"]),
        (["value.rotate=true"], ["value.group_size", "rotate"]),
        (["key.boost_fraction=0.3"], ["key.boost_fraction is 0.3", "0, 0.25, 0.5"]),
        (["key=4"], ["key is 4", "{name: affine, bits: 4, group_size: 64}"]),
        (["sink_token=1"], ["unknown key 'sink_token'", "did you mean 'sink_tokens'", "tile_tokens"]),
        (["key.bit=4"], ["unknown key 'key.bit'", "did you mean 'key.bits'"]),
        (["sink_tokens.bits=4"], ["unknown key 'sink_tokens.bits'"]),
        (["name=other"], ["unknown key 'name'"]),
        (["sink_tokens"], ["key=value", "'sink_tokens'"]),
        (["=4"], ["key=value"]),
        (["key.bits=[4"], ["key.bits=[4"]),
    ],
)
def test_a_bad_override_is_one_sentence_with_the_allowed_values(overrides, parts):
    message = error_of("kivi-2bit", *overrides)
    for part in parts:
        assert part in message


def test_setting_half_a_codec_on_the_dense_policy_names_what_is_missing():
    assert "key.bits is missing, it must be one of 2, 4, 8" in error_of("none", "key.group_size=64")
    assert "give both key and value" in error_of("none", "key.bits=4")


def test_an_unknown_policy_lists_all_and_guesses():
    message = error_of("kivi2bit")
    assert "did you mean 'kivi-2bit'" in message
    for name in policy_names():
        assert name in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: x\nsummary: [a\nkey: 1\n", ["bad.yaml, line 3", "not valid YAML"]),
        ("name: x\nsummary: a\nname: y\n", ["bad.yaml, line 3", "duplicate key 'name'"]),
        ("- a\n- b\n", ["bad.yaml, line 1", "key: value"]),
        ("", ["bad.yaml, line 1"]),
        ("name: x\nsummary: s\nkeys: {}\n", ["unknown key 'keys'", "did you mean 'key'"]),
        ("name: x\nsummary: s\nkey: {bits: 2, group_size: 32, groupsize: 1}\n", ["unknown key 'key.groupsize'"]),
        ("summary: s\n", ["name is missing"]),
        ("name: My Policy\nsummary: s\n", ["name is 'My Policy'", "lower-case"]),
    ],
)
def test_a_bad_file_names_the_file_and_the_line(tmp_path, text, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = error_of(str(path))
    for part in parts:
        assert part in message


def test_unreadable_files(tmp_path):
    assert "No such file" in error_of(str(tmp_path / "absent.yaml"))
    assert "directory" in error_of(str(tmp_path) + "/")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "not UTF-8" in error_of(str(binary))


def test_additional_config_by_name_path_and_content(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(shipped_path("int8").read_text())
    expected = load_policy("int8", ["sink_tokens=8"])
    for source in ("int8", str(path), policy_content(load_policy("int8"))):
        assert policy_from_config({"policy": source, "set": {"sink_tokens": 8}}) == expected


def test_policy_content_round_trips():
    for name in policy_names():
        content = policy_content(load_policy(name))
        assert policy_from_config({"policy": content}) == load_policy(name)
        assert yaml.safe_load(yaml.safe_dump(content)) == content


def test_additional_config_leaves_its_argument_alone():
    config = {"policy": policy_content(load_policy("kivi-2bit")), "set": {"key.bits": 4}}
    policy_from_config(config)
    assert config["policy"] == policy_content(load_policy("kivi-2bit"))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"policy": "int8", "sets": {}}, "unknown key, 'sets'"),
        ({}, "name, a path or a policy's content, got None"),
        ({"policy": 8}, "got 8"),
        ({"policy": "int8", "set": ["sink_tokens"]}, "must be a JSON object"),
        ({"policy": "int8", "set": {"sink": 1}}, "unknown key 'sink'"),
        ("int8", "must be a JSON object"),
    ],
)
def test_additional_config_refusals(config, part):
    with pytest.raises(PolicyError, match=part):
        policy_from_config(config)


def test_every_policy_file_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    present = {
        str(folder.parent.relative_to(ROOT)).replace("/", ".") for folder in (ROOT / "kvserve").rglob("__init__.py")
    }
    assert listed == present | {"kvserve.configs", "kvserve.kernels", "kvserve.kernels.codecs"}
    assert {path.suffix for path in configs_dir().iterdir()} == {".yaml"}


def test_policies_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load_policy("int8").sink_tokens = 3  # type: ignore[misc]
    assert isinstance(load_policy("int8"), Policy)


# Codecs

WRAPPED = """
name: wrapped
summary: s
key: {name: before-rope, inner: {name: outliers, fraction: 0.01, inner: {name: table, bits: 3}}}
value: {name: low-rank, rank: 4, inner: {name: symmetric, bits: 2}}
"""


def wrapped(tmp_path: Path, *overrides: str) -> Policy:
    path = tmp_path / "wrapped.yaml"
    path.write_text(WRAPPED)
    return load_policy(str(path), overrides)


def test_codecs_are_chosen_by_name_and_nest(tmp_path):
    policy = wrapped(tmp_path)
    assert [codec.name for codec in policy.key.chain()] == ["before-rope", "outliers", "table"]
    assert [codec.name for codec in policy.value.chain()] == ["low-rank", "symmetric"] and policy.value.rotates
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    assert wrapped(tmp_path, "key.inner.inner.bits=4", "value.rank=2").key.inner.inner.bits == 4


def test_a_codec_without_a_name_is_affine_and_rotate_stands_for_symmetric():
    policy = load_policy("boost-2bit")
    assert (policy.key.name, policy.value.name) == ("affine", "symmetric")
    assert load_policy("boost-2bit", ["value.rotate=false"]).value.name == "affine"
    assert load_policy("boost-2bit", ["value.name=symmetric"]) == policy
    content = policy_content(policy)
    assert content["key"] == {"bits": 2, "group_size": 64, "boost_fraction": 0.25}
    assert content["value"] == {"name": "symmetric", "bits": 2}
    assert policy_from_config({"policy": content, "set": {"value.rotate": False}}).value.name == "affine"


def test_layers_may_have_codecs_of_any_name():
    layers = {
        0: {"key": {"name": "vector", "couple": 4}, "value": {"name": "table", "bits": 3}},
        -1: "int8",
        1: "dense",
    }
    policy = policy_from_config({"policy": "kivi-2bit", "set": {"layers": layers}})
    first, second, *_, last = policy.of_layers(4)
    assert (first.key.name, first.value.name) == ("vector", "table") and second.key is None and last.key.bits == 8
    assert policy_from_config({"policy": policy_content(policy)}) == policy


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("key.name=affin", ["there is no codec 'affin'", "before-rope, low-rank"]),
        ("key.inner.fraction=0.5", ["fraction must be above 0 and at most 0.25"]),
        ("key.inner.inner.bits=8", ["key.inner.inner.bits is 8, it must be one of 2, 3, 4"]),
        ("key.inner.inner.bit=4", ["unknown key 'key.inner.inner.bit'", "did you mean 'key.inner.inner.bits'"]),
        ("key.inner.inner=null", ["key.inner.inner is empty", "a codec's name and parameters"]),
        ("value.inner={bits: 2, group_size: 31}", ["value.inner.group_size is 31, it must be one of 0, 32, 64, 128"]),
        ("value.rank=3", ["value.rank is 3, it must be one of 1, 2, 4, 8"]),
        ("value.name=before-rope", ["unknown key 'value.rank'", "value.rotary_dim"]),
        ("value={name: before-rope, inner: {bits: 2}}", ["before-rope writes keys only", "another codec for value"]),
        ("key={name: symmetric, bits: 2}", ["symmetric writes values only", "another codec for key"]),
        ("key={name: low-rank, rank: 1}", ["key.inner is missing", "a codec's name and parameters"]),
        ("tile_tokens=63", ["tile_tokens is 63"]),
    ],
)
def test_a_codec_that_cannot_be_is_refused_in_one_sentence(tmp_path, override, parts):
    with pytest.raises(PolicyError) as caught:
        wrapped(tmp_path, override)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_codecs_nest_four_deep_and_no_deeper(tmp_path):
    inner = "{name: outliers, fraction: 0.01, inner: " * 4 + "{bits: 2}" + "}" * 4
    with pytest.raises(PolicyError, match="nest at most 4"):
        wrapped(tmp_path, f"value={inner}")
    deep: dict = {"bits": 2}
    for _ in range(5000):
        deep = {"name": "outliers", "fraction": 0.01, "inner": deep}
    with pytest.raises(PolicyError, match="nest at most 4"):
        policy_from_config({"policy": "kivi-2bit", "set": {"value": deep}})


def test_evicted_pages_keep_no_positions(tmp_path):
    eviction = "eviction={scorer: key-norm, budget: uniform, rate: 4}"
    with pytest.raises(PolicyError, match="a key of before-rope is read with its position"):
        wrapped(tmp_path, eviction)
    assert wrapped(tmp_path, eviction, "key={bits: 2, group_size: 64}").eviction


def test_tables_without_a_calibration_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UnsupportedError, match=r"policy wrapped reads a table key.table.levels, .* and names no"):
        check_calibration(wrapped(tmp_path))
    check_calibration(wrapped(tmp_path, "calibration=kvquant-3bit"))
    layers = {0: {"key": {"bits": 2}, "value": {"name": "vector", "couple": 4}}}
    with pytest.raises(UnsupportedError, match=r"reads a table value.vector.codebook"):
        check_calibration(policy_from_config({"policy": "kivi-2bit", "set": {"layers": layers}}))
    with pytest.raises(UnsupportedError, match=r"reads a table key.permutation.order"):
        check_calibration(load_policy("kivi-2bit", ["transforms.key=[permutation]"]))
    with pytest.raises(UnsupportedError, match="nothing reads the calibration of policy int8"):
        check_calibration(load_policy("int8", ["calibration=kvquant-2bit"]))
    check_calibration(load_policy("kivi-2bit", ["transforms.key=[rotation]"]))
    for name in policy_names():
        check_calibration(load_policy(name))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["transforms.key=rotation"], "transforms.key is 'rotation', it must be a list of transforms"),
        (["transforms.key=[hadamard]"], "there is no transform {'name': 'hadamard'}"),
        (["transforms.query=[rotation]"], "did you mean 'transforms.key'"),
        (["transforms.value=[{name: rotation, angle: 3}]"], "angle"),
        (["key={name: before-rope, inner: {bits: 2}}", "transforms.key=[rotation]"], "before-rope turns keys back"),
        (
            ["eviction={scorer: expected-attention, budget: uniform, rate: 4}", "transforms.key=[rotation]"],
            "expected-attention turns queries back",
        ),
    ],
)
def test_transforms_that_cannot_be_are_refused_in_one_sentence(overrides, part):
    with pytest.raises(PolicyError) as caught:
        load_policy("int8", overrides)
    assert part in str(caught.value)


def test_transforms_are_lists_by_half(tmp_path):
    policy = load_policy("int8", ["transforms.key=[rotation, {name: rotation, matrix: calibrated}]"])
    assert [one.matrix for one in policy.transforms.key] == ["hadamard", "calibrated"] and not policy.transforms.value
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nsummary: s\ncodec: int8\ntransforms: {value: [scale]}\ncalibration: ./own.safetensors\n")
    assert [one.name for one in load_policy(str(own)).transforms.value] == ["scale"]
    assert "transforms" not in policy_content(load_policy("int8"))


# Policies that evict


def test_codec_takes_the_pages_of_another_policy():
    policy = load_policy("kv-compress-2bit")
    boost = load_policy("boost-2bit")
    assert (policy.key, policy.value, policy.sink_tokens) == (boost.key, boost.value, boost.sink_tokens)
    four_bit = load_policy("kv-compress-2bit", ["codec=kivi-4bit"])
    assert (four_bit.key, four_bit.sink_tokens) == (load_policy("kivi-4bit").key, load_policy("kivi-4bit").sink_tokens)
    assert four_bit.eviction == policy.eviction


def test_dense_pages_keep_the_models_dtype_where_tokens_are_evicted():
    policy = load_policy("snapkv", ["codec=dense"])
    assert policy.is_dense and policy.has_pages and policy.eviction == load_policy("snapkv").eviction
    assert load_policy("snapkv", ["codec=dense", "codec=int8"]) == load_policy("snapkv")
    assert policy_from_config({"policy": policy_content(policy)}) == policy
    assert not load_policy("none").has_pages


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["value.rotate=true"], "value.bits is missing"),
        (["key.boost_fraction=0.25"], "key.bits is missing"),
        (["key.bits=4", "key.group_size=64"], "give both key and value"),
        (["key.bits=4", "key.group_size=64", "value.bits=4"], "leave out key and value, or dense_pages"),
        (["sink_tokens=64"], "sink_tokens must be less than tile_tokens (64)"),
        (["dense_pages=false", "sink_tokens=4"], "sink_tokens needs pages"),
        (["dense_pages=16"], "it must be true or false"),
    ],
)
def test_dense_pages_take_no_codec(overrides, part):
    assert part in error_of("dense", *overrides)


def test_a_name_may_carry_its_rate():
    policy = load_policy("snapkv@2.5")
    assert policy.name == "snapkv" and policy.eviction.rate == 2.5
    assert "it evicts nothing" in error_of("int8@2")
    assert "a number from 1" in error_of("snapkv@none-such")


def test_parts_are_named_alone_or_with_parameters():
    eviction = load_policy("snapkv", ["eviction.scorer.window=16"]).eviction
    assert eviction.scorer.name == "window-attention" and eviction.scorer.window == 16
    assert eviction.budget.name == "uniform" and eviction.schedule.name == "end-of-prefill"


def test_what_is_not_kept_is_gone_unless_a_retention_says_otherwise():
    assert load_policy("snapkv").eviction.retention == Evict() and not load_policy("snapkv").has_mass
    policy = load_policy("snapkv", ["eviction.retention=compensate"])
    assert policy.eviction.retention == Compensate() and policy.has_mass
    policy = load_policy("snapkv", ["eviction.retention=merge", "eviction.retention.threshold=0.5"])
    assert policy.eviction.retention == Merge(threshold=0.5)
    assert policy_from_config({"policy": policy_content(policy)}) == policy


@pytest.mark.parametrize("name", ["compensate", "merge"])
def test_a_retention_with_weights_needs_coded_pages(name):
    message = error_of("snapkv", f"eviction.retention={name}", "codec=dense")
    assert f"the retention {name} stores a weight beside each token" in message
    assert message.endswith("for example codec: int8")
    assert load_policy("snapkv", ["eviction.retention=evict", "codec=dense"]).dense_pages


def test_retentions_and_their_parameters_are_checked():
    assert "there is no retention 'forget'; the retentions are compensate, demote, evict, merge" in error_of(
        "snapkv", "eviction.retention=forget"
    )
    assert "eviction.retention.threshold" in error_of("snapkv", "eviction.retention={name: merge, threshold: 2}")


@pytest.mark.parametrize("name", ["kv-compress-2bit", "snapkv", "pyramidkv", "knorm", "streaming-llm", "random"])
def test_a_policy_that_evicts_survives_the_way_to_another_process(name):
    policy = load_policy(name, ["eviction.rate=3.5"])
    assert policy_from_config({"policy": policy_content(policy)}) == policy


@pytest.mark.parametrize(
    ("name", "override", "part"),
    [
        ("kv-compress", "eviction.rate=0.5", "a number from 1 to 1024"),
        ("kv-compress", "eviction.scorer.window=0", "greater than or equal to 1"),
        ("kv-compress", "eviction.scorer.name=attention", "the scorers are accumulated-attention"),
        ("kv-compress", "eviction.budget=fair", "the budgets are global-pages"),
        ("kv-compress", "eviction.max_tokens=512", "one of the two"),
        ("kv-compress", "codec=none", "use codec: dense"),
        ("kv-compress", "dense_pages=true", "leave out key and value"),
        ("kv-compress", "codec=snapkv", "snapkv evicts itself"),
        ("kv-compress", "codec=kivi", "the name of a shipped policy"),
        ("kivi-2bit", "eviction.rate=8", "it evicts nothing"),
    ],
)
def test_refused_evictions_name_the_fix(name, override, part):
    assert part in error_of(name, override)
