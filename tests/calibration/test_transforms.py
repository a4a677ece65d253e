"""Transforms in front of a cache and behind it: where nothing is lost in between, attention answers as without them."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvserve.transforms.layer import LayerTransforms, Transforms
from kvserve.transforms.permutation import Permutation
from kvserve.transforms.registry import TRANSFORMS, make_transform, transform_content
from kvserve.transforms.rotation import Rotation, hadamard
from kvserve.transforms.scale import Scale

KV_HEADS, GROUP, HEAD_DIM, TOKENS = 2, 3, 96, 40
ALL = (Permutation(), Scale(), Rotation(), Rotation(matrix="calibrated"))


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of a group, keys and values, [tokens, heads, head_dim]."""
    torch.manual_seed(1)
    query = torch.randn(TOKENS, KV_HEADS * GROUP, HEAD_DIM)
    return query, torch.randn(TOKENS, KV_HEADS, HEAD_DIM), torch.randn(TOKENS, KV_HEADS, HEAD_DIM)


def tables() -> dict[str, torch.Tensor]:
    """Tables of every transform, other ones for keys and for values and in each head."""
    torch.manual_seed(2)
    found = {}
    for half in ("key", "value"):
        order = [torch.randperm(HEAD_DIM) for _ in range(KV_HEADS)]
        found[f"{half}.permutation.order"] = torch.stack(order).int()
        found[f"{half}.scale.factor"] = torch.rand(KV_HEADS, HEAD_DIM) + 0.5
        found[f"{half}.rotation.matrix"] = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM)).Q
    return found


def layer(*chosen, value=None) -> LayerTransforms:
    return LayerTransforms(Transforms(chosen, chosen if value is None else value), tables(), KV_HEADS, HEAD_DIM)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention in float64, head by head."""
    found = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        own = head // GROUP
        scores = query[:, head].double() @ key[:, own].double().T / HEAD_DIM**0.5
        scores += torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        found[:, head] = scores.softmax(1) @ value[:, own].double()
    return found


@pytest.mark.parametrize(
    "chosen", [*[(one,) for one in ALL], *itertools.permutations(ALL, 2)],
    ids=lambda chosen: "-".join(one.name[:4] + str(getattr(one, "matrix", ""))[:3] for one in chosen),
)  # fmt: skip
def test_attention_over_mapped_rows_is_attention(chosen, rows) -> None:
    query, key, value = rows
    maps = layer(*chosen)
    assert not torch.allclose(maps.keys(key), key) and not torch.allclose(maps.values(value), value)
    mapped = attention(maps.queries(query), maps.keys(key), maps.values(value)).float()
    torch.testing.assert_close(maps.outputs(mapped), attention(*rows).float(), rtol=1e-4, atol=2e-5)


def test_keys_and_values_have_maps_of_their_own(rows) -> None:
    query, key, value = rows
    maps = layer(Permutation(), value=())
    assert maps.values(value) is value and maps.outputs(query) is query
    maps = layer(value=(Scale(),))
    assert maps.keys(key) is key and maps.queries(query) is query
    mapped = attention(query, key, maps.values(value)).float()
    torch.testing.assert_close(maps.outputs(mapped), attention(*rows).float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("transform", ALL, ids=lambda one: one.name + getattr(one, "matrix", ""))
def test_every_direction_is_what_its_matrix_says(transform) -> None:
    """The matrix of each head, read off unit vectors, and its inverse by linear algebra."""
    maps = LayerTransforms(Transforms((transform,), (transform,)), tables(), KV_HEADS, HEAD_DIM)
    unit = torch.eye(HEAD_DIM)[:, None].expand(-1, KV_HEADS, -1)
    matrix = maps.keys(unit).permute(1, 2, 0).double()  # [kv_heads, row, column]
    opposed = maps.queries(unit).permute(1, 2, 0).double()
    torch.testing.assert_close(opposed, torch.linalg.inv(matrix).mT, rtol=0, atol=1e-5)
    matrix, undone = maps.values(unit).permute(1, 2, 0).double(), maps.outputs(unit).permute(1, 2, 0).double()
    torch.testing.assert_close(undone @ matrix, torch.eye(HEAD_DIM).double().expand_as(matrix), rtol=0, atol=1e-5)


def test_half_precision_stays_and_costs_its_rounding_only(rows) -> None:
    query, key, _ = (part.bfloat16() for part in rows)
    maps = layer(Rotation(), Permutation())
    mapped = maps.keys(key)
    assert mapped.dtype == torch.bfloat16 and maps.queries(query).dtype == torch.bfloat16
    exact = layer(Rotation(), Permutation()).keys(key.float())
    torch.testing.assert_close(mapped.float(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 256])
def test_hadamard_matrices_are_orthonormal_and_spread_a_channel(head_dim) -> None:
    matrix = hadamard(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-5)
    block = head_dim & -head_dim
    torch.testing.assert_close(matrix[0, :block].abs(), torch.full((block,), block**-0.5))
    assert not matrix[0, block:].any()
    torch.testing.assert_close(matrix, matrix.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key.permutation.order": None}, "key.permutation.order is not there"),
        ({"key.permutation.order": torch.zeros(KV_HEADS, HEAD_DIM)}, "float32"),
        ({"value.permutation.order": torch.zeros(KV_HEADS + 1, HEAD_DIM, dtype=torch.int32)}, f"{KV_HEADS + 1}"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, message) -> None:
    changed = {name: table for name, table in {**tables(), **change}.items() if table is not None}
    with pytest.raises(ValueError, match=message):
        LayerTransforms(Transforms((Permutation(),), (Permutation(),)), changed, KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_a_transform_is_its_content(name) -> None:
    assert make_transform(transform_content(make_transform(name))) == make_transform(name)
    assert make_transform(name).name == name and transform_content(make_transform(name)) == {"name": name}


def test_unknown_transforms_and_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="the transforms are permutation, rotation, scale"):
        make_transform("rotate")
    with pytest.raises(ValueError, match="angle"):
        make_transform({"name": "rotation", "angle": 3})
    assert make_transform({"name": "rotation", "matrix": "calibrated"}) == Rotation(matrix="calibrated")
