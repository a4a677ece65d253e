"""The codecs whose integers the CPU's and CUDA's fast paths multiply: one rule for whoever covers only these."""

from __future__ import annotations

from typing import TypeGuard

from kvserve.codecs.affine import Affine
from kvserve.codecs.base import Codec
from kvserve.codecs.symmetric import Symmetric
from kvserve.codecs.tile import Half


def is_in_family(codec: Codec, half: Half) -> TypeGuard[Affine | Symmetric]:
    """Whether these are affine keys with a scale per channel, or affine or symmetric values with one per token."""
    if isinstance(codec, Affine):
        return codec.axis in (None, "channel" if half is Half.KEY else "token")
    return isinstance(codec, Symmetric) and half is Half.VALUE
