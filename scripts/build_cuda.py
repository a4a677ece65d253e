"""`make cuda`: compiles csrc/cuda/ for every target into kvserve/native/_cuda.so and prints what each kernel uses.

    python scripts/build_cuda.py [--targets 80 89 90a 100] [--if-needed] [--output FILE]

Needs nvcc 12.8 or newer, tried with 13.0 ($NVCC, else the one on PATH or in /usr/local/cuda/bin), no GPU and no torch.
A kernel that spills registers or has a stack is an error. The library says which sources it was built from, and for
which targets: `--if-needed` keeps one that fits, wherever it was built.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "decode.cu"
OUTPUT = ROOT / "kvserve" / "native" / "_cuda.so"
TARGETS = ("80", "89", "90a", "100")  # A100; L40, RTX 4090; H100, H200; B200
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "2"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Xptxas", "-v"),
)
DTYPES = {"Half": "float16", "Bfloat": "bfloat16"}
USAGE = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
KERNEL = re.compile(r"(?P<kernel>decode|combine)_kernelI.*?\d(?P<dtype>Half|Bfloat)E(?P<numbers>(?:Li\d+E)+)")


class Usage(NamedTuple):
    """What the assembler says of one kernel for one target."""

    kernel: str
    dtype: str
    head_dim: int
    key_bits: int
    value_bits: int
    target: str
    registers: int
    spilled_bytes: int  # stores and loads of registers, and the stack


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def sources_digest() -> str:
    """Of all that the library is compiled from, flags included."""
    paths = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu"))
    state = hashlib.sha256(" ".join(FLAGS).encode())
    for path in paths:
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def unfit(library: Path, targets: Iterable[str]) -> str | None:
    """Why a library is not the one that would be built for `targets`; None: it is, or for these and more."""
    if not library.exists():
        return "there is none"
    try:
        built = ctypes.CDLL(str(library)).kvs_cuda_built
    except (OSError, AttributeError) as error:  # of another machine, or older than its stamp
        return f"it cannot be used here: {error}"
    built.restype = ctypes.c_char_p
    digest, *made_for = built().decode().split()
    if digest != sources_digest():
        return "it was built from other sources"
    missing = [target for target in targets if target not in made_for]
    return f"it was not built for sm_{', sm_'.join(missing)}" if missing else None


def build(nvcc: str, targets: tuple[str, ...], output: Path) -> list[Usage]:
    """Compile one library for all targets; `output` is whole or as before.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    stamp = f'-DKVS_CUDA_BUILT="{" ".join((sources_digest(), *targets))}"'
    made = output.with_name(f"{output.name}.{os.getpid()}")
    command = [nvcc, *FLAGS, stamp, *codes, str(SOURCE), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} failed:\n{done.stdout}{done.stderr}")
        made.replace(output)
    finally:
        made.unlink(missing_ok=True)
    return sorted(parse_usage(done.stdout + done.stderr))


def parse_usage(log: str) -> list[Usage]:
    """The kernels in the output of `ptxas -v`."""
    usages = []
    for match in USAGE.finditer(log):
        kernel = KERNEL.search(match["name"])
        if kernel is None:
            raise RuntimeError(f"cannot read the kernel name {match['name']}")
        spilled = int(match["stack"]) + int(match["stores"]) + int(match["loads"])
        sizes = map(int, re.findall(r"Li(\d+)E", kernel["numbers"]))
        place = (kernel["kernel"], DTYPES[kernel["dtype"]], *sizes, match["target"])
        usages.append(Usage(*place, int(match["registers"]), spilled))
    return usages


def write_result(path: Path | None, content: dict[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(content), encoding="utf-8")


def print_table(usages: list[Usage], targets: tuple[str, ...]) -> None:
    """Registers of every kernel by target; spilled bytes where there are any."""
    names = f"{'kernel':8} {'dtype':9} {'head_dim':>8} {'K bits':>6} {'V bits':>6}"
    print(names, *(f"{'sm_' + target:>9}" for target in targets))
    for key in sorted({usage[:5] for usage in usages}):
        cells = {usage.target: usage for usage in usages if usage[:5] == key}
        spills = {t: f" +{usage.spilled_bytes}B" if usage.spilled_bytes else "" for t, usage in cells.items()}
        row = [f"{cells[target].registers}{spills[target]}" for target in targets]
        print(f"{key[0]:8} {key[1]:9} {key[2]:>8} {key[3]:>6} {key[4]:>6}", *(f"{cell:>9}" for cell in row))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where it does not compile or spills, 2 where there is no compiler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="compute capabilities (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--if-needed", action="store_true", help="keep a library that was built from these sources")
    parser.add_argument("--result", type=Path, help="JSON file: seconds, registers and spills")
    options = parser.parse_args(arguments)
    if options.if_needed:
        if (reason := unfit(options.output, options.targets)) is None:
            print(f"{options.output} is of these sources and for sm_{', sm_'.join(options.targets)}: kept")
            write_result(options.result, {"kept": True})
            return 0
        print(f"building {options.output.name}: {reason}", flush=True)
        options.output.unlink(missing_ok=True)  # what is not of these sources must not be measured
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda: error: nvcc not found; install the CUDA toolkit or set NVCC to its path", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        usages = build(nvcc, tuple(options.targets), options.output)
    except RuntimeError as error:
        print(f"cuda: error: {error}", file=sys.stderr)
        return 1
    print_table(usages, tuple(options.targets))
    seconds = round(time.monotonic() - start, 1)
    write_result(options.result, {"seconds": seconds, "kernels": [usage._asdict() for usage in usages]})
    if any(usage.spilled_bytes for usage in usages):
        print("cuda: error: a kernel spills registers (see the table)", file=sys.stderr)
        return 1
    print(f"wrote {options.output} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
