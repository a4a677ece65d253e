"""Parts that other packages bring, by entry points of the group `kvserve.<kind>s` (for example kvserve.scorers).

An entry point has the part's name and leads to its class. It is imported when a policy asks for it, never before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points


class Brought:
    """The parts of one kind.

    Args:
        kind: what one of them is called in messages, for example "scorer".
        base: what every one of them is derived from.
        name_of: the name that a class has in YAML files.
    """

    def __init__(self, kind: str, base: type, name_of: Callable[[type], str]) -> None:
        self.kind, self.base, self.name_of = kind, base, name_of

    @cached_property
    def entries(self) -> dict[str, list[EntryPoint]]:
        """By name; nothing of them is imported."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=f"kvserve.{self.kind}s"):
            found.setdefault(entry.name, []).append(entry)
        return found

    def find(self, name: str, is_own: bool) -> type | None:
        """The class that a package brings under a name; None: no package does.

        Args:
            is_own: whether kvserve has a part of this name.

        Raises:
            ValueError: more than one has the name, or the part does not load; the message names the package.
        """
        entries = self.entries.get(name, [])
        if len(entries) + is_own > 1:
            owners = ", ".join(["kvserve"] * is_own + [_package(entry) for entry in entries])
            raise ValueError(f"{self.kind} {name!r} is brought by more than one package ({owners}); remove one of them")
        return self._load(entries[0]) if entries else None

    def _load(self, entry: EntryPoint) -> type:
        whose = f"{self.kind} {entry.name!r} of the package {_package(entry)}"
        try:
            cls: type = entry.load()
        except Exception as error:
            raise ValueError(f"{whose} does not load ({type(error).__name__}: {error}); update or remove it") from None
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{whose} is no {self.base.__name__} ({entry.value}); update or remove the package")
        if self.name_of(cls) != entry.name:
            raise ValueError(f"{whose} calls itself {self.name_of(cls)!r}; update or remove the package")
        return cls


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
