"""What is calibrated before it is used: the default model's own recipes, once, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvserve.calibrate import prepare as preparing
from kvserve.calibrate.prepare import prepare
from kvserve.default_model import default_model_path
from kvserve.errors import ChildError, ConversionError


@pytest.fixture
def made(tmp_path: Path, monkeypatch) -> list[list[str]]:
    """An empty cache, and calibrations that take no time: the recipes of each are noted."""
    done: list[list[str]] = []

    def calibrate(reading, corpus, recipes) -> None:
        done.append([recipe.name for recipe in recipes])
        for recipe in recipes:
            recipe.path.parent.mkdir(parents=True, exist_ok=True)
            recipe.path.touch()

    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path))
    folder = default_model_path()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.bin").write_bytes(b"weights")
    monkeypatch.setattr(preparing, "calibrate", calibrate)
    monkeypatch.setattr(preparing, "reading_of", lambda model, corpus: None)
    return done


def policies(*names: str | None) -> list:
    return [SimpleNamespace(calibration=name) for name in names]


def test_what_the_default_model_lacks_is_made_once_and_in_one_reading(made, capsys) -> None:
    own = str(default_model_path())
    prepare(policies("kvquant-2bit", None, "cq-4c8b", "kvquant-2bit"), own)
    assert made == [["cq-4c8b", "kvquant-2bit"]]
    assert "calibrating cq-4c8b, kvquant-2bit" in capsys.readouterr().err
    prepare(policies("kvquant-2bit", "skvq-2bit"), own)
    assert made[1:] == [["skvq-2bit"]]


@pytest.mark.parametrize("names", [(None,), ("./own.safetensors",), ("unknown",)])
def test_files_and_unknown_names_are_left_to_the_checks(names, made) -> None:
    prepare(policies(*names), str(default_model_path()))
    assert made == []


def test_other_models_are_left_to_their_users(made, tmp_path: Path) -> None:
    prepare(policies("kvquant-2bit"), str(tmp_path / "other"))
    assert made == []


def test_a_calibration_that_fails_is_one_sentence(made, monkeypatch) -> None:
    def fail(*arguments) -> None:
        raise ChildError("gradients: out of memory")

    monkeypatch.setattr(preparing, "calibrate", fail)
    with pytest.raises(ConversionError, match="could not be calibrated: gradients: out of memory"):
        prepare(policies("kvquant-2bit"), str(default_model_path()))
