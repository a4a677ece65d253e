"""The overlay of `make test-next`: Python files of a wheel, compiled libraries of the installed vLLM."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import next_vllm
import pytest


def test_python_files_are_the_wheels_and_libraries_the_installed_ones(tmp_path: Path) -> None:
    wheel, site, installed = tmp_path / "vllm-9.whl", tmp_path / "site", tmp_path / "installed"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/__init__.py", "vllm/_C.abi3.so", "vllm/libs/libx.so.1", "vllm-9.dist-info/METADATA"):
            archive.writestr(name, "new")
    for name in ("__init__.py", "_C.abi3.so", "libs/libtcmalloc.so.4"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("old")
    next_vllm.unpack_python(wheel, site)
    next_vllm.link_libraries(installed, site / "vllm")
    found = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*") if path.is_file()}
    assert found == {
        "vllm/__init__.py": "new", "vllm-9.dist-info/METADATA": "new", "vllm/_C.abi3.so": "old",
        "vllm/libs/libtcmalloc.so.4": "old",
    }  # fmt: skip


def test_the_overlay_comes_before_the_environments_vllm_and_behind_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = next_vllm.environment_of(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(next_vllm.ROOT), str(tmp_path), "/mine"]
    assert found["VLLM_TARGET_DEVICE"] == "cpu"


def test_another_vllm_than_the_next_one_is_not_tested(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"expected vLLM {next_vllm.VERSION}"):
        next_vllm.check(dict(os.environ))
