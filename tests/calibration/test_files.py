"""Files of calibrations: what they give back, and every way in which one must not be used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvserve.calibration import artefact, store
from kvserve.calibration.artefact import Cache, CalibrationError, Origin, expected, read, write
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.cq import Cq
from kvserve.calibration.methods.kvquant import Kvquant
from kvserve.calibration.methods.skvq import Skvq
from kvserve.calibration.tables import TableError
from kvserve.errors import UnsupportedError

CACHE = Cache(num_layers=2, num_kv_heads=4, head_dim=64)
COMMAND = "kvserve calibrate --method kvquant-2bit"
MODEL = "a" * 64
METHODS = {"kvquant-2bit": Kvquant(), "cq-8c8b": Cq(couple=8), "skvq-2bit": Skvq()}


def origin(recipe: str = "kvquant-2bit", model: str = MODEL) -> Origin:
    parameters = METHODS[recipe].model_dump(mode="json")
    return Origin(recipe, parameters, model, "a text", "b" * 64, 2048, "gradient", "0.1")


def tensors(recipe: str = "kvquant-2bit") -> dict[str, torch.Tensor]:
    """Tables that follow every rule, no two of them equal."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, table in expected(METHODS[recipe], CACHE):
        values = torch.rand(table.shape(CACHE.num_kv_heads), generator=generator) * 0.8 + 0.1
        if table.rule == "permutation":
            values = values.argsort(-1)
        found[name] = (values.sort(-1).values if table.rule == "levels" else values).to(table.dtype)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "own.safetensors"
    write(file, origin(), CACHE, tensors())
    return file


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        (text,) = file.metadata().values()
    return json.loads(text)


def damaged(path: Path, *gone: str, **changes) -> None:
    """Write the file anew with other metadata and a hash that fits them."""
    tables, content = load_file(path), {**metadata_of(path), **changes}
    for name in ("content_sha256", *gone):
        content.pop(name, None)
    if "content_sha256" not in gone:
        content["content_sha256"] = artefact._digest(content, tables)
    save_file(tables, path, metadata={"kvserve": json.dumps(content)})


@pytest.mark.parametrize("recipe", sorted(METHODS))
def test_a_file_gives_back_what_was_written(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    write(file, origin(recipe), CACHE, tensors(recipe))
    found = read(file, MODEL, CACHE, COMMAND)
    assert found.origin == origin(recipe) and found.origin.method == METHODS[recipe] and found.cache == CACHE
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors(recipe).items())
    assert file.stat().st_mode & 0o444 == 0o444


def test_tensors_are_called_by_layer_half_codec_and_table(path: Path) -> None:
    names = {"key.table.levels", "key.table.range", "value.table.levels"}
    assert set(load_file(path)) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in names}


@pytest.mark.parametrize(("first", "count"), [(0, 4), (0, 2), (2, 2), (3, 1)])
def test_a_rank_takes_its_own_heads(path: Path, first: int, count: int) -> None:
    found = read(path, MODEL, CACHE, COMMAND).layer_tables(1, first, count)
    whole = tensors()
    assert torch.equal(found["key.table.range"], whole["layers.1.key.table.range"][first : first + count])
    assert torch.equal(found["key.table.levels"], whole["layers.1.key.table.levels"])
    assert torch.equal(found["value.table.levels"], whole["layers.1.value.table.levels"])
    assert all(table.is_contiguous() for table in found.values())


def test_the_hash_is_that_of_the_file_and_pins_it(path: Path) -> None:
    import hashlib

    found = read(path, MODEL, CACHE, COMMAND)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path, MODEL, CACHE, COMMAND, found.sha256).sha256 == found.sha256
    write(path, replace(origin(), num_tokens=4096), CACHE, tensors())
    with pytest.raises(CalibrationError, match="has changed since the server chose it"):
        read(path, MODEL, CACHE, COMMAND, found.sha256)


def refused(path: Path, cache: Cache = CACHE, model: str = MODEL) -> str:
    with pytest.raises(CalibrationError) as error:
        read(path, model, cache, COMMAND)
    message = str(error.value)
    assert str(path) in message and message.endswith(f"`{COMMAND}`") and "\n" not in message
    return message


def test_a_file_of_another_model_is_refused(path: Path) -> None:
    assert "another model with the same shape" in refused(path, model="c" * 64)


@pytest.mark.parametrize(
    "change", [{"num_layers": 3}, {"num_layers": 1}, {"num_kv_heads": 2}, {"num_kv_heads": 8}, {"head_dim": 128}]
)
def test_a_file_of_another_shape_is_refused(path: Path, change: dict[str, int]) -> None:
    message = refused(path, replace(CACHE, **change))
    assert f"it is for {CACHE}, the model has {replace(CACHE, **change)}" in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "gone.safetensors")
    assert "Is a directory" in refused(tmp_path)


@pytest.mark.parametrize("place", [0.02, 0.4, 0.6, 0.999])
def test_one_changed_byte_is_noticed(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    refused(path)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"PK\x03\x04", b"\xff" * 64, b"{}"])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path)


def test_other_tensors_are_refused(path: Path) -> None:
    save_file({"layers.0.key.table.levels": torch.zeros(4)}, path)
    assert "its format is None, this kvserve reads 1" in refused(path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 2}, "its format is 2"),
        ({"parameters": {"name": "kmeans"}}, "there is no calibration 'kmeans'"),
        ({"parameters": {"name": "kvquant", "bits": 5}}, "bits is 5"),
        ({"parameters": []}, "metadata"),
        ({"num_layers": "2"}, "metadata"),
        ({"num_kv_heads": True}, "metadata"),
        ({"corpus": None}, "metadata"),
        ({"parameters": {"name": "kvquant", "bits": 3}}, "must be float32 [8]"),
        ({"parameters": {"name": "skvq"}}, "is missing"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(path: Path, changes: dict[str, Any], part: str) -> None:
    damaged(path, **changes)
    assert part in refused(path)


@pytest.mark.parametrize("gone", ["content_sha256", "fingerprint", "head_dim", "parameters"])
def test_metadata_that_are_missing_are_noticed(path: Path, gone: str) -> None:
    damaged(path, gone)
    refused(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_metadata_that_are_no_metadata_are_refused(path: Path, text: str) -> None:
    save_file(load_file(path), path, metadata={"kvserve": text})
    assert "metadata are not those of a calibration" in refused(path)


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    contents = set()
    for index in range(8):
        file = tmp_path / f"{index}.safetensors"
        write(file, origin(), CACHE, dict(reversed(tensors().items())) if index % 2 else tensors())
        contents.add(file.read_bytes())
    assert len(contents) == 1


def write_anyway(path: Path, changes: dict[str, torch.Tensor | None], recipe: str = "kvquant-2bit") -> None:
    """A file whose hash fits tables that must not be used."""
    tables = {name: table for name, table in {**tensors(recipe), **changes}.items() if table is not None}
    write(path, origin(recipe), CACHE, tensors(recipe))
    save_file(tables, path, metadata={"kvserve": json.dumps(metadata_of(path))})
    damaged(path)


LEVELS, RANGE = "layers.1.value.table.levels", "layers.0.key.table.range"
ORDER, CLIP = "layers.1.key.permutation.order", "layers.0.value.affine.clip"


@pytest.mark.parametrize(
    ("recipe", "name", "table", "part"),
    [
        ("kvquant-2bit", LEVELS, None, f"{LEVELS} is missing"),
        ("kvquant-2bit", "layers.2.key.table.levels", torch.zeros(4), "layers.2.key.table.levels is not one of its"),
        ("kvquant-2bit", LEVELS, torch.zeros(8), f"{LEVELS} is float32 [8], it must be float32 [4]"),
        ("kvquant-2bit", LEVELS, torch.zeros(4).half(), f"{LEVELS} is float16 [4], it must be float32 [4]"),
        ("kvquant-2bit", LEVELS, torch.tensor([-1, 0, 1, torch.nan]), f"{LEVELS} is not finite"),
        ("kvquant-2bit", LEVELS, torch.tensor([-1, 0, 1, torch.inf]), f"{LEVELS} is not finite"),
        ("kvquant-2bit", LEVELS, torch.tensor([-1, 0.5, 0.5, 1]), f"{LEVELS} is not ascending"),
        ("kvquant-2bit", LEVELS, torch.tensor([-1, 0.5, 0.2, 1]), f"{LEVELS} is not ascending"),
        ("kvquant-2bit", LEVELS, torch.tensor([-1, 0, 0.5, 1.5]), "from -1 to 1 at most"),
        ("kvquant-2bit", RANGE, torch.ones(2, 2, 64), f"{RANGE} is float32 [2, 2, 64], it must be float32 [4, 2, 64]"),
        ("kvquant-2bit", RANGE, torch.zeros(4, 2, 64), f"{RANGE} has a range that is not positive"),
        ("skvq-2bit", ORDER, torch.zeros(4, 64, dtype=torch.int32), f"{ORDER} does not name every channel once"),
        ("skvq-2bit", ORDER, torch.arange(1, 65).int().repeat(4, 1), f"{ORDER} does not name every channel once"),
        ("skvq-2bit", ORDER, torch.arange(64).repeat(4, 1), f"{ORDER} is int64"),
        ("skvq-2bit", CLIP, torch.zeros(4, 2), f"{CLIP} is not above 0"),
        ("skvq-2bit", CLIP, torch.full((4, 2), 1.01), f"{CLIP} is not above 0 and at most 1"),
        ("cq-8c8b", "layers.0.key.vector.codebook", torch.full((4, 8, 256, 8), torch.nan), "is not finite"),
    ],
)
def test_tables_that_must_not_be_used_are_refused(recipe, name, table, part, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    write_anyway(file, {name: table}, recipe)
    assert part in refused(file)
    if table is not None and name in tensors(recipe):
        with pytest.raises(TableError):
            write(file, origin(recipe), CACHE, {**tensors(recipe), name: table})


def test_a_file_that_cannot_be_written_leaves_the_one_before(path: Path, monkeypatch) -> None:
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        write(path, origin(), CACHE, tensors())
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# -- which model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    return make_model(tmp_path / "model")


def make_model(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "use_cache": True}))
    generator = torch.Generator().manual_seed(0)
    own = {f"layers.{index}.weight": torch.randn(64, 64, generator=generator) for index in range(4)}
    save_file({**own, **weights}, folder / "model.safetensors")
    return folder


def test_a_model_keeps_its_fingerprint_where_it_goes(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    (copy / "README.md").write_text("more")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "use_cache": False, "transformers_version": "9"}))
    assert fingerprint(copy) == before


def test_the_same_weights_in_other_files_are_the_same_model(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    shutil.copy(model / "config.json", split)
    for index, (name, weight) in enumerate(weights.items()):
        save_file({name: weight}, split / f"model-{index}.safetensors", metadata={"format": "pt"})
    assert fingerprint(split) == fingerprint(model)


def test_other_weights_and_shapes_are_other_models(model: Path, tmp_path: Path) -> None:
    before, weights = fingerprint(model), load_file(model / "model.safetensors")
    found = {before}
    for index, name in enumerate(weights):
        trained = make_model(tmp_path / f"trained{index}", **{name: weights[name] + 0.01})
        found.add(fingerprint(trained))
    found.add(fingerprint(make_model(tmp_path / "more", extra=torch.ones(2))))
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    found.add(fingerprint(other))
    assert len(found) == 2 + len(weights) + 1


def test_files_of_other_formats_are_known_by_samples(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(bytes(range(256)) * 100)
    before = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before
    (tmp_path / "copy2").mkdir()
    (tmp_path / "copy2" / "config.json").write_text("{}")
    (tmp_path / "copy2" / "pytorch_model.bin").write_bytes(bytes(range(256)) * 101)
    assert fingerprint(tmp_path / "copy2") != before
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    assert len(fingerprint(gguf)) == 64


@pytest.mark.parametrize("content", [b"", b"\xff" * 32, b"\x10" + b"\0" * 7 + b"not json at all!"])
def test_weights_that_cannot_be_read_have_no_fingerprint(model: Path, content: bytes) -> None:
    fingerprint(model)
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedError, match="cannot read the weights"):
        fingerprint(model)


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="no weights"):
        fingerprint(tmp_path)


# -- where they lie ------------------------------------------------------------------------------------------------


def test_a_name_means_the_file_of_this_model_and_a_path_itself(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    own = store.locate("kvquant-2bit", str(model))
    assert own == tmp_path / "cache" / "calibration" / fingerprint(model)[:16] / "kvquant-2bit.safetensors"
    assert store.locate("./mine.safetensors", str(model)) == Path("mine.safetensors")
    other = make_model(tmp_path / "other", extra=torch.ones(3))
    assert store.locate("kvquant-2bit", str(other)) != own


def test_a_stored_file_is_found_after_the_model_has_moved(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    file = store.locate("kvquant-2bit", str(model))
    file.parent.mkdir(parents=True)
    write(file, origin(model=fingerprint(model)), CACHE, tensors())
    moved = model.rename(tmp_path / "moved")
    assert store.load("kvquant-2bit", str(moved), CACHE).path == file


@pytest.mark.parametrize(
    ("name", "part"), [("cq-4c8b", "--method cq-4c8b --model"), ("/x/own.safetensors", "--out /x/own.safetensors")]
)
def test_what_is_missing_names_the_command_that_makes_it(name, part, model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CalibrationError) as error:
        store.load(name, str(model), CACHE)
    assert f"`kvserve calibrate --method {'METHOD' if '/' in name else name} --model {model}" in str(error.value)
    assert part in str(error.value)


def test_the_default_model_needs_no_name_in_the_command(monkeypatch, tmp_path: Path) -> None:
    from kvserve.default_model import default_model_path

    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path))
    assert store.command_for("cq-4c8b", str(default_model_path())) == "kvserve calibrate --method cq-4c8b"


def test_a_model_that_is_not_here_has_no_calibration() -> None:
    with pytest.raises(CalibrationError, match="some-org/model lies not on this machine"):
        store.load("kvquant-2bit", "some-org/model", CACHE)


def test_names_are_recipes_or_paths() -> None:
    store.check_name("kvquant-3bit")
    store.check_name("./mine.safetensors")
    with pytest.raises(ValueError, match="it must be one of kvquant-2bit"):
        store.check_name("kvquant")
