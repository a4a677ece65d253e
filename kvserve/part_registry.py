"""Parts of one kind, by the name that YAML files use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

Part = TypeVar("Part", bound=BaseModel)


class PartRegistry(dict[str, type[Part]]):
    """Classes by the default of their field `name`.

    Args:
        kind: what one of them is called in messages, for example "scorer".
    """

    def __init__(self, kind: str, classes: Iterable[type[Part]]) -> None:
        super().__init__({cls.model_fields["name"].default: cls for cls in classes})
        self.kind = kind

    def class_of(self, name: str) -> type[Part]:
        """The class of a name.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        if name not in self:
            raise ValueError(f"there is no {self.kind} {name!r}; the {self.kind}s are {', '.join(sorted(self))}")
        return self[name]

    def make(self, content: Mapping[str, Any]) -> Part:
        """The part of a YAML mapping: its name and those parameters that differ from the defaults.

        Raises:
            ValueError: unknown name (or none), unknown parameter or a value out of range.
        """
        return self.class_of(str(content.get("name"))).model_validate(content)
