"""Calibration methods by name, and the recipes that have a name of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from kvserve.calibration.methods.base import AnyMethod
from kvserve.calibration.methods.cq import Cq
from kvserve.calibration.methods.kvquant import Kvquant
from kvserve.calibration.methods.razor import Razor
from kvserve.calibration.methods.skvq import Skvq
from kvserve.errors import UnsupportedError
from kvserve.part_registry import PartRegistry
from kvserve.policies.yaml_text import parse

METHODS: PartRegistry[AnyMethod] = PartRegistry("calibration", AnyMethod, (Kvquant, Cq, Skvq, Razor))
# What `kvserve calibrate --method` and a policy's `calibration` take.
RECIPES: dict[str, AnyMethod] = {
    **{f"kvquant-{bits}bit": Kvquant(bits=bits) for bits in (2, 3, 4)},
    **{f"cq-{couple}c8b": Cq(couple=couple) for couple in (2, 4, 8)},
    "skvq-2bit": Skvq(),
    "razor": Razor(),
}


def make_method(recipe: str, changes: Sequence[str] = ()) -> AnyMethod:
    """The method of a recipe with `KEY=VALUE` changes.

    Raises:
        UnsupportedError: unknown recipe, parameter or value.
    """
    if recipe not in RECIPES:
        raise UnsupportedError(f"there is no calibration {recipe!r:.60}; the calibrations are {', '.join(RECIPES)}")
    content = RECIPES[recipe].model_dump()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in content or key == "name":
            keys = ", ".join(name for name in content if name != "name")
            raise UnsupportedError(f"--set takes KEY=VALUE, got {change!r:.60}; the keys of {recipe} are {keys}")
        content[key] = _value(text)
    return method_of(content)


def method_of(content: Mapping[str, Any]) -> AnyMethod:
    """The method of its parameters and name.

    Raises:
        UnsupportedError: they are none of a method's.
    """
    try:
        return METHODS.make(content)
    except ValidationError as error:
        first = error.errors()[0]
        place, reason = ".".join(str(part) for part in first["loc"]), first["msg"][:1].lower() + first["msg"][1:]
        raise UnsupportedError(f"{place} is {first['input']!r:.60}: {reason}") from None
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def _value(text: str) -> Any:
    try:
        return parse(text)
    except yaml.YAMLError:
        return text
