"""Engines whose codecs and transforms read calibrated tables, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kvserve.calibration.artefact import Cache, Origin, expected, write
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.base import Method
from kvserve.calibration.methods.cq import Cq
from kvserve.calibration.methods.kvquant import Kvquant
from kvserve.calibration.methods.razor import Razor
from kvserve.calibration.methods.skvq import Skvq
from kvserve.codecs.before_rope import BeforeRope
from kvserve.codecs.table import Table
from kvserve.engine.layer_tables import check_embedding, chosen_calibration
from kvserve.engine.probe_worker import kvserve_layers
from kvserve.engine.report import EngineReport
from kvserve.engine.self_test import EXTENSION_PATH
from kvserve.engine.settings import EngineSettings
from kvserve.engine.stats import worker_log
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import load_policy
from kvserve.probe.probe import Probe
from kvserve.scorers.rotary import RotaryTable
from tests.cases.engine_cases import engine, generate, prompt_logprobs, random_prompts
from tests.cases.tiny_models import make_tiny_model

CACHE = Cache(2, 2, 64)
KVQUANT: dict[str, Any] = {
    "key": {"name": "before-rope", "inner": {"name": "outliers", "fraction": 0.01,
                                             "inner": {"name": "table", "bits": 4}}},
    "value": {"name": "outliers", "fraction": 0.01, "inner": {"name": "table", "bits": 4}},
}  # fmt: skip
CQ: dict[str, Any] = {"key": {"name": "before-rope", "inner": {"name": "vector", "couple": 2}},
                      "value": {"name": "vector", "couple": 2}}  # fmt: skip
CLIPPED: dict[str, Any] = {"key": {"bits": 2, "group_size": 32, "axis": "token", "clip": True},
                           "value": {"bits": 2, "group_size": 32, "clip": True}}  # fmt: skip
SKVQ: dict[str, Any] = {"transforms": {"key": ["permutation"], "value": ["permutation"]}}
INT8: dict[str, Any] = {"key": {"bits": 8, "group_size": 64}, "value": {"bits": 8}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model("llama-gqa-64", tmp_path_factory.mktemp("calibrated") / "model")


def policy_file(folder: Path, content: dict[str, Any], calibration: Path | str | None) -> Path:
    path = folder / "own.yaml"
    own = {"name": "own", "summary": "s", "sink_tokens": 4, **content}
    if not (content.keys() & {"key", "dense_pages"}):
        del own["sink_tokens"]
    path.write_text(yaml.safe_dump(own | ({"calibration": str(calibration)} if calibration else {})))
    return path


def calibration_file(path: Path, method: Method, model: Path, cache: Cache = CACHE) -> Path:
    """Random tables that follow the rules, other ones in every layer and head, for rows of about unit size."""
    generator, tables = torch.Generator().manual_seed(5), {}
    for name, table in expected(method, cache):
        values = torch.rand(table.shape(cache.num_kv_heads), generator=generator)
        if table.rule == "levels":
            values = torch.linspace(-1, 1, values.numel()) * (0.9 + 0.1 * values.sort().values)
            values = values.sort().values
        elif table.rule == "range":
            values = torch.stack([values[:, 0] + 2.5, values[:, 1] - 0.5], 1)
        elif table.rule == "permutation":
            values = values.argsort(-1)
        elif table.rule == "flag":
            values = values < 0.5
        elif table.rule == "finite":
            values = torch.randn(values.shape, generator=generator)
        tables[name] = values.to(table.dtype)
    origin = Origin("own", method.model_dump(mode="json"), fingerprint(model), "a text", "0" * 64, 512, "none", "1")
    write(path, origin, cache, tables)
    return path


@pytest.mark.parametrize(
    ("content", "method"),
    [(KVQUANT, Kvquant(bits=4)), (CQ, Cq(couple=2)), ({**INT8, **SKVQ}, Skvq()), ({**CLIPPED, **SKVQ}, Skvq())],
    ids=["kvquant", "cq", "permutation", "skvq"],
)
def test_layers_answer_by_their_own_tables(content, method, model: Path, tmp_path: Path) -> None:
    """The probe's reference answers from the rows that a layer is given; tables are those of the file, by layer."""
    file = calibration_file(tmp_path / "own.safetensors", method, model)
    policy = policy_file(tmp_path, content, file)
    with engine(model, str(policy), worker_extension_cls=EXTENSION_PATH, skip_tokenizer_init=True) as llm:
        config = llm.llm_engine.vllm_config
        found = chosen_calibration({}, load_policy(str(policy)), config.model_config)
        assert found is not None
        for layer, impl in kvserve_layers(config):
            own = found.layer_tables(layer, 0, 2)
            assert own and all(torch.equal(impl.attention.tables[name], table) for name, table in own.items())
        llm.collective_rpc("kvserve_probe_start")
        generate(llm, random_prompts([200]), max_tokens=70)
        (report,) = llm.collective_rpc("kvserve_probe_finish")
        assert len(report["layers"]) == 2 and not report["problems"]
        for layer in report["layers"]:
            assert max(layer["kernel_heads"]) < 2e-3
            assert max(layer["codec_heads"]) > 1e-4  # the pages were read


@pytest.mark.parametrize(
    "transforms",
    [
        {"key": ["rotation"], "value": ["rotation"]},
        {"key": ["permutation", "rotation"], "value": ["permutation"]},
        pytest.param({"value": ["rotation", "permutation"]}, marks=pytest.mark.slow),
    ],
    ids=["rotation", "both", "values"],
)
def test_transforms_change_no_answer_of_a_dense_cache(transforms, model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", Skvq(), model)
    reads = "permutation" in str(transforms)
    policy = policy_file(tmp_path, {"transforms": transforms}, file if reads else None)
    prompts = random_prompts([150, 70])
    with engine(model, "none", skip_tokenizer_init=True) as llm:
        plain = generate(llm, prompts)
    with engine(model, str(policy), skip_tokenizer_init=True) as llm:
        mapped = generate(llm, prompts)
    for one, other in zip(plain, mapped, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        torch.testing.assert_close(prompt_logprobs(one), prompt_logprobs(other), rtol=1e-3, atol=1e-3)


def test_the_heads_that_a_calibration_names_keep_everything(model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", Razor(), model)
    eviction = {
        "scorer": "position", "budget": {"name": "head-classes", "whole": "calibrated"}, "retention": "compensate",
        "rate": 1.7,
    }  # fmt: skip
    policy = policy_file(tmp_path, {**INT8, "eviction": eviction}, file)
    flags = load_file(file)
    named = tuple((i, head) for i in (0, 1) for head in (0, 1) if flags[f"layers.{i}.heads.whole"][head])
    assert 0 < len(named) < 4
    with engine(model, str(policy), skip_tokenizer_init=True, worker_extension_cls=EXTENSION_PATH) as llm:
        settings = EngineSettings.from_vllm_config(llm.llm_engine.vllm_config)
        assert settings is not None and settings.policy.eviction is not None
        assert settings.policy.eviction.budget.whole == named
        llm.collective_rpc("kvserve_probe_start")
        generate(llm, random_prompts([500]), max_tokens=20)
        probe = worker_log.recorder
        assert isinstance(probe, Probe)
        kept = [[len(rows) for rows in layer.history.kept] for layer in probe.layers]
        (report,) = llm.collective_rpc("kvserve_probe_finish")
    most = max(map(max, kept))
    assert [(i, head) for i in (0, 1) for head in (0, 1) if kept[i][head] == most] == list(named)
    assert most == 448 - 4 and not report["problems"], "the tokens between the sinks and the unfinished tile"
    for layer in report["layers"]:
        assert max(layer["kernel_heads"]) < 2e-3


def config_of(model: Path, section: dict[str, Any]) -> Any:
    """A vLLM configuration as far as a calibration is concerned."""
    from vllm.config import ModelConfig

    return SimpleNamespace(model_config=ModelConfig(model=str(model), skip_tokenizer_init=True), section=section)


def test_the_chosen_file_stands_in_the_configuration_and_must_not_change(model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", Kvquant(bits=4), model)
    policy = load_policy(str(policy_file(tmp_path, KVQUANT, file)))
    config, section = config_of(model, {}), {"policy": "own"}
    found = chosen_calibration(section, policy, config.model_config)
    assert found is not None and section["calibration"] == {"path": str(file), "sha256": found.sha256}
    assert chosen_calibration(section, policy, config.model_config) == found
    write(file, Origin("own", found.origin.parameters, found.origin.fingerprint, "another", "1" * 64, 9, "none", "1"),
          CACHE, found.tensors)  # fmt: skip
    with pytest.raises(UnsupportedError, match="has changed since the server chose it"):
        chosen_calibration(section, policy, config.model_config)
    assert chosen_calibration({}, policy, config.model_config) != found
    with pytest.raises(UnsupportedError, match='takes "path" and "sha256"'):
        chosen_calibration({"calibration": "x"}, policy, config.model_config)


def test_vllms_hash_of_its_configuration_knows_the_tables(model: Path, tmp_path: Path) -> None:
    from vllm.config import VllmConfig

    hashes = set()
    for seed in ("a", "b"):
        section = {"policy": "own", "calibration": {"path": "/x", "sha256": seed}}
        hashes.add(VllmConfig(additional_config={"kvserve": section}).compute_hash())
    assert len(hashes) == 2


def test_a_missing_calibration_names_its_command(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    policy = load_policy(str(policy_file(tmp_path, KVQUANT, "kvquant-4bit")))
    with pytest.raises(UnsupportedError, match="make it with `kvserve calibrate --method kvquant-4bit --model"):
        chosen_calibration({}, policy, config_of(model, {}).model_config)


@pytest.mark.parametrize(
    ("content", "method", "part"),
    [
        (KVQUANT, Kvquant(bits=3), r"a table key.table.levels \[16\], its calibration \(kvquant\) has one of \[8\]"),
        (KVQUANT, Cq(), "reads a table key.table.levels .* has none"),
        (KVQUANT, Kvquant(bits=4, keys="after-rope"), "keys before rope and its calibration was fitted to keys after"),
        ({**KVQUANT, "key": KVQUANT["key"]["inner"]}, Kvquant(bits=4), "--set keys=after-rope"),
        ({**KVQUANT, "value": {"name": "table", "bits": 4}}, Kvquant(bits=4), "leaves 1.0% of the elements"),
        ({**INT8, "transforms": {"key": ["permutation"]}}, Skvq(keys="before-rope"), "calibrate with --set keys=after"),
        ({**CLIPPED, **SKVQ}, Skvq(bits=4), "has 2-bit keys and clips that were fitted to 4 bits"),
        ({**CLIPPED, **SKVQ}, Skvq(group_size=64), r"a table key.affine.clip \['kv_heads', 2\]"),
        ({**CLIPPED, "transforms": {"key": ["permutation"]}}, Skvq(), "add permutation to transforms.value"),
    ],
)  # fmt: skip
def test_calibrations_that_a_policy_cannot_use_are_refused(content, method, part, model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", method, model)
    policy = load_policy(str(policy_file(tmp_path, content, file)))
    with pytest.raises(UnsupportedError, match=part):
        chosen_calibration({}, policy, config_of(model, {}).model_config)


def test_codecs_bring_their_calibration_and_transforms(tmp_path: Path) -> None:
    path = policy_file(tmp_path, {**INT8, **SKVQ}, "skvq-2bit")
    policy = load_policy(str(path))
    assert [one.name for one in policy.transforms.key] == ["permutation"] and policy.calibration == "skvq-2bit"
    assert load_policy(str(path), ["transforms.key=[]"]).transforms.key == ()


def test_an_embedding_of_other_channels_names_the_right_parameters() -> None:
    codec = BeforeRope(inner=Table(bits=2))
    check_embedding(codec, RotaryTable(torch.zeros(2, 32, 8)), 64)
    with pytest.raises(UnsupportedError, match=r"turns 32 of 64 channels, halves together.*key.rotary_dim=32"):
        check_embedding(codec, RotaryTable(torch.zeros(2, 16, 8)), 64)
    with pytest.raises(UnsupportedError, match=r"neighbours together.*key.interleaved=true"):
        check_embedding(codec, RotaryTable(torch.zeros(2, 32, 8), interleaved=True), 64)


def test_the_startup_table_says_which_calibration_is_in_effect(model: Path, tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "own.safetensors", Skvq(), model)
    policy = load_policy(str(policy_file(tmp_path, {**INT8, **SKVQ}, file)))
    found = chosen_calibration({}, policy, config_of(model, {}).model_config)
    assert found is not None
    settings = EngineSettings(policy, 64, torch.float32, calibration=found)
    report = EngineReport(settings.layout(64), 2, 2, 100, 1024, calibration=found.describe())
    table = report.table()
    assert f"own, 512 tokens of a text, importance: none; sha256 {found.sha256[:16]}" in table
    assert "K channels in a calibrated order; V channels in a calibrated order" in table
