"""What a calibrated table must be before anything reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvserve.calibration.methods.base import Rule, Table


class TableError(ValueError):
    """A table that must not be used; the message says which and why."""


def check_table(name: str, tensor: torch.Tensor, table: Table, num_kv_heads: int) -> None:
    """Reject a tensor that is not what `table` describes.

    Args:
        name: what to call it in the message.

    Raises:
        TableError: wrong dtype or shape, not finite, or against the table's rule.
    """
    shape = table.shape(num_kv_heads)
    if tuple(tensor.shape) != shape or tensor.dtype != table.dtype:
        found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, table.dtype))
        raise TableError(f"{name} is {found} {list(tensor.shape)}, it must be {wanted} {list(shape)}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise TableError(f"{name} is not finite")
    is_right, rule = _RULES[table.rule]
    if not is_right(tensor):
        raise TableError(f"{name} {rule}")


def _is_permutation(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor.sort(-1).values.long(), torch.arange(tensor.shape[-1]).expand(tensor.shape))


_RULES: dict[Rule, tuple[Callable[[torch.Tensor], bool], str]] = {
    "finite": (lambda tensor: True, ""),
    "levels": (
        lambda tensor: bool((tensor.diff() > 0).all() and tensor.abs().amax() <= 1),
        "is not ascending from -1 to 1 at most",
    ),
    "range": (lambda tensor: bool((tensor[:, 0] > 0).all()), "has a range that is not positive"),
    "permutation": (_is_permutation, "does not name every channel once"),
    "flag": (lambda tensor: bool(((tensor == 0) | (tensor == 1)).all()), "is not 0 or 1 everywhere"),
    "clip": (lambda tensor: bool(((tensor > 0) & (tensor <= 1)).all()), "is not above 0 and at most 1"),
}
