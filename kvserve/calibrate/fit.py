"""From rows to the files of several recipes, with a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvserve.calibrate.collect import Reading, collected
from kvserve.calibrate.heads import digest_of, head_tensors, prompt_of
from kvserve.calibration.artefact import Cache, CalibrationError, Origin, tensor_name, write
from kvserve.calibration.corpus import Corpus
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.base import AnyMethod, Method
from kvserve.calibration.methods.razor import Razor
from kvserve.calibration.rows import Rows, RowsError
from kvserve.calibration.store import weights_of
from kvserve.codecs.tile import Half
from kvserve.measuring.machine import versions


@dataclass(frozen=True)
class Recipe:
    """A method under the name that policies use, and the file for its tables."""

    name: str
    method: AnyMethod
    path: Path


def calibrate(reading: Reading, corpus: Corpus, recipes: list[Recipe]) -> None:
    """Read once, and write the files of all recipes; those of heads read what repeats itself, each on its own.

    Raises:
        CalibrationError: the recipes do not fit the model, or the rows are not fit to be used.
        ChildError: the model could not be loaded or run.
        OSError: a file cannot be written.
    """
    check(recipes, reading.cache)
    with _progress() as bar:
        if of_rows := [recipe for recipe in recipes if isinstance(recipe.method, Method)]:
            _calibrate_rows(reading, corpus, of_rows, bar)
        for recipe in recipes:
            if isinstance(recipe.method, Razor):
                _calibrate_heads(reading, recipe, recipe.method, bar)


def _calibrate_rows(reading: Reading, corpus: Corpus, recipes: list[Recipe], bar: Progress) -> None:
    task = bar.add_task(f"reading {reading.num_tokens:,} tokens", total=len(reading.parts))
    with collected(reading, lambda: bar.advance(task)) as rows:
        for recipe in recipes:
            tensors = _fit(recipe, rows, reading.seed, bar)
            text = (corpus.name, corpus.sha256, reading.num_tokens, reading.importance)
            _write(recipe, reading, text, tensors)


def _calibrate_heads(reading: Reading, recipe: Recipe, method: Razor, bar: Progress) -> None:
    tokens, prompt = prompt_of(reading, method)
    task = bar.add_task(f"{recipe.name}, {len(tokens):,} tokens", total=1)
    tensors = head_tensors(reading, method, tokens, prompt)
    _write(recipe, reading, ("random-tokens", digest_of(tokens), len(tokens), "none"), tensors)
    bar.advance(task)


def _write(
    recipe: Recipe, reading: Reading, text: tuple[str, str, int, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """The file of a recipe; `text`: its name, hash and number of tokens, and what weighed errors."""
    parameters, model = recipe.method.model_dump(mode="json"), fingerprint(weights_of(reading.model))
    origin = Origin(recipe.name, parameters, model, *text, versions().get("kvserve", "unknown"))
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
    method = recipe.method
    assert isinstance(method, Method)
    before_rope = method.keys == "before-rope"
    if before_rope and rows.rotary is None:
        raise CalibrationError(
            f"{recipe.name} looks at keys before the rotary embedding, which needs one embedding for all layers; "
            f"{rows.no_rotary}; add --set keys=after-rope"
        )
    task = bar.add_task(recipe.name, total=2 * rows.cache.num_layers)
    tables = method.tables(rows.cache.head_dim)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(rows.cache.num_layers):
        for half in Half:
            try:
                half_rows = rows.half(layer, half, before_rope, method.sinks)
                found = method.fit(half, half_rows.tempered(method.temper), seed + layer)
            except (RowsError, ValueError) as error:
                raise CalibrationError(f"{recipe.name}, layer {layer}: {error}") from None
            tensors |= {tensor_name(layer, table): found[table.name] for table in tables if table.half is half}
            bar.advance(task)
    return tensors


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
