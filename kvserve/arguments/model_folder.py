"""The model that is to be served, as far as its files tell without torch or vLLM."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvserve.checks import text_config
from kvserve.errors import UsageError
from kvserve.text_files import read_text

MAX_CONFIG_BYTES = 16 * 2**20
HUB_SECONDS = 5.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_ANY_FORMAT = (None, "auto", "hf", "safetensors", "pt")  # of --load-format, where weights must lie in the folder

# What kvserve and its measurements read as a whole number, with the largest that makes sense; null and absent are fine.
_MOST = 2**31 - 1
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "hidden_size", "n_embd", "d_model"), _MOST),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "vocab_size"), _MOST),
    **dict.fromkeys(("kv_lora_rank", "max_position_embeddings", "num_kv_shared_layers"), _MOST),
}
_KINDS: dict[str, tuple[type, str]] = {
    "model_type": (str, "text"),
    "architectures": (list, "a list of names"),
    **dict.fromkeys(("text_config", "llm_config", "language_config", "thinker_config"), (Mapping, "a group of keys")),
}


def read_model_config(model: str) -> dict[str, Any] | None:
    """config.json of a local folder, or of a Hugging Face model that is already cached; None where there is none.

    Raises:
        UsageError: `model` is a path and nothing is there, or its config.json cannot be used.
    """
    folder = path_of(model)
    if re.match(r"^(/|\.{1,2}/|~)", model) and not folder.exists():
        raise UsageError(f"the model folder {model} does not exist; give a Hugging Face folder or name with --model")
    path = folder / "config.json" if folder.is_dir() else _cached_config(model)
    if path is None or not path.exists():
        return None
    try:
        config = json.loads(read_text(path, MAX_CONFIG_BYTES))
        if not isinstance(config, dict):
            raise UsageError(f"{path} is not a JSON object; it does not describe a model")
        _check_kinds(config, path)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise UsageError(f"cannot read {path}: its values are nested too deeply") from None
    return config


def check_model_files(model: str, options: Mapping[str, Any]) -> None:
    """Refuse a local folder or file that holds no model, and a name that cannot be downloaded.

    Raises:
        UsageError: naming what is missing.
    """
    folder = path_of(model)
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise UsageError(f"--model {model} is a file; give the folder that it lies in")
        return
    if not folder.is_dir():
        _check_name(model)
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UsageError(f"cannot read the model folder {model}: {error.strerror}") from None
    if not options.get("hf_config_path") and not {"config.json", "params.json"} & set(names):
        raise UsageError(f"the model folder {model} has no config.json; give the folder of a Hugging Face model")
    if options.get("load_format") in _ANY_FORMAT and not any(next(folder.glob(kind), None) for kind in _WEIGHTS):
        raise UsageError(f"the model folder {model} has no weights (*.safetensors); was it downloaded completely?")


def _check_name(model: str) -> None:
    """Refuse what is no folder and can be no download either; vLLM would find out after minutes of retries."""
    if "://" in model or os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return  # other sources
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
        raise UsageError(
            f"there is no model folder {model!r:.200}, and a Hugging Face name is written ORGANISATION/NAME"
        )
    if (path := _cached_config(model)) is not None and path.exists():
        return
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE):
        raise UsageError(f"there is no model folder {model}, it was not downloaded before, and {_OFFLINE[0]} is set")
    if not hub_answers():
        raise UsageError(
            f"there is no model folder {model}, and it cannot be downloaded: {hub_host()} does not answer; give the "
            "folder of a model with --model"
        )


def hub_host() -> str:
    """Where Hugging Face models come from."""
    return urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or "huggingface.co"


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached; True where that is left to a proxy."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((hub_host(), port), HUB_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def is_local_model(name: str) -> bool:
    """Whether a name is a path, or a Hugging Face model that is already cached.

    Raises:
        UsageError: as `path_of`.
    """
    return "/" in name or path_of(name).exists() or ((path := _cached_config(name)) is not None and path.exists())


def _check_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Refuse values that are not what their names promise; vLLM and kvserve would trip over them later."""
    for key, (kind, words) in _KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise _wrong(path, key, config[key], words)
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise _wrong(path, "architectures", config["architectures"], "a list of names")
    for part in {id(part): part for part in (config, text_config(config))}.values():
        for key, most in _SIZES.items():
            value = part.get(key)
            if value is not None and not (type(value) is int and 0 <= value <= most):
                raise _wrong(path, key, value, f"a whole number from 0 to {most}")


def _wrong(path: Path, key: str, value: Any, words: str) -> UsageError:
    try:
        shown = f"{json.dumps(value):.60}"
    except (ValueError, RecursionError):
        shown = "something too large to show"
    return UsageError(f"{path}: {key} is {shown}, it must be {words}; download the model again, or correct the file")


def path_of(model: str) -> Path:
    """The path that a model's name would be.

    Raises:
        UsageError: the system does not say whether something is there.
    """
    path = Path(model)
    with suppress(RuntimeError):  # ~ without a home folder
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise UsageError(f"cannot look for the model {model:.200}: {error.strerror}") from None
    return path


def downloaded_folder(model: str) -> Path | None:
    """The folder of a Hugging Face model that is already cached; None: it is not."""
    config = _cached_config(model)
    return config.parent if config is not None and config.exists() else None


def _cached_config(model: str) -> Path | None:
    try:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        repo = hub / f"models--{model.replace('/', '--')}"
        revision = (repo / "refs" / "main").read_text().strip()
    except (OSError, RuntimeError, ValueError):
        return None
    return repo / "snapshots" / revision / "config.json"
