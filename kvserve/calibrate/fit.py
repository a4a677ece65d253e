"""From rows to the files of several recipes, with a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvserve.calibrate.collect import Reading, collected
from kvserve.calibration.artefact import Cache, CalibrationError, Origin, tensor_name, write
from kvserve.calibration.corpus import Corpus
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.base import Method
from kvserve.calibration.rows import Rows, RowsError
from kvserve.calibration.store import weights_of
from kvserve.codecs.tile import Half
from kvserve.measuring.machine import versions


@dataclass(frozen=True)
class Recipe:
    """A method under the name that policies use, and the file for its tables."""

    name: str
    method: Method
    path: Path


def calibrate(reading: Reading, corpus: Corpus, recipes: list[Recipe]) -> None:
    """Read once, and write the files of all recipes.

    Raises:
        CalibrationError: the recipes do not fit the model, or the rows are not fit to be used.
        ChildError: the model could not be loaded or run.
        OSError: a file cannot be written.
    """
    check(recipes, reading.cache)
    model_fingerprint = fingerprint(weights_of(reading.model))
    with _progress() as bar:
        task = bar.add_task(f"reading {reading.num_tokens:,} tokens", total=len(reading.parts))
        with collected(reading, lambda: bar.advance(task)) as rows:
            for recipe in recipes:
                tensors = _fit(recipe, rows, reading.seed, bar)
                origin = Origin(
                    recipe.name, recipe.method.model_dump(mode="json"), model_fingerprint, corpus.name, corpus.sha256,
                    reading.num_tokens, reading.importance, versions().get("kvserve", "unknown"),
                )  # fmt: skip
                recipe.path.parent.mkdir(parents=True, exist_ok=True)
                write(recipe.path, origin, reading.cache, tensors)


def check(recipes: list[Recipe], cache: Cache) -> None:
    """Reject recipes that the model's heads do not allow, before anything is read.

    Raises:
        CalibrationError: naming the fix.
    """
    for recipe in recipes:
        try:
            recipe.method.tables(cache.head_dim)
        except ValueError as error:
            raise CalibrationError(f"{recipe.name} does not fit this model: {error}") from None


def _fit(recipe: Recipe, rows: Rows, seed: int, bar: Progress) -> Mapping[str, torch.Tensor]:
    before_rope = recipe.method.keys == "before-rope"
    if before_rope and rows.rotary is None:
        raise CalibrationError(
            f"{recipe.name} looks at keys before the rotary embedding, which needs one embedding for all layers; "
            f"{rows.no_rotary}; add --set keys=after-rope"
        )
    task = bar.add_task(recipe.name, total=2 * rows.cache.num_layers)
    tables = recipe.method.tables(rows.cache.head_dim)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(rows.cache.num_layers):
        for half in Half:
            try:
                half_rows = rows.half(layer, half, before_rope, recipe.method.sinks)
                found = recipe.method.fit(half, half_rows.tempered(recipe.method.temper), seed + layer)
            except (RowsError, ValueError) as error:
                raise CalibrationError(f"{recipe.name}, layer {layer}: {error}") from None
            tensors |= {tensor_name(layer, table): found[table.name] for table in tables if table.half is half}
            bar.advance(task)
    return tensors


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
