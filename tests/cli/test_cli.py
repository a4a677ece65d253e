"""The command line: what goes to vLLM, and what the other commands print."""

import argparse
import json
import os
import subprocess
import sys
import textwrap

import pytest

from kvserve.checks import ServeOptions, check_options, choose_kernels
from kvserve.cli import launch, main
from kvserve.errors import UnsupportedError, UsageError
from kvserve.policies.loading import load_policy, policy_from_config
from kvserve.policies.registry import policy_names
from tests.cases.cli_cases import KIVI, model_folder

# Splitting


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "int8", "--port", "0", "--enforce-eager", "-tp", "2"],
        ["serve", "--port", "0", "--enforce-eager", "--policy=int8", "-tp", "2"],
        ["--port", "0", "--enforce-eager", "-tp", "2", "--policy", "int8", "--policy", "int8"],
    ],
)
def test_unknown_options_go_to_vllm_untouched_and_in_order(started, arguments):
    assert main(arguments) == 0
    assert started == [(load_policy("int8"), [], ["--port", "0", "--enforce-eager", "-tp", "2"], "auto", True, False)]


def test_a_positional_model_and_overrides(started):
    assert main(["some-org/model", "--policy", "int8", "--policy-set", "sink_tokens=4", "--policy_set=key.bits=4"]) == 0
    policy, overrides, rest, *_ = started[0]
    assert policy.sink_tokens == 4 and policy.key.bits == 4
    assert overrides == ["sink_tokens=4", "key.bits=4"] and rest == ["some-org/model"]


def test_rates_are_options_of_their_own(started):
    assert main(["--policy", "kv-compress", "--compression-rate", "8"]) == 0
    assert main(["--policy", "kv-compress", "--max-cache-tokens=512", "--port", "0"]) == 0
    assert (started[0][0].eviction.rate, started[0][0].eviction.max_tokens) == (8, None)
    assert (started[1][0].eviction.rate, started[1][0].eviction.max_tokens) == (None, 512)
    assert started[1][2] == ["--port", "0"]


def test_config_with_an_equals_sign_is_given_to_vllm_in_the_form_it_reads(started, tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("max-num-seqs: 4\n")
    assert main(["--policy", "int8", f"--config={path}"]) == 0
    assert started[0][2] == ["--config", str(path)]


def test_the_environment_names_the_policy_where_the_command_line_does_not(started, refusal, monkeypatch):
    monkeypatch.setenv("KVSERVE_POLICY", "kivi-2bit")
    assert main(["serve", "--model", "somewhere/model"]) == 0
    assert main(["serve", "--policy", "int8"]) == 0
    assert [call[0].name for call in started] == ["kivi-2bit", "int8"]
    started.clear()
    monkeypatch.setenv("KVSERVE_POLICY", "")
    assert "--policy is missing" in refusal("serve")


# Kernels


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
        ("fast", "cpu", "one of auto, native, reference, triton"),
    ],
)
def test_kernels_of_another_device_are_refused(asked, device, part, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=part):
        choose_kernels(asked, device)


@pytest.mark.parametrize("asked", ["auto", "native"])
def test_a_cpu_is_refused_where_the_cpu_kernels_were_not_built(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("kvserve.native.LIBRARY_DIR", tmp_path)
    with pytest.raises(UnsupportedError, match=f"--kernels {asked} needs the CPU kernels.*KVSERVE_NO_NATIVE"):
        choose_kernels(asked, "cpu")
    assert choose_kernels("auto", "cuda") == "triton"


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
        worker_cls="auto",
        worker_extension_cls="",
    )
    return argparse.Namespace(**{**defaults, **changes})


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
    assert args.block_size is None, "the engine chooses, and says so"


def test_a_cpu_gets_the_worker_that_survives_seeds_and_no_other(default_model):
    args = parsed()
    launch.configure(args, KIVI)
    assert args.worker_cls == "kvserve.engine.cpu_worker.SeededCpuWorker"
    with pytest.raises(UsageError, match="drop --worker-cls"):
        launch.configure(parsed(worker_cls="my.Worker"), KIVI)
    gpu = parsed(worker_cls="my.Worker")
    launch.configure(gpu, KIVI, device="cuda")
    assert gpu.worker_cls == "my.Worker"


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
        launch.configure(parsed(speculative_config={"method": "medusa"}), KIVI)
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
    assert (args["model"], args["port"], args["max_model_len"], args["block_size"]) == (model, 1234, 1000, None)
    assert args["additional_config"]["other"] == {"a": 1}
    assert policy_from_config(args["additional_config"]["kvserve"]) == KIVI
    assert args["plugins"].split(",")[-1] == "kvserve"


# The other commands


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


def test_explaining_what_does_not_fit(refusal):
    assert "the model has the layers 0 to 3" in refusal(
        "policies", "snapkv", "--policy-set", "eviction.spare_layers=[5]", "--num-layers", "4"
    )
    assert "head_dim 64, 96, 128" in refusal("policies", "kivi-2bit", "--head-dim", "80")
    assert "did you mean" in refusal("policies", "kivi2")


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert "tested with vLLM >=0.32.0,<0.34" in capsys.readouterr().out
    for arguments in (["--help"], ["serve", "--help"], ["--policy", "nonsense", "-h"]):
        assert main(arguments) == 0
        assert "kivi-2bit" in capsys.readouterr().out


def test_prepare_model_takes_no_arguments(refusal):
    assert "unknown option '--force'" in refusal("prepare-model", "--force")


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
    assert main(["--policy", "int8", "--no-self-test", "--port", "0"]) == 0
    assert started[0][2:] == (["--port", "0"], "auto", False, False)
