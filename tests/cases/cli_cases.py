"""A model of the command line tests, and the policies they serve it with."""

import json
from pathlib import Path

from kvserve.policies.loading import load_policy

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9}
KIVI = load_policy("kivi-2bit")
DENSE = load_policy("none")


def model_folder(folder: Path, **config) -> str:
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return str(folder)
