"""Command lines that kvserve must refuse (command_lines.txt), and the files that they name."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.cases.cli_cases import LLAMA

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
    "hidden_text": {"hidden_size": "many"}, "hidden_group": {"hidden_size": {"a": 1}},
    "heads_list": {"num_attention_heads": [9]},
    "layers_text": {"num_hidden_layers": "30"}, "layers_huge": {"num_hidden_layers": 10**9},
    "kv_heads_text": {"num_key_value_heads": "3"}, "length_text": {"max_position_embeddings": "long"},
    "architectures_text": {"architectures": "LlamaForCausalLM"}, "architectures_number": {"architectures": [1]},
    "type_list": {"model_type": ["llama"]}, "text_config_list": {"text_config": [1]},
    "nested_text": {"text_config": {"head_dim": "64"}}, "lora_rank_text": {"kv_lora_rank": "512"},
    "odd_head_dim": {"head_dim": 80},
}  # fmt: skip
RAW_CONFIGS = {
    "broken": "{",
    "array": "[1]",
    "number": "5",
    "deep": '{"a":' * 20_000,
    "digits": '{"head_dim": ' + "9" * 5000 + "}",
}


class Line(NamedTuple):
    """A command line, and a part of the sentence that refuses it."""

    words: str
    part: str
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self, files: Path, port: int) -> list[str]:
        return [_fill(word, files).replace("{port}", str(port)) for word in shlex.split(self.words)]

    def variables(self, files: Path) -> dict[str, str]:
        return {name: _fill(value, files) for name, value in self.environment}


def _fill(word: str, files: Path) -> str:
    return word.replace("{files}", str(files)).replace("{digits}", "9" * 5000).replace("{long}", "a" * 300)


def _read() -> dict[str, list[Line]]:
    """The lines of command_lines.txt by section."""
    sections: dict[str, list[Line]] = {}
    for text in (Path(__file__).with_suffix(".txt")).read_text().splitlines():
        if text.startswith("["):
            lines = sections[text.strip("[]")] = []
        elif text and not text.startswith("#"):
            words, _, part = (piece.strip() for piece in text.rpartition("|"))
            variables = []
            while found := re.match(r"([A-Z_]+)=(\S+) ", words + " "):
                variables.append((found[1], found[2]))
                words = words[found.end() :]
            lines.append(Line(words, part, tuple(variables)))
    return sections


REFUSED_EARLY, REFUSED_BY_VLLM = _read().values()


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
