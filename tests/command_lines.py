"""Command lines that kvserve must refuse, and the files that they name."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cli_cases import LLAMA

POLICY_FILES = {
    "key_list.yaml": "[a, b]: 1\n",
    "key_group.yaml": "name: x\nsummary: s\nkey: {{a: 1}: 2}\n",
    "deep.yaml": "key: " + "[" * 20_000,
    "bomb.yaml": "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]),
    "digits.yaml": "name: x\nsummary: s\ntile_tokens: " + "9" * 5000,
    "scorer.yaml": "name: x\nsummary: s\ncodec: int8\neviction: {scorer: [1], budget: uniform, rate: 4}\n",
    "twice.yaml": "name: x\nsummary: s\nname: y\n",
    "tabs.yaml": "name: x\n\tsummary: s\n",
    "empty.yaml": "",
    "words.yaml": "kivi-2bit",
    "list.yaml": "- kivi-2bit\n",
    "half.yaml": "name: x\n",
    "tag.yaml": "name: !!python/object/apply:os.getcwd []\n",
    "layer.yaml": "name: x\nsummary: s\ncodec: int8\nlayers: {99: int4}\n",
    "server_list.yaml": "- port: 1\n",
    "server_broken.yaml": "port: [1\n",
    "server_port.yaml": "port: 99999\n",
    "server_blocks.yaml": "block-size: 0\n",
    "server.txt": "port: 1\n",
    "blank.txt": " \n",
}
CONFIGS = {
    "head_dim_text": {"head_dim": "64"}, "head_dim_list": {"head_dim": [64]}, "head_dim_negative": {"head_dim": -64},
    "head_dim_float": {"head_dim": 64.5}, "head_dim_huge": {"head_dim": 10**30}, "head_dim_true": {"head_dim": True},
    "hidden_text": {"hidden_size": "many"}, "hidden_group": {"hidden_size": {"a": 1}}, "heads_list": {"num_attention_heads": [9]},
    "layers_text": {"num_hidden_layers": "30"}, "layers_huge": {"num_hidden_layers": 10**9},
    "kv_heads_text": {"num_key_value_heads": "3"}, "length_text": {"max_position_embeddings": "long"},
    "architectures_text": {"architectures": "LlamaForCausalLM"}, "architectures_number": {"architectures": [1]},
    "type_list": {"model_type": ["llama"]}, "text_config_list": {"text_config": [1]},
    "nested_text": {"text_config": {"head_dim": "64"}}, "lora_rank_text": {"kv_lora_rank": "512"},
    "odd_head_dim": {"head_dim": 80},
}  # fmt: skip
RAW_CONFIGS = {"broken": "{", "array": "[1]", "number": "5", "deep": '{"a":' * 20_000, "digits": '{"head_dim": ' + "9" * 5000 + "}"}


class Line(NamedTuple):
    """Words of a command line (with {files}, a folder, and {port}, which is taken), and a part of the answer."""

    words: str
    part: str
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self, files: Path, port: int) -> list[str]:
        return [
            word.replace("{files}", str(files)).replace("{port}", str(port)).replace("{digits}", "9" * 5000)
            for word in shlex.split(self.words)
        ]


def _serve() -> Iterator[Line]:
    yield from (Line(words, part) for words, part in [
        ("", "--policy is missing"), ("serve", "--policy is missing"), ("serve some-org/model", "--policy is missing"),
        ("some-org/model --port 0", "--policy is missing"), ("--polcy int8", "did you mean it instead of --polcy"),
        ("frobnicate", "there is no command 'frobnicate'"), ("polices", "did you mean 'policies'"),
        ("evla --policies none", "did you mean 'eval'"), ("doctr --policy int8", "did you mean 'doctor'"),
        ("prepare_model", "did you mean 'prepare-model'"), ("{digits}", "cannot look for the model"),
        ("--policy", "--policy needs a value"), ("--policy --port 0", "--policy needs a value"),
        ("--policy=", "--policy needs a value"), ("--policy ''", "--policy needs a value"),
        ("--policy kivi", "did you mean 'kivi-"), ("--policy {digits}", "there is no policy"),
        ("--policy int8 --policy none", "given twice"), ("--policy snapkv@", "lacks its rate"),
        ("--policy snapkv@x", "eviction.rate"), ("--policy snapkv@0", "from 1 to 1024"),
        ("--policy snapkv@1e99", "eviction.rate"), ("--policy snapkv@4@4", "eviction.rate"),
        ("--policy int8@4", "evicts nothing"), ("--policy snapkv --compression-rate", "needs a value"),
        ("--policy snapkv --compression-rate nan", "eviction.rate"),
        ("--policy snapkv --compression-rate {digits}", "the value is not a number"),
        ("--policy snapkv --max-cache-tokens 0", "eviction.max_tokens"),
        ("--policy snapkv --max-cache-tokens -5", "eviction.max_tokens"),
        ("--policy snapkv --max-cache-tokens 1.5", "eviction.max_tokens"),
        ("--policy int8 --policy-set", "needs a value"), ("--policy int8 --policy-set key.bits", "key=value"),
        ("--policy int8 --policy-set key.bits=[[[[", "key.bits"), ("--policy int8 --policy-set key.bits={digits}", "key.bits"),
        ("--policy int8 --policy-set 'key.bits={[a]: 1}'", "key.bits"), ("--policy int8 --policy-set keys.bits=2", "did you mean"),
        ("--policy int8 --policy-set 'key.bits=&a [*a]'", "key.bits"), ("--policy snapkv --policy-set eviction.scorer=[1]", "scorer"),
        ("--policy int8 --kernels fast", "--kernels must be one of"), ("--policy int8 --kernels", "needs a value"),
        ("--policy int8 --no-self-test=1", "takes no value"), ("--policy int8 --verbose=2", "takes no value"),
        ("--policy int8 --block-size 0", "--block-size must be a number of at least 1"),
        ("--policy none --block-size -64", "--block-size must be"), ("--policy int8 --block-size 16", "tile_tokens"),
        ("--policy int8 --block-size many", "--block-size must be"), ("--policy int8 --port 99999", "from 0 to 65535"),
        ("--policy int8 --port -1", "from 0 to 65535"), ("--policy int8 --port http", "from 0 to 65535"),
        ("--policy int8 --port {digits}", "from 0 to 65535"), ("--policy int8 --port", "from 0 to 65535"),
        ("--policy int8 --host 127.0.0.1 --port {port}", "is taken by another process"),
        ("--policy int8 --port={port}", "is taken by another process"),
        ("--policy int8 --host 256.1.1.1 --port 0", "no address of this machine"),
        ("--policy int8 --host 192.0.2.77 --port 0", "no address of this machine"),
        ("--policy int8 --uds {files}/blank.txt", "exists; remove it"),
        ("--policy int8 --uds {files}/none/socket", "there is no folder"),
        ("--policy int8 --max-model-len 0", "--max-model-len must be"), ("--policy int8 --max-model-len long", "--max-model-len must be"),
        ("--policy int8 --max-num-seqs 0", "--max-num-seqs must be"), ("--policy int8 -tp 0", "--tensor-parallel-size must be"),
        ("--policy int8 --kv-cache-memory-bytes 0", "--kv-cache-memory-bytes must be"),
        ("--policy int8 --kv-cache-dtype fp8", "drop the option"), ("--policy int8 --spec-tokens 3", "speculative"),
        ("--policy int8 --attention-backend FLASH_ATTN", "drop --attention-backend"),
        ("--policy int8 --config", "--config takes a file"), ("--policy int8 --config {files}/none.yaml", "No such file"),
        ("--policy int8 --config {files}/server.txt", "ends in .yaml"), ("--policy int8 --config {files}/folder.yaml", "a directory"),
        ("--policy int8 --config {files}/pipe.yaml", "not a regular file"), ("--policy int8 --config={files}/server_list.yaml", "option: value"),
        ("--policy int8 --config {files}/server_broken.yaml", "not valid YAML"), ("--policy int8 --config {files}/server_port.yaml", "from 0 to 65535"),
        ("--policy int8 --config {files}/server_blocks.yaml", "--block-size must be"), ("--policy int8 --config {files}/large.yaml", "longer than 1 MiB"),
        ("--policy int8 --config {files}/bomb.yaml", "values"),
        ("--policy int8 --model {files}/none", "does not exist"), ("--policy int8 --model ~nobody-here/model", "does not exist"),
        ("--policy int8 {files}/empty-model", "has no config.json"), ("--policy int8 {files}/no-weights", "has no weights"),
        ("--policy int8 --model {files}/blank.txt", "is a file"), ("--policy int8 --model {files}/pipe-config", "not a regular file"),
    ])  # fmt: skip
    for name in POLICY_FILES:
        if name.endswith(".yaml") and not name.startswith("server"):
            yield Line(f"--policy {{files}}/{name} --port 0", name if name not in ("scorer.yaml",) else "eviction.scorer")
    for name in ("pipe.yaml", "folder.yaml", "large.yaml", "binary.yaml", "none.yaml"):
        yield Line(f"serve --policy {{files}}/{name}", "cannot read the policy file")
    yield Line("--policy /dev/zero", "not a regular file")
    for name in (*CONFIGS, *RAW_CONFIGS):
        yield Line(f"--policy int8 --model {{files}}/{name}", name)
    yield Line("--policy int8 --port 0", "set KVSERVE_CACHE", (("KVSERVE_CACHE", "{files}/blank.txt"),))
    yield Line("--policy int8 --port 0", "set KVSERVE_CACHE", (("KVSERVE_CACHE", "/proc/none"),))
    yield Line("--policy int8 --port 0", "set KVSERVE_CACHE", (("KVSERVE_CACHE", "{files}/" + "a" * 300),))


def _others() -> Iterator[Line]:
    yield from (Line(words, part) for words, part in [
        ("policies --num-layers -1", "--num-layers: must be a whole number from 1"), ("policies --num-layers many", "--num-layers"),
        ("policies int8 --head-dim 0", "--head-dim: must be a whole number from 1"), ("policies int8 --head-dim 7", "head_dim"),
        ("policies int8 --head-dim {digits}", "--head-dim"), ("policies nonsense", "there is no policy"),
        ("policies int8 kivi-2bit", "one word too many"), ("policies --wyde", "policies --help"), ("policies --jason", "did you mean --json"),
        ("policies --policy-set key.bits=4", "needs the policy it changes"), ("policies int8 --json", "leave out the policy"),
        ("policies int8 --policy none", "two policies"), ("policies {files}/bomb.yaml", "values"), ("policies {files}/pipe.yaml", "not a regular"),
        ("policies {files}/layer.yaml", "layers"), ("policies int8 --kernels native", "unknown option '--kernels'"),
        ("inspect", "--policy is missing"), ("inspect --policy snapkv", "give the prompt"), ("inspect --policy int8 text", "keeps every token"),
        ("inspect --policy snapkv@x text", "eviction.rate"), ("inspect --policy snapkv a b", "one word too many"),
        ("inspect --policy snapkv --prompt-file {files}/none", "No such file"), ("inspect --policy snapkv --prompt-file {files}/pipe.yaml", "not a regular"),
        ("inspect --policy snapkv --prompt-file {files}/blank.txt", "is empty"), ("inspect --policy snapkv text --json {files}/no/x", "there is no folder"),
        ("inspect --policy snapkv text --json {files}", "is a directory"), ("inspect --policy snapkv text --dtype int4", "--dtype"),
        ("inspect --policy snapkv text --model {files}/head_dim_text", "head_dim"), ("inspect --policy snapkv text --model {files}/empty-model", "no config.json"),
        ("inspect --policy snapkv text --kernels triton", "unknown option"),
        ("eval --policies nonsense", "there is no policy"), ("eval --policies snapkv@x", "eviction.rate"), ("eval --suite huge", "there is no suite"),
        ("eval --lengths 5", "--lengths takes whole numbers"), ("eval --lengths {digits}", "--lengths"), ("eval --depths 2", "--depths takes numbers"),
        ("eval --examples 0", "--examples must be"), ("eval --examples many", "--examples"), ("eval --seed -1", "--seed"),
        ("eval --tasks juggling", "--tasks takes all"), ("eval --questions why", "--questions takes"), ("eval --text {files}/none", "No such file"),
        ("eval --text {files}/pipe.yaml", "not a regular file"), ("eval --out {files}/no/x.json", "there is no folder"), ("eval --polices none", "did you mean --policies"),
        ("eval --model {files}/none", "does not exist"), ("eval --model nobody/nothing", "neither a Hugging Face folder nor"),
        ("eval --model {files}/head_dim_text", "head_dim"), ("eval --model {files}/empty-model", "neither a Hugging Face folder nor"),
        ("doctor", "--policy is missing"), ("doctor --policy nonsense", "there is no policy"), ("doctor --policy int8 --layers -1", "--layers"),
        ("doctor --policy int8 --seed x", "--seed"), ("doctor --policy int8 --dtype int8", "--dtype"), ("doctor --policy int8 --json {files}", "is a directory"),
        ("doctor --policy int8 --write-policy {files}/no/x.yaml", "there is no folder"), ("doctor --policy int8 --text {files}/large.yaml --model {files}/none", "does not exist"),
        ("doctor --policy int8 --model {files}/layers_text", "num_hidden_layers"), ("doctor --policy int8 --model {files}/empty-model", "neither a Hugging Face folder nor"),
        ("doctor --policy int8 extra", "one word too many"), ("doctor --policy {files}/deep.yaml", "nested"),
        ("bench --suite nonsense", "there is no suite"), ("bench --policies int8", "must contain stock"), ("bench --policies stock,nonsense", "takes stock and shipped"),
        ("bench --policies stock,snapkv@x", "eviction.rate"), ("bench --repeats 0", "--repeats must be"), ("bench --context many", "--context"),
        ("bench --requests 0", "--requests"), ("bench --request-rate nan", "--request-rate"), ("bench --model {files}/empty-model", "no config.json"),
        ("bench --model {files}/head_dim_text", "head_dim"), ("bench --suite quality", "needs --text"), ("bench --text {files}/pipe.yaml", "not a regular"),
        ("bench --out {files}/no/x.json", "there is no folder"), ("bench --nonsense", "unknown option"), ("bench --policies stock,none --suite capacity --model {files}/nested_text", "head_dim"),
        ("prepare-model --force", "unknown option"), ("prepare-model now", "one word too many"),
    ])  # fmt: skip
    for command in ("prepare-model", "eval", "bench --quick", "doctor --policy int8", "inspect --policy snapkv text"):
        yield Line(command, "set KVSERVE_CACHE", (("KVSERVE_CACHE", "{files}/blank.txt"),))


REFUSED_EARLY = [*_serve(), *_others()]

# What only vLLM's parser and configuration can refuse: these load it.
REFUSED_BY_VLLM = [
    Line("--policy int8 --no-such-option", "--no-such-option"), Line("--policy int8 --dtype int3", "--dtype"),
    Line("--policy int8 --max-num-seqs", "--max-num-seqs"), Line("--policy int8 --api-server-count x", "--api-server-count"),
    Line("--policy int8 --kernels triton", "runs on cuda devices"), Line("--policy int8 --chat-template {files}/none.jinja", "chat template"),
    Line("--policy int8 --enable-auto-tool-choice", "--tool-call-parser"), Line("--policy int8 --hf-overrides {", "--hf-overrides"),
    Line("--policy int8 --additional-config '[1]'", ""), Line("--policy int8 --additional-config '{\"kvserve\": 1}'", "given twice"),
    Line("--policy int8 --scheduler-cls a.B --worker-extension-cls c.D", "--no-self-test"),
    Line("--policy snapkv --scheduler-cls a.B", "drop --scheduler-cls"),
    Line("--policy int8 --config {files}/bomb.yaml --model {files}/ok", "values"),
]  # fmt: skip


def write_files(folder: Path) -> None:
    """Everything that the command lines name."""
    for name, text in POLICY_FILES.items():
        (folder / name).write_text(text)
    os.mkfifo(folder / "pipe.yaml")
    (folder / "folder.yaml").mkdir()
    (folder / "binary.yaml").write_bytes(bytes(range(256)) * 4)
    with (folder / "large.yaml").open("wb") as large:
        large.truncate(30 * 2**20)
    for name in ("empty-model", "no-weights", "pipe-config", "ok", *CONFIGS, *RAW_CONFIGS):
        (folder / name).mkdir()
    for name in ("pipe-config", "ok", *CONFIGS, *RAW_CONFIGS):
        (folder / name / "model.safetensors").touch()
    os.mkfifo(folder / "pipe-config" / "config.json")
    for name in ("no-weights", "ok"):
        (folder / name / "config.json").write_text(json.dumps(LLAMA))
    for name, changes in CONFIGS.items():
        (folder / name / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    for name, text in RAW_CONFIGS.items():
        (folder / name / "config.json").write_text(text)


@contextmanager
def taken_port() -> Iterator[int]:
    """A port of this machine that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield int(listener.getsockname()[1])
