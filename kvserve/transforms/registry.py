"""Transforms by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvserve.transforms.base import Transform
from kvserve.transforms.permutation import Permutation
from kvserve.transforms.rotation import Rotation
from kvserve.transforms.scale import Scale

_CLASSES: tuple[type[Transform], ...] = (Permutation, Rotation, Scale)
TRANSFORMS: dict[str, type[Transform]] = {str(cls.__dataclass_fields__["name"].default): cls for cls in _CLASSES}


def make_transform(content: Any) -> Transform:
    """The transform of a YAML mapping, or of a bare name.

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    from pydantic import TypeAdapter  # GPU machines run transforms without it

    if isinstance(content, Transform):
        return content
    if isinstance(content, str):
        content = {"name": content}
    if not isinstance(content, Mapping) or content.get("name") not in TRANSFORMS:
        raise ValueError(f"there is no transform {content!r:.60}; the transforms are {', '.join(sorted(TRANSFORMS))}")
    return TypeAdapter(TRANSFORMS[content["name"]]).validate_python(content)


def transform_content(transform: Transform) -> dict[str, Any]:
    """A transform as plain values: `make_transform(transform_content(t)) == t`."""
    values = {field.name: (getattr(transform, field.name), field.default) for field in fields(transform)}
    return {name: value for name, (value, default) in values.items() if name == "name" or value != default}
