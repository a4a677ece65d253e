"""A second device to test on where there is none: tensors that refuse to meet CPU tensors, as a GPU's do.

`moved(x)` is x on the second device, which calls itself "meta"; the values stay in main memory. Inside `SecondDevice()`
operators follow PyTorch's rule: all tensors on one device, except scalars, copies, and what is made for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kvserve.attention.base import PagedAttention

COPIES = ("aten._to_copy.default", "aten.copy_.default")
# What makes a GPU's caller wait: a number of the device, or how many there are of something, is needed to go on.
READS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal")


class Moved(torch.Tensor):
    """A tensor of the second device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Moved:
        moved = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        moved.inner = inner
        return moved

    def tolist(self) -> Any:
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise AssertionError(f"{function} outside of SecondDevice()")


def moved(x: Any) -> Any:
    """Tensors in x, on the second device."""
    return tree_map_only(torch.Tensor, lambda t: t if isinstance(t, Moved) else Moved(t), x)


def back(x: Any) -> Any:
    """Tensors in x, in main memory."""
    return tree_map_only(Moved, lambda t: t.inner, x)


def by_mask(function: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether an operator selects by a mask, and so must know how much it selects."""
    masks = any(tensor.dtype == torch.bool for tensor in tensors[1:])
    return masks and function.overloadpacket.__name__ in ("index", "index_put_", "_index_put_impl_")


class SecondDevice(TorchDispatchMode):
    """Runs operators where their tensors are.

    Attributes:
        waits: operators so far that read something of the second device back.

    Raises:
        RuntimeError: an operator that would fail on a GPU, since its tensors are on two devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        found: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, found.append, (arguments, options))
        there = [t for t in found if isinstance(t, Moved)]
        here = [t for t in found if not isinstance(t, Moved) and t.dim()]
        if there and here and str(function) not in COPIES:
            raise RuntimeError(f"{function} got tensors on two devices")
        device = options.get("device")
        to_there = bool(there) if device is None else torch.device(device).type == "meta"
        if there and (not to_there or function.overloadpacket.__name__ in READS or by_mask(function, there)):
            self.waits.append(str(function))
        if device is not None:
            options["device"] = torch.device("cpu")
        result = function(*back(arguments), **back(options))
        if str(function) == "aten.copy_.default":
            return arguments[0]
        if not to_there:
            return result
        originals = {id(t.inner): t for t in there}
        return tree_map_only(torch.Tensor, lambda t: originals[id(t)] if id(t) in originals else Moved(t), result)


class KernelsThere(PagedAttention):
    """Kernels of the second device: those of the CPU, once all tensors are there."""

    def __init__(self, kernels: PagedAttention) -> None:
        super().__init__(kernels.layout, kernels.spec)
        self.kernels = kernels

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        found: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, found.append, (arguments, options))
        assert all(isinstance(tensor, Moved) for tensor in found), f"{name} got a CPU tensor"
        with torch.utils._python_dispatch._disable_current_modes():
            return moved(getattr(self.kernels, name)(*back(arguments), **back(options)))

    def stage(self, *arguments: Any) -> Any:
        return self._call("stage", *arguments)

    def store_sealed(self, *arguments: Any) -> Any:
        return self._call("store_sealed", *arguments)

    def attend(self, *arguments: Any) -> Any:
        return self._call("attend", *arguments)

    def store_tail(self, *arguments: Any) -> Any:
        return self._call("store_tail", *arguments)

    def read(self, *arguments: Any, **options: Any) -> Any:
        return self._call("read", *arguments, **options)

    def read_kept(self, *arguments: Any) -> Any:
        return self._call("read_kept", *arguments)

    def write_kept(self, *arguments: Any) -> Any:
        return self._call("write_kept", *arguments)

    def attention_sums(self, *arguments: Any, **options: Any) -> Any:
        return self._call("attention_sums", *arguments, **options)
