"""The policies that ship with kvserve: the YAML files of configs/."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def configs_dir() -> Path:
    """Folder of the shipped policies: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "none.yaml").is_file():
            return folder
    raise FileNotFoundError(f"the kvserve installation in {package} has no configs folder; reinstall it")


@cache
def policy_names() -> tuple[str, ...]:
    """Names of the shipped policies, sorted."""
    return tuple(sorted(path.stem for path in configs_dir().glob("*.yaml")))


def shipped_path(name: str) -> Path:
    """The YAML file of a shipped policy.

    Raises:
        KeyError: there is no policy of this name.
    """
    if name not in policy_names():
        raise KeyError(name)
    return configs_dir() / f"{name}.yaml"
