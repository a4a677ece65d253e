"""Builds csrc/ once per instruction set; kvserve/attention/native.py picks one at run time.

Environment variables:
    KVSERVE_NO_NATIVE        1 leaves csrc/ out, for GPU machines without g++; such a kvserve refuses to serve on a CPU
    KVSERVE_REPOSITORY_URL   where the repository can be read; the page of a package index then links to it
"""

import copy
import os
import platform
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_NATIVE = os.environ.get("KVSERVE_NO_NATIVE", "") not in ("", "0")
REPOSITORY_URL = os.environ.get("KVSERVE_REPOSITORY_URL", "").rstrip("/")

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
MARKDOWN_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


class BuildPerIsa(build_ext):
    """Gives every extension its own object folder: they compile the same sources with different flags."""

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)  # extensions may be built by several threads
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # as kvserve.native.library_path


class AnyPython(bdist_wheel):
    """The libraries know nothing of Python, so a wheel fits each one, and each machine where it has no libraries."""

    def finalize_options(self) -> None:
        super().finalize_options()
        has_cuda = (ROOT / "kvserve" / "native" / "_cuda.so").exists()
        self.root_is_pure = not (self.distribution.ext_modules or has_cuda)

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extension(isa: str) -> Extension:
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h") if path.parent.name != "cuda"
    )
    return Extension(
        f"kvserve.native._{isa}",
        sources,
        depends=headers,
        language="c++",
        extra_compile_args=[*COMMON_FLAGS, *ISA_FLAGS[isa]],
        extra_link_args=["-fopenmp"],
    )


def index_page(readme: str, repository: str) -> str:
    """README for the page of a package index, where links into the repository lead nowhere.

    Args:
        repository: its address; links and pictures then point there. Where it is empty only their text stays.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match(r"https?:", target):
            return link[0]
        if not repository:
            return "" if picture else text
        kind = "raw" if picture else "blob"
        place = f"/{kind}/HEAD/{target}" if not target.startswith("#") else target
        return f"{picture}[{text}]({repository}{place})"

    return MARKDOWN_LINK.sub(absolute, readme)


def main() -> None:
    pages = {"Source": REPOSITORY_URL, "Documentation": f"{REPOSITORY_URL}/blob/HEAD/README.md"}
    setup(
        ext_modules=[] if NO_NATIVE else [extension(isa) for isa in ISA_FLAGS],
        cmdclass={"build_ext": BuildPerIsa, "bdist_wheel": AnyPython},
        long_description=index_page((ROOT / "README.md").read_text(encoding="utf-8"), REPOSITORY_URL),
        long_description_content_type="text/markdown",
        project_urls=pages if REPOSITORY_URL else {},
    )


if __name__ == "__main__":
    main()
