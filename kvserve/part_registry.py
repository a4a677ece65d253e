"""Parts of one kind, by the name that YAML files use: those of kvserve, and those that other packages bring.

A package brings a part by an entry point of the group `kvserve.<kind>s` (for example kvserve.scorers) that has the
part's name and leads to its class. It is imported when a policy asks for it, never before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import BaseModel

Part = TypeVar("Part", bound=BaseModel)


class PartRegistry(dict[str, type[Part]]):
    """kvserve's own classes by the default of their field `name`.

    Args:
        kind: what one of them is called in messages, for example "scorer".
        base: what every one of them is derived from.
    """

    def __init__(self, kind: str, base: type[BaseModel], classes: Iterable[type[Part]]) -> None:
        super().__init__({name_of(cls): cls for cls in classes})
        self.kind, self.base = kind, base

    @cached_property
    def brought(self) -> dict[str, list[EntryPoint]]:
        """What other packages bring, by name; nothing of it is imported."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=f"kvserve.{self.kind}s"):
            found.setdefault(entry.name, []).append(entry)
        return found

    def class_of(self, name: str) -> type[Part]:
        """The class of a name.

        Raises:
            ValueError: there is none, or a package's part does not load; the message lists the names or the package.
        """
        entries = self.brought.get(name, [])
        if len(entries) + (name in self) > 1:
            owners = ", ".join(["kvserve"] * (name in self) + [_package(entry) for entry in entries])
            raise ValueError(f"{self.kind} {name!r} is brought by more than one package ({owners}); remove one of them")
        if entries:
            return self._load(entries[0])
        if name not in self:
            names = ", ".join(sorted({*self, *self.brought}))
            raise ValueError(f"there is no {self.kind} {name!r}; the {self.kind}s are {names}")
        return self[name]

    def make(self, content: Mapping[str, Any]) -> Part:
        """The part of a YAML mapping: its name and those parameters that differ from the defaults.

        Raises:
            ValueError: unknown name (or none), unknown parameter or a value out of range.
        """
        return self.class_of(str(content.get("name"))).model_validate(content)

    def _load(self, entry: EntryPoint) -> type[Part]:
        whose = f"{self.kind} {entry.name!r} of the package {_package(entry)}"
        try:
            cls: type[Part] = entry.load()
        except Exception as error:
            raise ValueError(f"{whose} does not load ({type(error).__name__}: {error}); update or remove it") from None
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{whose} is no {self.base.__name__} ({entry.value}); update or remove the package")
        if name_of(cls) != entry.name:
            raise ValueError(f"{whose} calls itself {name_of(cls)!r}; update or remove the package")
        return cls


def name_of(cls: type[BaseModel]) -> str:
    """The name of a part."""
    return str(cls.model_fields["name"].default)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
