"""Codecs by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvserve.codecs.affine import Affine
from kvserve.codecs.base import Codec
from kvserve.codecs.before_rope import BeforeRope
from kvserve.codecs.low_rank import LowRank
from kvserve.codecs.outliers import Outliers
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.table import Table
from kvserve.codecs.vector import Vector

_CLASSES: tuple[type[Codec], ...] = (Affine, Symmetric, Table, Vector, Outliers, LowRank, BeforeRope)
CODECS: dict[str, type[Codec]] = {str(cls.__dataclass_fields__["name"].default): cls for cls in _CLASSES}
DEFAULT = "affine"  # what keys and values without a name are


def codec_class(name: Any) -> type[Codec]:
    """The class of a name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"there is no codec {name!r:.60}; the codecs are {', '.join(sorted(CODECS))}")
    return CODECS[name]


def make_codec(content: Any) -> Codec:
    """The codec of a YAML mapping: its name ("affine" where there is none), its parameters, and `inner` of a wrapper.

    `rotate: true` and `rotate: false` without a name stand for "symmetric" and "affine".

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    from pydantic import TypeAdapter  # GPU machines run codecs without it

    if isinstance(content, Codec):
        return content
    if isinstance(content, str):
        content = {"name": content}
    if not isinstance(content, Mapping):
        raise ValueError(f"{content!r:.60} is no codec; give a mapping with its name and parameters")
    content = _without_rotate(content)
    cls = codec_class(content["name"])
    if isinstance(content.get("inner"), str | Mapping):
        content = {**content, "inner": make_codec(content["inner"])}
    return TypeAdapter(cls).validate_python(content)


def _without_rotate(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a name, which `rotate` may stand for."""
    content = dict(content)
    rotates = content.get("rotate")
    if "name" not in content and isinstance(rotates, bool):
        del content["rotate"]
        if rotates and content.pop("group_size", 0):
            raise ValueError("a rotated value has one scale per token: set value.group_size to 0, or rotate to false")
        content["name"] = Symmetric.__dataclass_fields__["name"].default if rotates else DEFAULT
    return {"name": DEFAULT} | content


def codec_content(codec: Codec) -> dict[str, Any]:
    """A codec as plain values: `make_codec(codec_content(codec)) == codec`. Defaults are left out, and "affine"."""
    content = {}
    for field in fields(codec):
        value = getattr(codec, field.name)
        if isinstance(value, Codec):
            content[field.name] = codec_content(value)
        elif value != field.default or (field.name == "name" and value != DEFAULT):
            content[field.name] = value
    return content
