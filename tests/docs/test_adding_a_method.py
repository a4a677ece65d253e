"""docs/adding-a-method.md: its Python runs, its policies load, its kernels agree, its parts pass the tests it names."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from kvserve.budgets.registry import BUDGETS
from kvserve.calibration.methods import registry as methods
from kvserve.calibration.tables import check_table
from kvserve.codecs.base import Codec
from kvserve.codecs.format import TileFormat
from kvserve.codecs.registry import CODECS, make_codec
from kvserve.codecs.tile import Half, Tile, TileShape
from kvserve.part_registry import PartRegistry
from kvserve.policies.loading import load_policy
from kvserve.retention.registry import RETENTIONS
from kvserve.schedules.registry import SCHEDULES
from kvserve.scorers.registry import SCORERS
from tests.cases.brought_parts import OPEN, example_package
from tests.eviction import test_budgets, test_retention, test_scorers

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-method.md"
REGISTRIES: tuple[PartRegistry[Any], ...] = (SCORERS, BUDGETS, SCHEDULES, RETENTIONS)


class Block(NamedTuple):
    section: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Everything between fences, in order."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.splitlines()[0]
        found += [Block(title, *fence) for fence in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S)]
    return found


def of(language: str, section: str | None = None) -> list[Block]:
    return [one for one in blocks() if one.language == language and section in (None, one.section)]


def is_test(block: Block) -> bool:
    return "def test_" in block.text


def imported(block: Block, folder: Path, number: int) -> ModuleType:
    """A block as a module of its own, in a file: Triton reads the source of its functions, and interprets them."""
    path = folder / f"page_{number}.py"
    path.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look for annotations
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ModuleType]]:
    """The files that the page adds, by section."""
    folder = tmp_path_factory.mktemp("page")
    made: dict[str, list[ModuleType]] = {}
    for number, block in enumerate(one for one in of("python") if not is_test(one)):
        if "import triton" in block.text:
            pytest.importorskip("triton")
        made.setdefault(block.section, []).append(imported(block, folder, number))
    return made


@pytest.fixture
def parts(modules: dict[str, list[ModuleType]], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The page's classes by the name of their YAML, in their registries as if the page's lines had been added."""
    classes: dict[str, Any] = {}
    for module in (one for section in modules.values() for one in section):
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and cls.__module__ == module.__name__):
                continue
            for registry in REGISTRIES:
                if issubclass(cls, registry.brought.base):
                    classes[name := cls.model_fields["name"].default] = cls
                    monkeypatch.setitem(registry, name, cls)
            if issubclass(cls, methods.AnyMethod):
                classes[name := cls.model_fields["name"].default] = cls
                monkeypatch.setitem(methods.METHODS, name, cls)
                monkeypatch.setitem(methods.RECIPES, name, cls())
            if issubclass(cls, Codec):
                classes[name := cls.__dataclass_fields__["name"].default] = cls
                monkeypatch.setitem(CODECS, name, cls)
    yield classes


def test_the_page_has_a_part_of_each_kind(parts: dict[str, Any]) -> None:
    assert set(parts) == {
        "value-norm", "wide-ends", "late-every-n", "same-mean", "fixed-point", "smooth"
    }  # fmt: skip


@pytest.mark.parametrize("block", [one for one in of("python") if is_test(one)], ids=lambda block: block.section)
def test_the_tests_of_the_page_pass(block: Block, modules: dict[str, list[ModuleType]]) -> None:
    names: dict[str, Any] = {"torch": torch, "Half": Half, "Tile": Tile, "TileShape": TileShape}
    names |= {"check_table": check_table}
    for module in modules[block.section]:
        names |= vars(module)
    exec(compile(block.text, str(PAGE), "exec", dont_inherit=True), names)
    tests: list[Callable[[], None]] = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("block", of("yaml"), ids=lambda block: block.section)
def test_the_policies_of_the_page_load(block: Block, parts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block.text, encoding="utf-8")
    policy = load_policy(str(path))
    assert policy.name in block.text and policy.has_pages


def test_the_scorer_passes_the_tests_that_go_over_the_registry(parts: dict[str, Any]) -> None:
    test_scorers.test_scores_are_float32_per_head_and_never_nan_or_minus_infinity("value-norm", 5, 1e3)
    test_scorers.test_heads_scored_alone_get_the_scores_they_get_together("value-norm")
    test_scorers.test_needs_are_optional_fields_of_the_view_and_all_that_is_needed("value-norm")
    test_scorers.test_keys_that_are_no_numbers_cost_their_own_head_alone("value-norm", float("nan"))


def test_the_budget_passes_the_tests_of_all_variants(parts: dict[str, Any]) -> None:
    budget = parts["wide-ends"]()
    test_budgets.test_the_total_the_minimum_and_what_exists_are_respected(budget=budget)
    test_budgets.test_the_order_of_the_tokens_of_a_head_does_not_matter(budget=budget)
    test_budgets.test_a_choice_fills_each_heads_pages_with_its_best_tokens(budget=budget)
    test_budgets.test_budgets_read_no_more_than_they_say(budget)
    test_budgets.test_everything_is_kept_when_everything_fits(budget)


def test_the_retention_passes_the_tests_that_go_over_the_registry(parts: dict[str, Any]) -> None:
    test_retention.test_as_many_rows_are_kept_as_tokens_were_chosen("same-mean")
    test_retention.test_where_everything_is_chosen_nothing_changes("same-mean")


def test_the_calibration_has_the_name_that_the_command_takes(parts: dict[str, Any]) -> None:
    assert methods.make_method("smooth", ["alpha=0.25"]) == parts["smooth"](alpha=0.25)


# -- the codec in three languages -----------------------------------------------------------------------------------

TOKENS, HEAD_DIM = 64, 96


@pytest.fixture
def coded(parts: dict[str, Any]) -> tuple[Codec, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codec, rows, codes, rows as they are read back): the definition. Some rows are ties, some saturate."""
    codec = make_codec({"name": "fixed-point"})
    rows = torch.randn(TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0)) * 4
    rows[:4] = torch.arange(HEAD_DIM) / 32 - 1.5
    tile_format = TileFormat.of(codec, codec, TOKENS, HEAD_DIM)
    data = tile_format.encode_tile(Tile.of(rows), Tile.of(rows))
    decoded, _ = tile_format.decode_tile(data)
    return codec, rows, data[: TOKENS * HEAD_DIM].view(TOKENS, HEAD_DIM), decoded


WRAPPER = """
#include "codecs/codec.h"
#include "page.h"
using namespace kvs;
extern "C" void both(int keys, int tokens, int head_dim, int fraction_bits, float* rows, uint8_t* page, float* panels,
                     float* decoded) {
  KvsHalf half{1, {}};
  half.stage[0].params[0] = fraction_bits;
  const HalfTile tile{half, bool(keys), tokens, head_dim, 0, 0};
  CodeScratch scratch;
  encode_fixed_point(tile, 0, rows, page, scratch);
  decode_fixed_point(tile, 0, page, panels);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; ++d) decoded[t * head_dim + d] = panels[tile.in_panels(t, d)];
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_cpp_of_the_page_writes_and_reads_what_the_python_does(coded: Any, tmp_path: Path) -> None:
    codec, rows, codes, decoded = coded
    (header,) = of("cpp")
    (tmp_path / "page.h").write_text(header.text.replace('"tile.h"', '"codecs/tile.h"'), encoding="utf-8")
    (tmp_path / "both.cpp").write_text(WRAPPER, encoding="utf-8")
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    library = tmp_path / "both.so"
    subprocess.run([*command, f"-I{tmp_path}", str(tmp_path / "both.cpp"), "-o", str(library)], check=True)
    both = ctypes.CDLL(str(library)).both
    for keys in (0, 1):
        page, read = torch.zeros(TOKENS, HEAD_DIM, dtype=torch.uint8), torch.zeros(TOKENS, HEAD_DIM)
        buffers = (rows.clone(), page, torch.zeros(TOKENS * 128), read)
        both(keys, TOKENS, HEAD_DIM, codec.fraction_bits, *(ctypes.c_void_p(one.data_ptr()) for one in buffers))
        assert torch.equal(page, codes) and torch.equal(read, decoded)


def test_the_triton_of_the_page_writes_and_reads_what_the_python_does(coded: Any, modules: Any, tmp_path: Path) -> None:
    codec, rows, codes, decoded = coded
    kernels = modules["A codec"][1]
    stage = kernels.FixedPointStage.of(codec, TileShape(Half.KEY, TOKENS, HEAD_DIM), {"codes": 0})
    launcher = imported(Block("", "python", LAUNCHER.replace("PAGE", kernels.__name__)), tmp_path, 99)
    page, read = torch.zeros(TOKENS, HEAD_DIM, dtype=torch.uint8), torch.zeros(TOKENS, 128)
    padded = torch.nn.functional.pad(rows, (0, 128 - HEAD_DIM))
    launcher.both[(1,)](padded, page, read, stage, launcher.Shape(HEAD_DIM, 128, TOKENS))
    assert torch.equal(page, codes) and torch.equal(read[:, :HEAD_DIM], decoded) and not read[:, HEAD_DIM:].any()


LAUNCHER = """
from typing import NamedTuple

import triton
import triton.language as tl

from PAGE import encode_fixed_point, fixed_point_rows


class Shape(NamedTuple):
    head_dim: int
    block_dim: int
    tile_tokens: int


@triton.jit
def both(rows, page, out, S: tl.constexpr, G: tl.constexpr):
    at = tl.arange(0, G.tile_tokens)[:, None] * G.block_dim + tl.arange(0, G.block_dim)[None, :]
    encode_fixed_point(page, tl.load(rows + at), S, G)
    for i in tl.static_range(G.tile_tokens // 32):
        half = (i * 32 + tl.arange(0, 32))[:, None] * G.block_dim + tl.arange(0, G.block_dim)[None, :]
        tl.store(out + half, fixed_point_rows(page, i * 32, 32, S, G))
"""


# -- what another package brings --------------------------------------------------------------------------------------


def test_the_groups_of_entry_points_are_those_that_registries_read() -> None:
    (block,) = of("toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    assert set(groups) == {f"kvserve.{brought.kind}s" for brought in OPEN}


def test_the_entry_points_of_the_page_lead_to_the_parts_of_the_example_package(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = of("toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    with example_package(monkeypatch):
        for brought in OPEN:
            for name, target in groups[f"kvserve.{brought.kind}s"].items():
                cls = brought.find(name, is_own=False)
                assert cls is not None and f"{cls.__module__}:{cls.__name__}" == target
