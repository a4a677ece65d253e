"""The transforms of a policy: what keys and values go through in front of the cache."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationInfo

from kvserve.codecs.tile import Half
from kvserve.transforms.base import Transform
from kvserve.transforms.layer import Transforms
from kvserve.transforms.registry import make_transform, transform_content


def _transforms_of(content: Any, info: ValidationInfo) -> tuple[Transform, ...]:
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"transforms.{info.field_name} is {content!r:.60}, it must be a list of transforms, for example [rotation]"
        )
    return tuple(make_transform(one) for one in content)


def _content_of(transforms: tuple[Transform, ...]) -> list[dict[str, Any]]:
    return [transform_content(transform) for transform in transforms]


_List = Annotated[tuple[Transform, ...], PlainValidator(_transforms_of), PlainSerializer(_content_of)]


class PolicyTransforms(BaseModel):
    """Keys and values each go through a list of transforms, the first one first; queries and answers are undone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: _List = ()
    value: _List = ()

    @property
    def of_layer(self) -> Transforms:
        """As layers take them."""
        return Transforms(self.key, self.value)

    def of(self, half: Half) -> tuple[Transform, ...]:
        """Those of one half."""
        return self.of_layer.of(half)

    def describe(self) -> str:
        """In one line of the startup table."""
        halves = ((name, self.of(half)) for name, half in (("K", Half.KEY), ("V", Half.VALUE)))
        return "; ".join(f"{name} {', '.join(one.describe() for one in chosen)}" for name, chosen in halves if chosen)
