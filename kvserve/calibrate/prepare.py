"""Calibrations of policies that are about to be used: found, or for the default model made on first use."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvserve.arguments.model_folder import path_of
from kvserve.calibrate.command import reading_of
from kvserve.calibrate.fit import Recipe, calibrate
from kvserve.calibration.corpus import default_corpus
from kvserve.calibration.methods.registry import RECIPES
from kvserve.calibration.store import locate, names_file
from kvserve.default_model import default_model_path
from kvserve.errors import ChildError, ConversionError

if TYPE_CHECKING:
    from kvserve.policies.base import Policy


def prepare(policies: Iterable[Policy], model: str) -> None:
    """Make what policies need and the default model lacks; other models' calibrations are left to their users.

    Raises:
        UnsupportedError: the model cannot be calibrated, or the file cannot be written.
        ConversionError: the calibration failed; nothing of it stays.
    """
    names = {policy.calibration for policy in policies if policy.calibration}
    wanted = sorted(name for name in names if not names_file(name) and name in RECIPES)
    if path_of(model) != default_model_path():
        return
    places = {name: locate(name, model) for name in wanted}
    recipes = [Recipe(name, RECIPES[name], path) for name, path in places.items() if not path.exists()]
    if recipes:
        _make(model, recipes)


def _make(model: str, recipes: list[Recipe]) -> None:
    corpus = default_corpus()
    _say(f"calibrating {', '.join(recipe.name for recipe in recipes)} for {Path(model).name} (once, a few minutes)")
    try:
        calibrate(reading_of(model, corpus), corpus, recipes)
    except (ChildError, OSError) as error:
        raise ConversionError(f"the default model could not be calibrated: {error}") from error
    for recipe in recipes:
        _say(f"calibration ready in {recipe.path}")


def _say(line: str) -> None:
    print(f"kvserve: {line}", file=sys.stderr, flush=True)
