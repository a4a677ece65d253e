"""Other vLLM servers on the cores of this one.

vLLM pins the threads of its CPU workers, and every server that may use the same cores picks the same ones: the second
server then waits for the first, while other cores idle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
PROC = Path("/proc")


def pinned_beside(device: str, proc: Path = PROC) -> str | None:
    """A warning that names the server whose cores this one will share; None: there is none, or nothing gets pinned."""
    binding = os.environ.get(BINDING, "auto")
    if device != "cpu" or binding == "nobind":
        return None
    own = set(os.sched_getaffinity(0))
    wanted = own if binding == "auto" else own & _cores(binding.replace("|", ","))
    for pid, name in _vllm_processes(proc):
        shared = sorted(_confined(proc / str(pid), own) & wanted)
        if shared:
            return (
                f"warning: process {pid} ({name}) is pinned to cores {_words(shared)}, and this server may be, too; "
                f"start both with {BINDING}=nobind, or give each its own cores ({BINDING}=0-3)"
            )
    return None


def _vllm_processes(proc: Path) -> Iterator[tuple[int, str]]:
    """Other processes that vLLM named, or that run it."""
    for folder in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended
            continue
        name = words[0].strip()
        if int(folder.name) != os.getpid() and "vllm" in Path(name).name.lower():
            yield int(folder.name), name


def _confined(process: Path, own: set[int]) -> set[int]:
    """The cores of those threads that may use only a part of our cores."""
    cores: set[int] = set()
    for status in process.glob("task/*/status"):
        try:
            line = next(line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list:"))
            allowed = _cores(line.partition(":")[2])
        except (OSError, StopIteration):
            continue
        if not own <= allowed:
            cores |= allowed
    return cores


def _cores(text: str) -> set[int]:
    """The numbers of a list like 0-2,7; what is no number is left out."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _words(cores: list[int]) -> str:
    return ", ".join(map(str, cores[:8])) + (", ..." if len(cores) > 8 else "")
