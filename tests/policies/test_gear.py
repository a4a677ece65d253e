"""gear-2bit against an independent reading of GEAR (arXiv 2403.05527, section 3), in float64."""

from __future__ import annotations

import pytest
import torch

from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.policies.loading import load_policy

TOKENS, HEAD_DIM, GROUP, RANK, FRACTION = 64, 64, 64, 2, 0.02


def rows(half: Half, seed: int) -> torch.Tensor:
    """Coherent rows, as caches have them: offsets of channels, a few common directions, and some far out."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(TOKENS, 3, generator=generator) @ torch.randn(3, HEAD_DIM, generator=generator)
    x = (
        common
        + 0.3 * torch.randn(TOKENS, HEAD_DIM, generator=generator)
        + 2 * torch.randn(HEAD_DIM, generator=generator)
    )
    far = torch.randint(TOKENS * HEAD_DIM, (40,), generator=generator)
    x.flatten()[far] += 20
    return x


def groups_of(half: Half, x: torch.Tensor) -> list[torch.Tensor]:
    """Views of what shares a scale: a channel's 64 tokens of keys, a token's 64 channels of values."""
    if half is Half.KEY:
        return [x[t : t + GROUP, d] for t in range(0, TOKENS, GROUP) for d in range(HEAD_DIM)]
    return [x[t, d : d + GROUP] for t in range(TOKENS) for d in range(0, HEAD_DIM, GROUP)]


def gear(half: Half, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(quantised, with outliers, with the best matrix of rank 2) of float64 [tokens, head_dim]."""
    distance, filled = torch.zeros_like(x), x.clone()
    for group, to in zip(groups_of(half, x), groups_of(half, distance), strict=True):
        to[:] = (group - group.mean()).abs() / group.std(correction=0)
    count = -(-int(FRACTION * x.numel() + 0.999999) // 8) * 8
    is_outlier = torch.zeros_like(x, dtype=torch.bool)
    is_outlier.view(-1)[distance.flatten().sort(descending=True, stable=True).indices[:count]] = True
    coded = torch.zeros_like(x)
    for group, out, to in zip(
        groups_of(half, filled), groups_of(half, is_outlier), groups_of(half, coded), strict=True
    ):
        if not out.all():
            group[out] = group[~out].mean()
        scale = max(float(group.max() - group.min()) / 3, 2.0**-20)
        to[:] = ((group - group.min()) / scale).round() * scale + group.min()
    sparse = torch.where(is_outlier, x, coded)
    u, s, v = torch.linalg.svd(x - sparse)
    return coded, sparse, sparse + (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def encoded_and_decoded(half: Half, x: torch.Tensor) -> torch.Tensor:
    policy = load_policy("gear-2bit")
    codec = policy.key if half is Half.KEY else policy.value
    assert codec is not None
    shape = TileShape(half, TOKENS, HEAD_DIM)
    positions = torch.arange(TOKENS)
    parts = codec.encode(Tile(x, torch.ones(TOKENS, dtype=torch.bool), positions), shape, {})
    return codec.decode(parts, shape, {}, positions)


@pytest.mark.parametrize("half", list(Half))
@pytest.mark.parametrize("seed", range(3))
def test_a_tile_comes_back_as_the_paper_writes_it(half: Half, seed: int) -> None:
    x = rows(half, seed)
    coded, sparse, best = gear(half, x.double())
    actual = encoded_and_decoded(half, x).double()

    def error(y: torch.Tensor) -> float:
        return float((y - x).norm() / x.norm())

    assert error(best) < error(sparse) < error(coded)
    taken = error(sparse) ** 2 - error(actual) ** 2
    assert 0.6 <= taken / (error(sparse) ** 2 - error(best) ** 2) <= 1.01  # a power iteration and float16, not an SVD


def test_the_bits_are_those_that_the_formula_counts() -> None:
    from kvserve.pages.layout import PageLayout

    policy = load_policy("gear-2bit")
    layout = PageLayout.build(policy, HEAD_DIM, 64, torch.float32)
    codes = 2 + 32 / GROUP  # and one scale and minimum in float16
    outliers = FRACTION * (16 + 16)
    low_rank = 16 * RANK * (TOKENS + HEAD_DIM) / (TOKENS * HEAD_DIM)
    assert layout.bits_per_element() == pytest.approx(codes + outliers + low_rank, rel=0.03)  # and padding
