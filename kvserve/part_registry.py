"""Parts of one kind, by the name that YAML files use: those of kvserve, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from kvserve.brought import Brought

Part = TypeVar("Part", bound=BaseModel)


class PartRegistry(dict[str, type[Part]]):
    """kvserve's own classes by the default of their field `name`.

    Args:
        kind: what one of them is called in messages, for example "scorer".
        base: what every one of them is derived from.
    """

    def __init__(self, kind: str, base: type[BaseModel], classes: Iterable[type[Part]]) -> None:
        super().__init__({name_of(cls): cls for cls in classes})
        self.kind, self.brought = kind, Brought(kind, base, name_of)

    def class_of(self, name: str) -> type[Part]:
        """The class of a name.

        Raises:
            ValueError: there is none, or a package's part does not load; the message lists the names or the package.
        """
        if found := self.brought.find(name, name in self):
            return cast(type[Part], found)
        if name not in self:
            names = ", ".join(sorted({*self, *self.brought.entries}))
            raise ValueError(f"there is no {self.kind} {name!r}; the {self.kind}s are {names}")
        return self[name]

    def make(self, content: Mapping[str, Any]) -> Part:
        """The part of a YAML mapping: its name and those parameters that differ from the defaults.

        Raises:
            ValueError: unknown name (or none), unknown parameter or a value out of range.
        """
        return self.class_of(str(content.get("name"))).model_validate(content)


def name_of(cls: type[BaseModel]) -> str:
    """The name of a part."""
    return str(cls.model_fields["name"].default)
