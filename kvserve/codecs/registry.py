"""Codecs by the name that YAML files use: those of kvserve, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvserve.brought import Brought
from kvserve.codecs.affine import Affine
from kvserve.codecs.base import MAX_STAGES, Codec
from kvserve.codecs.before_rope import BeforeRope
from kvserve.codecs.low_rank import LowRank
from kvserve.codecs.outliers import Outliers
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.table import Table
from kvserve.codecs.vector import Vector

_CLASSES: tuple[type[Codec], ...] = (Affine, Symmetric, Table, Vector, Outliers, LowRank, BeforeRope)


def name_of(cls: type[Codec]) -> str:
    """The name of a codec."""
    return str(cls.__dataclass_fields__["name"].default)


CODECS: dict[str, type[Codec]] = {name_of(cls): cls for cls in _CLASSES}
BROUGHT = Brought("codec", Codec, name_of)
DEFAULT, ROTATED = "affine", "symmetric"  # what keys and values without a name are, and with `rotate: true`


def codec_class(name: Any) -> type[Codec]:
    """The class of a name.

    Raises:
        ValueError: there is none, or a package's codec does not load; the message lists the names or the package.
    """
    if isinstance(name, str) and (found := BROUGHT.find(name, name in CODECS)):
        return found
    if not isinstance(name, str) or name not in CODECS:
        names = ", ".join(sorted({*CODECS, *BROUGHT.entries}))
        raise ValueError(f"there is no codec {name!r:.60}; the codecs are {names}")
    return CODECS[name]


def make_codec(content: Codec | Mapping[str, Any]) -> Codec:
    """The codec of a YAML mapping: its name ("affine" where there is none), its parameters, and `inner` of a wrapper.

    `rotate: true` and `rotate: false` stand for the names "symmetric" and "affine".

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    from pydantic import TypeAdapter, ValidationError  # GPU machines run codecs without it

    if isinstance(content, Codec):
        return content
    _check_depth(content)
    content = _without_rotate(content)
    cls = codec_class(content["name"])
    if isinstance(content.get("inner"), Mapping):
        try:
            content["inner"] = make_codec(content["inner"])
        except ValidationError as error:
            details = [{**line, "loc": ("inner", *line["loc"])} for line in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(error.title, details) from None  # type: ignore[arg-type]
    return TypeAdapter(cls).validate_python(content)


def class_of(content: Mapping[str, Any]) -> type[Codec]:
    """The class of what `make_codec` makes of a mapping.

    Raises:
        ValueError: unknown name.
    """
    return codec_class(_without_rotate(content)["name"])


def _check_depth(content: Mapping[str, Any]) -> None:
    inner: Any = content
    for _ in range(MAX_STAGES):
        inner = inner.get("inner") if isinstance(inner, Mapping) else None
    if inner is not None:
        raise ValueError(f"codecs nest at most {MAX_STAGES} deep; leave out an inner one")


def _without_rotate(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a name, for which `rotate` may stand."""
    named = {"name": DEFAULT, **content}
    if "rotate" not in named or named["name"] not in (DEFAULT, ROTATED):
        return named
    rotates = named.pop("rotate")
    if not isinstance(rotates, bool):
        raise ValueError(f"value.rotate is {rotates!r:.60}, it must be true or false")
    if rotates and named.pop("group_size", 0):
        raise ValueError("a rotated value has one scale per token: set value.group_size to 0, or rotate to false")
    return {**named, "name": ROTATED if rotates else DEFAULT}


def codec_content(codec: Codec, with_defaults: bool = False) -> dict[str, Any]:
    """A codec as plain values: `make_codec(codec_content(codec)) == codec`.

    Args:
        with_defaults: whether to name what need not be: parameters that have their default, and "affine".
    """
    content = {}
    for field in fields(codec):
        value = getattr(codec, field.name)
        if isinstance(value, Codec):
            content[field.name] = codec_content(value, with_defaults)
        elif with_defaults or value != (DEFAULT if field.name == "name" else field.default):
            content[field.name] = value
    return content
