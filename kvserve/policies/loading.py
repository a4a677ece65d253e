"""From a name, a YAML file or vLLM's additional_config to a validated Policy.

Everything that can be wrong with a policy ends as a PolicyError whose message is one sentence for the user.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kvserve.codecs.base import Codec
from kvserve.codecs.registry import class_of
from kvserve.errors import PolicyError
from kvserve.policies.base import Policy
from kvserve.policies.registry import policy_names, shipped_path
from kvserve.policies.yaml_text import parse, problem_of
from kvserve.text_files import UnreadableError, read_text

MAX_FILE_BYTES = 64 * 2**10  # the longest shipped policy has one of them

_DESCRIPTIVE = ("name", "summary", "paper")  # what overrides may not touch
_PARTS = ("scorer", "budget", "retention", "schedule")
_HALVES = ("key", "value")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # types of errors
# What `codec: NAME` takes from another policy.
_CODEC_KEYS = ("tile_tokens", "sink_tokens", "key", "value", "dense_pages", "transforms", "calibration")


def load_policy(name_or_path: str, overrides: Sequence[str] = ()) -> Policy:
    """Load a shipped policy by name, or any policy by the path of its YAML file.

    Args:
        name_or_path: a name of `policy_names()`, or a path (it has a slash or ends in .yaml or .yml). NAME@RATE is the
            policy NAME at another eviction rate.
        overrides: `dotted.key=value` changes, applied in order before validation.

    Raises:
        PolicyError: unknown name, unreadable file, or a value that is not allowed.
    """
    content = _read_named(name_or_path)
    for override in overrides:
        _apply_override(content, override)
    return _validate(content, str(name_or_path))


def policy_from_config(config: Mapping[str, Any]) -> Policy:
    """The policy that vLLM's additional_config["kvserve"] asks for.

    Args:
        config: `{"policy": <name, path or full content>, "set": {"dotted.key": value}}`; `set` may be absent. More keys
            are for the engine: `kernels`, `self_test` and `calibration` (kvserve/engine/settings.py, self_test.py,
            layer_tables.py).

    Raises:
        PolicyError: as for `load_policy`, or a key other than these five.
    """
    if not isinstance(config, Mapping):
        raise PolicyError(f'additional_config["kvserve"] must be a JSON object, got {config!r}')
    for key in config:
        if key not in ("policy", "set", "kernels", "self_test", "calibration"):
            raise PolicyError(
                f'additional_config["kvserve"] has an unknown key, {key!r}; '
                'it takes "policy", "set", "kernels", "self_test" and "calibration"'
            )
    source, changes = config.get("policy"), config.get("set") or {}
    if not isinstance(changes, Mapping):
        raise PolicyError(f'additional_config["kvserve"]["set"] must be a JSON object, got {changes!r}')
    if isinstance(source, str):
        content, label = _read_named(source), source
    elif isinstance(source, Mapping):
        content, label = _copy(source), str(source.get("name", "in additional_config"))
    else:
        raise PolicyError(
            f'additional_config["kvserve"]["policy"] must be a name, a path or a policy\'s content, got {source!r}'
        )
    for dotted, value in changes.items():
        _set(content, dotted, value)
    return _validate(content, label)


def policy_content(policy: Policy) -> dict[str, Any]:
    """The policy as plain JSON values: `policy_from_config({"policy": policy_content(p)}) == p`."""
    return policy.model_dump(mode="json", exclude_defaults=True)


def _read_named(name_or_path: str) -> dict[str, Any]:
    name, at, rate = os.fspath(name_or_path).partition("@")
    if not at or name not in policy_names():
        return _read_yaml(_find(name_or_path))
    if not rate:
        raise PolicyError(f"policy {name}@ lacks its rate; write one behind the @, for example {name}@4")
    content = _read_yaml(shipped_path(name))
    _apply_override(content, f"eviction.rate={rate}")
    _set(content, "eviction.max_tokens", None)
    return content


def _find(name_or_path: str) -> Path:
    name_or_path = os.fspath(name_or_path)
    if name_or_path in policy_names():
        return shipped_path(name_or_path)
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    raise PolicyError(
        f"there is no policy {name_or_path!r}{_did_you_mean(name_or_path, policy_names())}; "
        f"the policies are {', '.join(policy_names())}, or give the path of a YAML file"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except UnreadableError as error:
        raise PolicyError(f"cannot read the policy file {path}: {error}") from None
    try:
        content = parse(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}{problem_of(error)}") from None
    if not isinstance(content, dict):
        raise PolicyError(f"{path}, line 1: a policy is a list of `key: value` lines, found {content!r:.60}")
    if "codec" in content:
        content = _codec_of(content.pop("codec")) | content
    return content


def _codec_of(name: Any) -> dict[str, Any]:
    """The codec of a shipped policy that evicts nothing, as content."""
    if not isinstance(name, str) or name not in policy_names():
        raise PolicyError(f"codec is {_show(name)}, it must be the name of a shipped policy, for example kivi-2bit")
    content = _read_yaml(shipped_path(name))
    if "eviction" in content:
        raise PolicyError(f"codec: {name} evicts itself; name a policy that only writes pages, for example kivi-2bit")
    return {key: content[key] for key in _CODEC_KEYS if key in content}


def _layer_codec(index: Any, codec: Any, label: str) -> Any:
    """Keys and values of one layer, where `codec` is the name of a shipped policy or `dense`."""
    if not isinstance(codec, str):
        return codec
    try:
        content = _codec_of(codec)
    except PolicyError as error:
        raise PolicyError(f"policy {label}: layers.{_show(index)}: {error}") from None
    return {part: content[part] for part in ("key", "value") if part in content}


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise PolicyError(
            f"--policy-set takes key=value, for example sink_tokens=0 or key.bits=4, got {override!r:.60}"
        )
    try:
        if len(text) > MAX_FILE_BYTES:
            raise yaml.YAMLError
        value = parse(text)
    except yaml.YAMLError:
        raise PolicyError(f"--policy-set {override:.60}: the value is not a number, true, false or a word") from None
    _set(content, re.sub(r"-(?!\d)", "_", dotted.strip()), value)  # layers.-1 is the last layer


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    if dotted == "codec":
        for key in _CODEC_KEYS:
            content.pop(key, None)
        content |= _codec_of(value)
        return
    keys = dotted.split(".")
    model: type[BaseModel] = Policy
    for depth, key in enumerate(keys):
        if key not in model.model_fields or (depth == 0 and key in _DESCRIPTIVE):
            raise PolicyError(_unknown_key(dotted, _settable_keys()))
        nested = _nested_model(model.model_fields[key])
        if nested is None and key in (*_PARTS, *_HALVES, "layers"):
            break  # a codec or a part checks its own keys; those of layers are numbers
        if depth + 1 < len(keys):
            if nested is None:
                raise PolicyError(_unknown_key(dotted, _settable_keys()))
            model = nested
    target = content
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {"name": target[key]} if key in _PARTS and target.get(key) else {}
        target = target[key]
    target[keys[-1]] = value


def _settable_keys() -> list[str]:
    keys = []
    for name, field in Policy.model_fields.items():
        nested = _nested_model(field)
        if name in _HALVES:
            keys += [f"{name}.{inner}" for inner in _codec_fields({})]  # of the codec that needs no name
        elif nested is not None:
            keys += [f"{name}.{inner}" for inner in nested.model_fields]
        elif name not in _DESCRIPTIVE:
            keys.append(name)
    return keys


def _validate(content: dict[str, Any], label: str) -> Policy:
    if isinstance(content.get("layers"), Mapping):
        codecs = content["layers"].items()
        content["layers"] = {index: _layer_codec(index, codec, label) for index, codec in codecs}
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        # Unknown and missing keys first: they explain the errors of the rules that look at several keys.
        first = min(error.errors(), key=lambda e: e["type"] not in (*_UNKNOWN, "missing"))
        raise PolicyError(f"policy {label}: {_sentence(first, content)}") from None


def _sentence(error: ErrorDetails, content: Mapping[str, Any]) -> str:
    dotted = ".".join(part for part in error["loc"] if isinstance(part, str))  # without places in lists
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "invalid_key":
        return f"unknown key {_show(error['input'])}; keys are words"
    if error["loc"][0] == "layers" and (len(error["loc"]) > 1 or error["type"] == "tuple_type"):
        return (
            f"{dotted} is {_show(error['input'])}; layers takes the name of a policy, dense, or key and value for each "
            "index, for example {0: int8, -1: dense}"
        )
    if any(part in _PARTS for part in error["loc"][:-1]):
        return f"{dotted} is {_show(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "missing" and error["loc"][0] == "eviction":
        return f"it evicts nothing ({dotted} is missing); choose one that evicts, for example kv-compress-2bit"
    if error["type"] == "missing":
        return f"{dotted} is missing, it must be {_allowed(dotted, content)}"
    if error["type"] in _UNKNOWN:
        siblings = _fields_at(error["loc"][:-1], content)
        prefix = dotted.rpartition(".")[0]
        return _unknown_key(dotted, [f"{prefix}.{name}" if prefix else name for name in siblings])
    return f"{dotted} is {_show(error['input'])}, it must be {_allowed(dotted, content)}"


def _unknown_key(dotted: str, known: Sequence[str]) -> str:
    return f"unknown key {dotted!r}{_did_you_mean(dotted, known)}; the keys are {', '.join(known)}"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    try:
        return str(value).lower() if isinstance(value, bool) else f"{value!r:.60}"
    except (ValueError, RecursionError):  # a JSON policy may bring numbers and depths that Python does not print
        return "something too large to show"


def _allowed(dotted: str, content: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its annotation."""
    field = _fields_at(dotted.split(".")[:-1], content).get(dotted.rpartition(".")[2])
    if field is None:
        return "something else"
    if nested := _nested_model(field):
        return f"a group of keys ({', '.join(nested.model_fields)})"
    annotation = _without_none(field.annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    low = next((m.ge for m in field.metadata if getattr(m, "ge", None) is not None), None)
    high = next((m.le for m in field.metadata if getattr(m, "le", None) is not None), None)
    if annotation in (int, float):
        number = "a whole number" if annotation is int else "a number"
        return number + (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
    if annotation is bool:
        return "true or false"
    if annotation is Codec:
        return "a codec's name and parameters, for example {bits: 4, group_size: 64}"
    if get_origin(annotation) is tuple:
        return "a list of whole numbers, for example [0, -1]"
    if any(getattr(m, "pattern", None) for m in field.metadata):
        return "lower-case letters, digits, dots and dashes"
    return "text"


def _fields_at(keys: Sequence[Any], content: Mapping[str, Any]) -> dict[str, FieldInfo]:
    model: type[BaseModel] = Policy
    if keys and keys[0] in _HALVES:
        return _codec_fields(reduce(lambda codec, key: codec[key], keys, content))
    for key in keys:
        field = model.model_fields.get(str(key))
        nested = _nested_model(field) if field else None
        if nested is None:
            return {}
        model = nested
    return model.model_fields


def _codec_fields(content: Any) -> dict[str, FieldInfo]:
    """The parameters of the codec that a mapping names."""
    cls = class_of(content)
    hints = get_type_hints(cls)
    return {field.name: FieldInfo.from_annotation(hints[field.name]) for field in dataclasses.fields(cls)}


def _nested_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model inside `Model` or `Model | None`."""
    annotation = field.annotation
    candidates = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _without_none(annotation: Any) -> Any:
    """T of `T | None`."""
    others = [choice for choice in get_args(annotation) if choice is not type(None)]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return others[0] if is_union and len(others) == 1 else annotation


def _copy(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in source.items()}
