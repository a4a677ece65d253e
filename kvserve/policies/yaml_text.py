"""YAML of a policy: plain values of bounded size, so that no text can stop or exhaust the loader."""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 16
MAX_NODES = 4096  # keys and values, with what aliases repeat
_LARGEST = 2**63


def parse(text: str) -> Any:
    """The only document of `text`: mappings with scalar keys, lists, text, finite numbers of 64 bits, booleans, None.

    Raises:
        yaml.YAMLError: anything else; marked with the line wherever YAML knows it.
    """
    return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader


def problem_of(error: yaml.YAMLError) -> str:
    """What `parse` raised, to be put behind the name of a file: ", line 3: not valid YAML (...)"."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": not valid YAML ({error})"
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    return f", line {line}: not valid YAML ({error.problem})"


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses what a policy cannot mean: tags, a key written twice, values of any size."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (of the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of finished nodes, by id; the composer keeps them alive

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise _error(f"the tag {event.tag} is not allowed", event.start_mark)
        if self._depth == MAX_DEPTH:
            raise _error(f"values are nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"the alias {event.anchor} contains itself", event.start_mark)
            return node
        size = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if size > MAX_NODES:
            raise _error(f"more than {MAX_NODES} values", event.start_mark)
        self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """YAML would silently keep the last of two equal keys."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error("a key must be a word or a number", key_node.start_mark)
            is_merge = key_node.tag.endswith(":merge")
            keys = {key_node.value} if is_merge else {key_node.value, self.construct_object(key_node)}
            if keys & seen:
                raise _error(f"duplicate key {key_node.value!r:.60}", key_node.start_mark)
            seen |= keys
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            number = int(super().construct_yaml_int(node))
        except ValueError:  # more digits than Python converts, or 0x_
            raise _error("not a number, or too long for one", node.start_mark) from None
        if abs(number) >= _LARGEST:
            raise _error("a whole number is too large", node.start_mark)
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        try:
            return float(super().construct_yaml_float(node))
        except (ValueError, OverflowError):
            raise _error("not a number, or too long for one", node.start_mark) from None


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
