"""Builds csrc/ once per instruction set; kvserve/attention/native.py picks one at run time."""

import copy
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12's own AVX-512 headers
]
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *ISA_FLAGS["avx2"],
        "-mprefer-vector-width=512",
    ]


class BuildPerIsa(build_ext):
    """Gives every extension its own object folder: they compile the same sources with different flags."""

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)  # extensions may be built by several threads
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)


def extension(isa: str) -> Extension:
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h"))
    return Extension(
        f"kvserve.native._{isa}",
        sources,
        depends=headers,
        language="c++",
        extra_compile_args=[*COMMON_FLAGS, *ISA_FLAGS[isa]],
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[extension(isa) for isa in ISA_FLAGS], cmdclass={"build_ext": BuildPerIsa})
