#!/usr/bin/env python3
"""What has grown too large to be read at once: files, functions and parameter lists. Part of `make lint`.

    python scripts/check_sizes.py

Files have at most 500 lines; outside of tests, functions at most 40 lines and 6 parameters (self, cls, *args and
**kwargs not counted). Device functions of kernels/ are exempt from the latter two. EXCEPTIONS lists what is larger for
a reason; one that is no longer needed is an offender, too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kvserve", "kernels", "scripts", "benchmarks", "tests", "csrc")
SUFFIXES = (".py", ".cpp", ".cu", ".h")
FUNCTIONS_IN = ("kvserve", "scripts", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 40, 6

# "file" or "file:function" -> why it is larger.
EXCEPTIONS = {
    "kvserve/engine/backend.py:KvserveImpl.__init__": "vLLM's signature",
    "kvserve/engine/backend.py:KvserveImpl.forward": "vLLM's signature",
    "kvserve/engine/eviction_manager.py:EvictingPageManager.get_num_blocks_to_allocate": "vLLM's signature",
    "kvserve/pages/layout.py:PageLayout.build": "everything a layout depends on, most of it optional",
    "benchmarks/eviction_prompts.py:PromptSet.draw": "the options of a command line, one by one as a record names them",
    "benchmarks/eviction_quality.py:main": "parses, measures and writes one record",
    "benchmarks/gpu.py:Run.add": "the columns of a table",
    "benchmarks/kvpress_parity.py:run": "the options of a command line",
    "benchmarks/load_distance.py:register_float64_products": "classes that need vLLM, which is imported late",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """All functions of a file, with the names of the classes and functions around them."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, Function | ast.ClassDef):
            name = f"{prefix}.{node.name}" if prefix else node.name
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, name)


def num_parameters(function: Function) -> int:
    """Parameters that a caller sees."""
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def too_large(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(key of EXCEPTIONS, what is wrong) of one file.

    Args:
        path: relative to the repository.
    """
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield path, f"{path}: {lines} lines, at most {MAX_FILE_LINES}"
    if not path.endswith(".py") or path.partition("/")[0] not in FUNCTIONS_IN:
        return
    for name, function in functions(ast.parse(text)):
        where = f"{path}:{function.lineno}: {name} has"
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{path}:{name}", f"{where} {length} lines, at most {MAX_FUNCTION_LINES}"
        if (count := num_parameters(function)) > MAX_PARAMETERS:
            yield f"{path}:{name}", f"{where} {count} parameters, at most {MAX_PARAMETERS}"


def offenders(root: Path = ROOT) -> list[str]:
    """Every line to print: what is too large without being an exception, and exceptions that nothing needs."""
    found, used = [], set()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix not in SUFFIXES or name.startswith("kvserve/kernels/"):
                continue
            for key, line in too_large(name, path.read_text(encoding="utf-8")):
                used.add(key)
                if key not in EXCEPTIONS:
                    found.append(line)
    return found + [f"{key}: is no longer too large, remove it from EXCEPTIONS" for key in sorted({*EXCEPTIONS} - used)]


def main() -> int:
    """Print what is too large; 1 where there is anything."""
    lines = offenders()
    print("\n".join(lines), end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
