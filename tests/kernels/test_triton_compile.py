"""Every Triton kernel compiles for every target, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.cases.triton_cases import run_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "cases" / "triton_compile.py")
EVERY = {"stage_kernel", "slots_kernel", "decode_kernel", "combine_kernel", "extend_kernel", "scores_kernel"}
KEPT = {"read_kept_kernel", "write_kept_kernel"}
PAGED = {"seal_kernel", "read_kernel", "received_kernel"} | KEPT
# All codecs, both 16-bit dtypes, and the dense policy, on two targets each where that costs little.
FEW = (
    *("80:kivi-2:96:4:float16", "80:dense:64:3:float16", "89:kivi-4-mass:64:8:bfloat16"),
    *("90:boosted:64:4:bfloat16", "90:dense-logits:64:3:bfloat16", "100:int8:64:1:bfloat16"),
    *("90:kivi-2-logits:64:8:bfloat16", "80:boosted-logits:256:2:bfloat16"),
)
ALL = ("boosted:96:4:float16", "kivi-4:64:8:bfloat16", "dense:64:3:bfloat16", "dense-pages:128:4:bfloat16")
MORE = (
    *("boosted:128:4:float16", "kivi-2:128:4:bfloat16", "int8:128:1:float16", "boosted:256:1:bfloat16"),
    "kivi-4:128:4:float32",
)
PADDED = ("89:kivi-2:160:4:float16", "89:boosted:224:4:bfloat16")  # to 256 channels, on the target with least room

# Codecs that are decoded to rows, of keys and of values: a quick one, the others, and all with much wider blocks.
QUICK = ("90:table-2+affine-channel:64:4:bfloat16", "90:demoting:128:4:bfloat16")  # and two formats of kept tokens
DECODED = (
    *("80:demoting:64:4:float16", "89:demoting:256:8:bfloat16"),
    *("90:outlier-table-before-rope+vector:128:4:float16", "90:vector+table-3:128:4:bfloat16"),
    *("90:rank-of-outliers+outliers-symmetric:128:8:float16", "80:before-rope-part+low-rank:64:1:bfloat16"),
    *("100:affine-token+outliers:64:4:bfloat16", "90:affine-clipped+affine-clipped:64:4:bfloat16"),
)
WIDE = (
    *("89:outlier-table-before-rope+table-2-channel:256:4:float16", "89:vector+low-rank:256:4:bfloat16"),
    *("89:rank-of-outliers+outliers-symmetric:160:4:float16", "89:table-3+table-3:256:4:bfloat16"),
)


def check_compiles(cases: tuple[str, ...], cache: Path, *options: str) -> None:
    out = run_python(SCRIPT, *options, *cases, TRITON_CACHE_DIR=str(cache), PATH="/usr/bin")
    for case in cases:
        compiled = {line.split()[3].rstrip(":") for line in out.splitlines() if f" {case} " in line}
        is_dense = case.split(":")[1].removesuffix("-logits") == "dense"
        assert compiled == (EVERY if is_dense else EVERY | PAGED - (KEPT if "before-rope" in case else set()))


def test_each_kernel_compiles_for_each_target():
    """In the form that does the most; what is compiled is kept until the kernels change."""
    check_compiles((*FEW, *QUICK), ROOT / "build" / "triton", "--once")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_every_form_of_every_kernel_compiles(architecture: int, tmp_path: Path):
    cases = (*ALL, *MORE) if architecture == 90 else ALL
    check_compiles(tuple(f"{architecture}:{case}" for case in cases), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*DECODED, *WIDE])
def test_kernels_that_decode_pages_to_rows_compile_and_fit(case: str, tmp_path: Path):
    check_compiles((case,), tmp_path, "--once")


@pytest.mark.slow
def test_heads_whose_blocks_are_much_wider_fit_the_smallest_target(tmp_path: Path):
    check_compiles(PADDED, tmp_path, "--once")
