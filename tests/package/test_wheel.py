"""The wheel: its page on an index, what is in it, and whether it serves in a fresh environment outside the checkout.

$KVSERVE_WHEEL names a wheel of `make wheel`; without it one is built here, which takes minutes. The fresh environment
links the packages of this one, kvserve left out: to install them again would take gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from kvserve.attention.native import supported_isas
from kvserve.default_model import prepare_default_model
from tests.cases.server_cases import free_port, wait_until_ready

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("kvserve", "kernels", "configs", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def index_page(readme: str, repository: str) -> str:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["index_page"](readme, repository)


def test_links_of_the_index_page_point_into_the_repository() -> None:
    readme = "[docs](docs/a.md) ![drawing](docs/b.png) [below](#limits) [paper](https://example.org/x)"
    assert index_page(readme, "https://example.org/k") == (
        "[docs](https://example.org/k/blob/HEAD/docs/a.md) ![drawing](https://example.org/k/raw/HEAD/docs/b.png) "
        "[below](https://example.org/k#limits) [paper](https://example.org/x)"
    )
    assert index_page(readme, "") == "docs  below [paper](https://example.org/x)"


@pytest.mark.parametrize("repository", ["", "https://example.org/k"])
def test_no_link_of_readme_is_dead_on_an_index_page(repository: str) -> None:
    page = index_page((ROOT / "README.md").read_text(), repository)
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", page))


def build(folder: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources, so that nothing of an earlier build gets in."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder)
    command = [*(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"), str(folder)]
    subprocess.run([*command, "--wheel-dir", str(folder / "dist")], check=True, env={**os.environ, **environment})
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` leaves it in dist/."""
    if made := os.environ.get("KVSERVE_WHEEL"):
        return Path(made).resolve()
    folder = tmp_path_factory.mktemp("sources")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    repair = [*(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"), str(build(folder))]
    subprocess.run([*repair, "--wheel-dir", str(folder / "repaired")], check=True, env=environment)
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment into which only the wheel was installed."""
    folder = tmp_path_factory.mktemp("fresh")
    linked = folder / "linked"
    linked.mkdir()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith(("kvserve", "__editable__", "pip", "__pycache__")):
            (linked / package.name).symlink_to(package)
    venv.create(folder / "venv", with_pip=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "linked.pth").write_text(f"{linked}\n")
    commands = folder / "venv" / "bin"
    run(commands / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=folder)
    return commands


def run(*command: object, folder: Path) -> str:
    """What a command prints that knows nothing of the checkout."""
    done = subprocess.run([str(word) for word in command], cwd=folder, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def outside() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.mark.slow
def test_one_wheel_fits_every_python_and_holds_all_that_is_needed(wheel: Path) -> None:
    assert re.fullmatch(r"kvserve-[\d.]+-py3-none-manylinux_\d+_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for folder, package in ((ROOT / "configs", "configs"), (ROOT / "kernels", "kernels")):
        files = [file.relative_to(folder) for file in folder.rglob("*.*") if "__pycache__" not in file.parts]
        assert {f"kvserve/{package}/{file}" for file in files} <= set(names)
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "kvserve").rglob("*.py")}
    assert modules <= set(names)
    assert {f"kvserve/native/_{isa}.so" for isa in supported_isas()} <= set(names)
    assert all(name.startswith(("kvserve/", "kvserve-")) for name in names)
    assert not any("libgomp" in name for name in names), "torch's is used; two would be two pools of threads"


@pytest.mark.slow
def test_it_asks_for_what_the_project_asks_for(wheel: Path, fresh: Path, tmp_path: Path) -> None:
    script = "import importlib.metadata as m, json; print(json.dumps(m.requires('kvserve')))"
    asked = [Requirement(text) for text in json.loads(run(fresh / "python", "-c", script, folder=tmp_path))]
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for extra, wanted in extras.items():
        found = {r.name for r in asked if (r.marker.evaluate({"extra": extra}) if r.marker else extra == "")}
        assert found == {Requirement(text).name for text in wanted}
    (cpu,) = (r for r in asked if r.name == "vllm-cpu")
    assert cpu.specifier.contains("0.32.0") and not cpu.specifier.contains("0.33.0")


@pytest.mark.slow
def test_the_commands_work_outside_the_checkout(fresh: Path, tmp_path: Path) -> None:
    assert run(fresh / "kvserve", "--version", folder=tmp_path).startswith(f"kvserve {PROJECT['version']}\nvLLM 0.32")
    assert "boost-2bit" in run(fresh / "kvserve", "policies", folder=tmp_path)
    script = (
        "import kvserve.attention.native as n; print(n.__file__);"
        "print(*(n.load_library(isa).kvs_isa().decode() for isa in n.available_isas()))"
    )
    place, isas = run(fresh / "python", "-c", script, folder=tmp_path).splitlines()
    assert Path(place).is_relative_to(fresh.parent) and isas.split() == supported_isas()


@pytest.fixture(scope="module")
def url(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the installed command, as README starts it, on a free port."""
    prepare_default_model()
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [str(fresh / "kvserve"), "serve", "--policy", "boost-2bit", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20), "--shutdown-timeout", "0"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=outside(), stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.server
def test_the_installed_server_answers_with_all_its_plugins(url: str) -> None:
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    body = {"model": "smollm2-135m-instruct", "messages": [question]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert httpx.get(f"{url}/ready", timeout=60).status_code == 200
    assert "kvserve:policy_info{" in httpx.get(f"{url}/metrics", timeout=60).text


@pytest.mark.slow
def test_a_wheel_without_cpu_kernels_needs_no_compiler_and_refuses_a_cpu(tmp_path: Path) -> None:
    wheel = build(tmp_path, KVSERVE_NO_NATIVE="1", CC="false", CXX="false")
    assert re.fullmatch(r"kvserve-[\d.]+-py3-none-any\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    assert not any(name.endswith(".so") for name in archive.namelist())
    archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "kvserve.cli", "serve", "--policy", "int8", "--kernels", "native"]
    environment = {**outside(), "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "kvserve: error: --kernels native needs the CPU kernels" in done.stderr
