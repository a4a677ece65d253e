"""The tables that a layer's codecs and transforms read: calibrated ones, and those of the model's rotary embedding.

The calibration in effect stands in vLLM's own configuration, as `additional_config["kvserve"]["calibration"]`: file and
hash. So every process uses the same tables or ends, and vLLM's hash of its configuration knows them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvserve.attention.base import LayerSpec
from kvserve.calibration import store
from kvserve.calibration.artefact import Cache, Calibration
from kvserve.calibration.fits import check_fits
from kvserve.checks import text_config
from kvserve.codecs.before_rope import BeforeRope
from kvserve.engine.rotary import NoRotaryError, rotary_table
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import num_sharing_of
from kvserve.policies.base import Policy
from kvserve.scorers.rotary import RotaryTable

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from kvserve.engine.settings import EngineSettings

SECTION_KEY = "calibration"
ROTARY = "key.before-rope.rotary"


def cache_of(model: ModelConfig) -> Cache:
    """The whole model's cache."""
    num_layers = model.get_total_num_hidden_layers() - num_sharing_of(text_config(model.hf_config.to_dict()))
    return Cache(num_layers, model.get_total_num_kv_heads(), model.get_head_size())


def chosen_calibration(section: dict[str, Any], policy: Policy, model: ModelConfig) -> Calibration | None:
    """The calibration of an engine, checked; None where its policy names none.

    Args:
        section: `additional_config["kvserve"]`; gets the choice where it has none.

    Raises:
        UnsupportedError: it is missing, must not be used, or does not fit the policy.
    """
    if policy.calibration is None:
        return None
    pinned = section.get(SECTION_KEY)
    if pinned is not None and not (isinstance(pinned, Mapping) and {"path", "sha256"} == set(pinned)):
        raise UnsupportedError(
            f'additional_config["kvserve"]["{SECTION_KEY}"] takes "path" and "sha256", got {pinned!r:.80}; leave it out'
        )
    found = find_calibration(policy, model.model, cache_of(model), pinned)
    if pinned is None:
        section[SECTION_KEY] = pin_of(found)
    return found


def find_calibration(
    policy: Policy, model: str, cache: Cache, pinned: Mapping[str, str] | None = None
) -> Calibration:  # fmt: skip
    """The calibration that a policy names, for a model.

    Raises:
        UnsupportedError: as `chosen_calibration`.
    """
    assert policy.calibration is not None
    try:
        store.check_name(policy.calibration)
        if pinned is None:
            found = store.load(policy.calibration, model, cache)
        else:
            found = store.load(pinned["path"], model, cache, pinned["sha256"], named=policy.calibration)
        check_fits(policy, found.origin.method, cache.head_dim)
    except UnsupportedError:
        raise
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return found


def pin_of(calibration: Calibration) -> dict[str, str]:
    """What the configuration has of a calibration."""
    return {"path": str(calibration.path.absolute()), "sha256": calibration.sha256}


def tables_of_layer(
    settings: EngineSettings, config: VllmConfig, layer: int, spec: LayerSpec, head_dim: int
) -> dict[str, torch.Tensor]:
    """All tables of a layer by "half.codec.table", those of this rank's KV heads, on the device of its cells.

    Args:
        layer: index in the model.

    Raises:
        UnsupportedError: codecs turn keys back, and the model's embedding is another one, or none that they can use.
    """
    tables: dict[str, torch.Tensor] = {}
    if settings.calibration is not None:
        tables |= settings.calibration.layer_tables(layer, spec.first_head, spec.num_kv_heads)
    stages = [stage for _, codec in settings.policy.codecs for stage in codec.chain()]
    codecs = [stage for stage in stages if isinstance(stage, BeforeRope)]
    if codecs:
        table = _embedding(config.model_config)
        for codec in codecs:
            check_embedding(codec, table, head_dim)
        tables[ROTARY] = table.angles
    return {name: table.to(config.device_config.device) for name, table in tables.items()}


def check_embedding(codec: BeforeRope, table: RotaryTable, head_dim: int) -> None:
    """Refuse a codec that would turn other channels back than the model has turned.

    Raises:
        UnsupportedError: naming the parameters that are right.
    """
    own = (2 * table.angles.shape[1], table.interleaved)
    if (codec.rotary_dim or head_dim, codec.interleaved) != own:
        right = f"--policy-set key.rotary_dim={own[0]} --policy-set key.interleaved={str(own[1]).lower()}"
        raise UnsupportedError(
            f"the rotary embedding of this model turns {own[0]} of {head_dim} channels, "
            f"{'neighbours' if own[1] else 'halves'} together, and {codec.name} says otherwise; add {right}"
        )


_shared: list[tuple[weakref.ref[Any], RotaryTable]] = []


def _embedding(model: ModelConfig) -> RotaryTable:
    """The one table of a worker's model, which all its layers share."""
    for known, table in _shared:
        if known() is model:
            return table
    try:
        table = rotary_table(model, model.max_model_len)
    except NoRotaryError as error:
        raise UnsupportedError(
            "before-rope needs one rotary embedding for all layers, whose angles are a multiple of the position; "
            f"{error.reason}; choose another policy, for example kivi-2bit"
        ) from None
    _shared[:] = [(weakref.ref(model), table)]
    return table
