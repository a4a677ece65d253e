"""Whether a calibration has what a policy's codecs and transforms read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvserve.calibration.methods.base import AnyMethod, Method
from kvserve.codecs.affine import Affine
from kvserve.codecs.layer_tables import POSITIONS
from kvserve.codecs.tile import Half, TileShape
from kvserve.transforms.permutation import Permutation

if TYPE_CHECKING:
    from kvserve.policies.base import Policy


def check_fits(policy: Policy, method: AnyMethod, head_dim: int) -> None:
    """Refuse a calibration that a policy cannot use, or would use for other rows than those it was fitted to.

    Raises:
        ValueError: naming what differs and the fix.
    """
    made = {table.full_name: table for table in method.tables(head_dim)}
    for name, spec in policy.calibrated_tables(head_dim).items():
        table = made.get(name)
        if table is None or (table.axes, table.dtype) != (spec.axes, spec.dtype):
            found = "none" if table is None else f"one of {list(table.axes)}"
            raise ValueError(
                f"policy {policy.name} reads a table {name} {list(spec.axes)}, its calibration ({method.name}) has "
                f"{found}; name another calibration, or change the parameters of the codec"
            )
    if isinstance(method, Method):
        _check_keys(policy, method, head_dim)
    _check_outliers(policy, method)
    _check_clips(policy, method)


def _check_keys(policy: Policy, method: Method, head_dim: int) -> None:
    """Keys before or after the rotary embedding, as the tables were fitted to."""
    for half, codec in policy.codecs:
        tables = codec.tables(TileShape(half, policy.tile_tokens, head_dim))
        reads = any(POSITIONS not in spec.axes for spec in tables.values())
        keys = "before-rope" if codec.needs_positions else "after-rope"
        if half is Half.KEY and reads and keys != method.keys:
            raise ValueError(
                f"policy {policy.name} writes keys {keys.replace('-', ' ')} and its calibration was fitted to keys "
                f"{method.keys.replace('-', ' ')}; calibrate with --set keys={keys} --out FILE, and name the file"
            )
    if policy.transforms.key and method.keys == "before-rope" and _reads(policy, Half.KEY, head_dim):
        raise ValueError(
            f"policy {policy.name} transforms keys after the rotary embedding and its calibration was fitted before "
            "it; calibrate with --set keys=after-rope --out FILE, and name the file"
        )


def _reads(policy: Policy, half: Half, head_dim: int) -> bool:
    return any(name.startswith(f"{half}.") for name in policy.calibrated_tables(head_dim))


def _check_outliers(policy: Policy, method: AnyMethod) -> None:
    """Ranges that leave outliers out need a codec that stores them."""
    share = getattr(method, "outliers", 0)
    for half, codec in policy.codecs:
        names = [stage.name for stage in codec.chain()]
        if share and "table" in names and "outliers" not in names:
            raise ValueError(
                f"policy {policy.name} has a calibration that leaves {share:.1%} of the elements to a codec outliers, "
                f"and its {half} has none: put it around the table, or calibrate with --set outliers=0 --out FILE"
            )


def _check_clips(policy: Policy, method: AnyMethod) -> None:
    """Ranges are clipped by what loses least at some bits, of channels in a calibrated order."""
    for half, codec in policy.codecs:
        clipped = [stage for stage in codec.chain() if isinstance(stage, Affine) and stage.clip]
        for stage in clipped:
            bits = getattr(method, "bits", stage.bits)
            if bits != stage.bits:
                raise ValueError(
                    f"policy {policy.name} has {stage.bits}-bit {half}s and clips that were fitted to {bits} bits; "
                    f"calibrate with --set bits={stage.bits} --out FILE, and name the file"
                )
            if not any(isinstance(one, Permutation) for one in policy.transforms.of(half)):
                raise ValueError(
                    f"policy {policy.name} clips {half}s as fitted to reordered channels; add permutation to "
                    f"transforms.{half}, or leave out {half}.clip"
                )
