"""What a policy is: the validated content of one YAML file in configs/.

A policy names parts and their parameters. It owns no allocation, no kernel and no vLLM import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from kvserve.codecs.base import Codec
from kvserve.codecs.field import HalfCodec
from kvserve.codecs.layer_tables import POSITIONS
from kvserve.codecs.lazy import torch
from kvserve.codecs.tile import Half, TableSpec, TileShape
from kvserve.pages.head_dims import COMPRESSED_HEAD_DIMS
from kvserve.policies.transforms import PolicyTransforms

MAX_RATE = 1024
LONGEST = 2**31 - 1  # tokens of a sequence; vLLM counts positions in 32 bits


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerCodec(_Part):
    """How the layer `index` (negative: from the end) writes its pages; without key and value they stay dense."""

    index: Annotated[int, Field(strict=True)]
    key: HalfCodec = None
    value: HalfCodec = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> LayerCodec:
        if (self.key is None) != (self.value is None):
            raise ValueError(f"layers.{self.index}: give both key and value, or `dense`")
        return self


class Eviction(_Part):
    """Which tokens stay, how many, what becomes of the others, and when.

    A scorer, a budget, a retention and a schedule, each by its name and parameters.

    `rate` keeps one of `rate` tokens, `max_tokens` that many, per KV head on average; give one of the two. The first
    `sink_tokens` of the policy and the tokens of the unfinished tile always stay. Without a `schedule`, a rate is for
    the prompt (end-of-prefill), and a maximum holds while tokens are generated too (over-budget).

    The attention layers `spare_layers` (indices, negative ones from the end) keep all their tokens. The budget divides
    what they leave among the other layers, so that the limit still holds on average over all layers.
    """

    scorer: Any
    budget: Any
    retention: Annotated[Any, Field(validate_default=True)] = "evict"
    rate: Annotated[float | None, Field(ge=1, le=MAX_RATE)] = None
    max_tokens: Annotated[int | None, Field(ge=64, le=LONGEST)] = None
    spare_layers: tuple[Annotated[int, Field(strict=True)], ...] = ()
    schedule: Annotated[Any, Field(validate_default=True)] = None

    @field_validator("scorer", "budget", "retention", "schedule", mode="before")
    @classmethod
    def _make_part(cls, content: Any, info: ValidationInfo) -> Any:
        # Imported here: the parts need torch, which a policy without eviction does not.
        from kvserve.policies.parts import make_part

        if info.field_name == "schedule" and content is None:
            content = "over-budget" if info.data.get("max_tokens") else "end-of-prefill"
        return make_part(str(info.field_name), content)

    @field_serializer("scorer", "budget", "retention", "schedule")
    def _part_content(self, part: Any) -> dict[str, Any]:
        return {"name": part.name} | part.model_dump(mode="json", exclude_defaults=True)

    def spared_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers that keep all their tokens, ascending.

        Raises:
            ValueError: the model has no such layer, or no other layers.
        """
        spared = tuple(sorted({layer_of(index, num_layers, "eviction.spare_layers") for index in self.spare_layers}))
        if len(spared) == num_layers:
            raise ValueError(
                f"eviction.spare_layers names all {num_layers} layers, so nothing could be evicted; leave some out, or "
                "use a policy that does not evict"
            )
        return spared

    @property
    def window(self) -> int:
        """Last prompt tokens whose queries the scorer needs; at least one is computed by the step that evicts."""
        return getattr(self.scorer, "window", 1)

    @property
    def remembers_queries(self) -> bool:
        """Whether a request must remember queries of earlier steps: a window may begin before the cut before."""
        return self.window > 1 and self.schedule.repeats

    @property
    def protected_recent(self) -> int:
        """Last prompt tokens that the scorer keeps in any case."""
        return self.window if getattr(self.scorer, "keep_window", False) else 0

    @property
    def formats(self) -> tuple[tuple[Codec, Codec], ...]:
        """Codecs of kept tokens beside the policy's own; where there are some, a cut keeps every token."""
        formats: tuple[tuple[Codec, Codec], ...] = self.retention.formats
        return formats

    @model_validator(mode="after")
    def _formats_fit(self) -> Eviction:
        """Blocks are counted from lengths alone: every head must divide its tokens alike, and once."""
        if not self.formats:
            return self
        name = self.retention.name
        if not self.budget.even:
            raise ValueError(f"the retention {name} keeps as many tokens of every head in full; use budget: uniform")
        if self.schedule.repeats:
            raise ValueError(
                f"the retention {name} divides the tokens of a request once; use schedule: end-of-prefill, without "
                "chunk_tokens"
            )
        if self.spare_layers:
            raise ValueError(f"the retention {name} keeps all tokens of all layers; leave out spare_layers")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Eviction:
        if (self.rate is None) == (self.max_tokens is None):
            raise ValueError("give eviction.rate or eviction.max_tokens, one of the two")
        if self.schedule.needs_max_tokens and self.max_tokens is None:
            raise ValueError(
                f"the schedule {self.schedule.name} needs eviction.max_tokens (--max-cache-tokens); "
                "with a rate, use every-n"
            )
        return self


class Policy(_Part):
    """One named way to keep the KV cache.

    `tile_tokens` tokens are sealed together in a page; until a tile is full its tokens stay dense in the request's own
    tail. The first `sink_tokens` tokens stay dense for good. `key` and `value` say how a page is written. Without them
    every token keeps the model's dtype: in pages with `dense_pages`, so that tokens can be evicted, or else in vLLM's
    own blocks (the dense policy). `layers` gives some layers another codec: in YAML a mapping from the layer's index
    to a policy's name, to `dense`, or to key and value.

    `transforms` maps keys and values of every layer in front of the cache. `calibration` names the tables that codecs
    and transforms read: a recipe of `kvserve calibrate`, whose file is found by the model's weights, or a file.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    summary: str
    paper: str = ""
    tile_tokens: Literal[64, 128] = 64
    sink_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    key: HalfCodec = None
    value: HalfCodec = None
    dense_pages: bool = False
    layers: tuple[LayerCodec, ...] = ()
    transforms: PolicyTransforms = PolicyTransforms()
    calibration: Annotated[str | None, Field(min_length=1)] = None
    eviction: Eviction | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_by_index(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or not all(isinstance(codec, Mapping) for codec in content.values()):
            return content
        return [{"index": _layer_index(index), **codec} for index, codec in content.items()]

    @field_serializer("layers")
    def _layers_content(self, layers: tuple[LayerCodec, ...]) -> dict[str, Any]:
        return {
            str(layer.index): layer.model_dump(mode="json", exclude={"index"}, exclude_defaults=True)
            for layer in layers
        }

    @model_validator(mode="after")
    def _transforms_fit(self) -> Policy:
        if self.transforms.key and self.turns_queries and self.eviction:
            raise ValueError(
                f"{self.eviction.scorer.name} turns queries back, which transformed ones do not allow; leave out "
                "transforms.key, or choose another scorer"
            )
        for half, codec in self.codecs:
            if half is Half.KEY and self.transforms.key and codec.needs_positions:
                raise ValueError(
                    f"{codec.name} turns keys back, which transformed ones do not allow; leave out transforms.key, or "
                    "choose another codec"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Policy:
        if (self.key is None) != (self.value is None):
            raise ValueError("give both key and value, or neither (every token then keeps the model's dtype)")
        if self.layers and self.eviction:
            self._check_evicting_layers(self.eviction)
        if not self.has_pages:
            if self.layers:
                raise ValueError("layers needs pages: use codec: dense, or one that compresses, for example int8")
            if self.eviction:
                raise ValueError("eviction needs pages: use codec: dense, or one that compresses, for example int8")
            if self.sink_tokens:
                raise ValueError("sink_tokens needs pages: set dense_pages, or key and value")
            return self
        if self.key and self.dense_pages:
            raise ValueError("dense_pages keeps keys and values as they are: leave out key and value, or dense_pages")
        if self.has_mass and not self.key:
            assert self.eviction is not None
            raise ValueError(
                f"the retention {self.eviction.retention.name} stores a weight beside each token, and dense pages have "
                "no room for it; use a codec that compresses, for example codec: int8"
            )
        for half, codec in self.codecs:
            self._check_codec(half, codec)
        if self.eviction:
            self._check_formats(self.eviction)
        if self.sink_tokens >= self.tile_tokens:
            raise ValueError(f"sink_tokens must be less than tile_tokens ({self.tile_tokens})")
        return self

    def _check_codec(self, half: Half, codec: Codec) -> None:
        """Refuse what no model's head fits, or what an eviction makes unreadable."""
        codec.check(TileShape(half, self.tile_tokens, COMPRESSED_HEAD_DIMS[-1]))
        if codec.needs_positions and self.eviction:
            raise ValueError(
                f"a {half} of {codec.name} is read with its position, which the pages that an eviction leaves do not "
                "keep; leave out eviction, or choose another codec"
            )

    def _check_evicting_layers(self, eviction: Eviction) -> None:
        """Refuse what layers with codecs of their own cannot have.

        Their pages hold different numbers of tokens: blocks are counted for heads that all keep as many, once.
        """
        wrong = {
            "budget: uniform": not eviction.budget.even,
            "retention: evict": bool(eviction.formats or eviction.retention.has_mass),
            "schedule: end-of-prefill, without chunk_tokens": eviction.schedule.repeats,
            "no spare_layers": bool(eviction.spare_layers),
        }
        if needed := [words for words, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(f"layers with their own codecs are evicted with {', and '.join(needed)}")

    def _check_formats(self, eviction: Eviction) -> None:
        """Refuse formats of kept tokens beside the policy's own that it cannot have."""
        formats, name = eviction.retention.formats, eviction.retention.name
        if not formats:
            return
        if len(formats) > 1:
            raise ValueError(f"{name} has {len(formats)} formats, and blocks are counted for one; leave out the others")
        if self.key is None or self.value is None:
            raise ValueError(f"dense pages have one format, {name} needs another; use codec: int8")
        for key, value in formats:
            if value.rotates != self.value.rotates:
                raise ValueError(f"the values of {name} and of the policy differ in `rotate`; rotate both, or neither")
            for half, codec in ((Half.KEY, key), (Half.VALUE, value)):
                if codec.tables(TileShape(half, self.tile_tokens, COMPRESSED_HEAD_DIMS[-1])):
                    raise ValueError(f"the {half} of {name} reads tables ({codec.name}); choose a codec without them")

    @property
    def is_dense(self) -> bool:
        """Whether every token keeps the model's dtype."""
        return self.key is None and all(layer.key is None for layer in self.layers)

    @property
    def has_pages(self) -> bool:
        """Whether tiles are sealed in pages, coded or dense."""
        return self.dense_pages or self.key is not None

    @property
    def has_mass(self) -> bool:
        """Whether kept tokens may stand for several, so that pages hold a log-mass for each."""
        return self.eviction is not None and self.eviction.retention.has_mass

    @property
    def codecs(self) -> list[tuple[Half, Codec]]:
        """What its pages are written with, of single layers and of demoted tokens too."""
        pairs = [(Half.KEY, self.key), (Half.VALUE, self.value)]
        for layer in self.layers:
            pairs += [(Half.KEY, layer.key), (Half.VALUE, layer.value)]
        for key, value in self.eviction.formats if self.eviction else ():
            pairs += [(Half.KEY, key), (Half.VALUE, value)]
        return [(half, codec) for half, codec in pairs if codec is not None]

    def calibrated_tables(self, head_dim: int) -> dict[str, TableSpec]:
        """The tables that calibrations must have, by "half.codec.table", "half.transform.table" or "heads.table"."""
        found: dict[str, TableSpec] = {}
        for half, codec in self.codecs:
            tables = codec.tables(TileShape(half, self.tile_tokens, head_dim))
            found |= {f"{half}.{name}": spec for name, spec in tables.items() if POSITIONS not in spec.axes}
        for half in Half:
            for transform in self.transforms.of(half):
                found |= {f"{half}.{name}": spec for name, spec in transform.tables(head_dim).items()}
        return found | (self.eviction.budget.tables() if self.eviction else {})

    def with_head_tables(self, tables: Mapping[str, torch.Tensor]) -> Policy:
        """The policy with its budget as a calibration says (`Budget.calibrated`)."""
        if self.eviction is None or not self.eviction.budget.tables():
            return self
        budget = self.eviction.budget.calibrated(tables)
        return self.model_copy(update={"eviction": self.eviction.model_copy(update={"budget": budget})})

    @property
    def reads_tables(self) -> bool:
        """Whether a layer reads tables, calibrated ones or those of the rotary embedding."""
        return bool(self.calibration) or any(codec.needs_positions for _, codec in self.codecs)

    @property
    def code_bits(self) -> float:
        """The fewest bits of the codes that a key or a value is written with; only where it is."""
        assert self.key is not None and self.value is not None
        pairs = [(self.key, self.value), *(self.eviction.formats if self.eviction else ())]
        shapes = [TileShape(half, self.tile_tokens, COMPRESSED_HEAD_DIMS[0]) for half in Half]
        return min(codec.code_bits(shape) for pair in pairs for codec, shape in zip(pair, shapes, strict=True))

    @property
    def names_layers(self) -> bool:
        """Whether layers are treated differently, by their number, or blocks are counted by how many there are."""
        eviction = self.eviction
        return bool(
            self.layers or (eviction and (eviction.spare_layers or eviction.budget.names_heads or eviction.formats))
        )

    @property
    def turns_queries(self) -> bool:
        """Whether the scorer takes the rotary embedding back."""
        return self.eviction is not None and "query_statistics" in self.eviction.scorer.needs

    def of_layers(self, num_layers: int) -> list[Policy]:
        """The policy of each layer, which has no `layers`.

        Raises:
            ValueError: the model has no such layer, or one is named twice.
        """
        own = self.model_copy(update={"layers": ()})
        policies, named = [own] * num_layers, set()
        for layer in self.layers:
            index = layer_of(layer.index, num_layers, "layers")
            if index in named:
                raise ValueError(f"layers names layer {index} of {num_layers} twice; leave one out")
            named.add(index)
            codec = {"key": layer.key, "value": layer.value, "dense_pages": layer.key is None}
            policies[index] = own.model_copy(update=codec)
        return policies


def layer_of(index: int, num_layers: int, field: str) -> int:
    """The layer that an index, from the end if negative, names.

    Raises:
        ValueError: there is no such layer; the message names `field`.
    """
    if not -num_layers <= index < num_layers:
        raise ValueError(
            f"{field} names layer {index}, the model has the layers 0 to {num_layers - 1} "
            f"(-{num_layers} to -1 from the end)"
        )
    return index % num_layers


def _layer_index(index: Any) -> Any:
    """JSON has no whole numbers as keys."""
    try:
        return int(index) if isinstance(index, str) else index
    except ValueError:
        return index
