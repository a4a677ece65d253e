"""Codecs as fields of pydantic models: read from their names and parameters, written as them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, SerializationInfo, ValidationInfo

from kvserve.codecs.base import Codec
from kvserve.codecs.registry import codec_content, make_codec


def _codec_of(content: Any, info: ValidationInfo) -> Codec | None:
    if content is not None and not isinstance(content, (Codec, Mapping)):
        raise ValueError(
            f"{info.field_name} is {content!r:.60}, it must be a codec's name and parameters, for example "
            "{name: affine, bits: 4, group_size: 64}"
        )
    return None if content is None else make_codec(content)


def _given_codec(content: Any, info: ValidationInfo) -> Codec:
    codec = _codec_of(content, info)
    if codec is None:
        raise ValueError(f"give {info.field_name}, a codec's name and parameters")
    return codec


def _content_of(codec: Codec | None, info: SerializationInfo) -> dict[str, Any] | None:
    return None if codec is None else codec_content(codec, with_defaults=not info.exclude_defaults)


# How a half of a tile is written (kvserve/codecs), made from its name and parameters.
HalfCodec = Annotated[Codec | None, PlainValidator(_codec_of), PlainSerializer(_content_of)]
GivenCodec = Annotated[Codec, PlainValidator(_given_codec), PlainSerializer(_content_of)]
