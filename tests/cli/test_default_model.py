"""The default model: what its folder holds, and when it is converted again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvserve import default_model
from kvserve.default_model import default_model_path, prepare_default_model


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and conversions that take no time: each folder is noted, and holds its number as weights."""
    done: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        done.append(target)
        (target / "model.safetensors").write_text(str(len(done)))
        (target / default_model.STAMP_FILE).write_text(json.dumps(default_model._stamp()))

    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(default_model, "_convert", convert)
    return done


def test_it_is_converted_once(conversions: list[Path]) -> None:
    assert prepare_default_model() == prepare_default_model() == default_model_path()
    assert len(conversions) == 1
    assert list(default_model_path().parent.iterdir()) == [default_model_path()]


def test_what_an_earlier_version_converted_is_converted_again(conversions, monkeypatch) -> None:
    old = default_model_path()
    old.mkdir(parents=True)  # without a stamp, as the first version left it
    (old / "model.safetensors").write_text("old")
    (old / "left_behind.json").write_text("{}")
    assert (prepare_default_model() / "model.safetensors").read_text() == "1"
    assert not (old / "left_behind.json").exists()
    monkeypatch.setattr(default_model, "CONVERSION", default_model.CONVERSION + 1)
    assert (prepare_default_model() / "model.safetensors").read_text() == "2"
    assert len(conversions) == 2


@pytest.mark.parametrize("stamp", ["", "[]", "{", '{"conversion": 1}', "\xff"])
def test_a_damaged_stamp_is_no_stamp(conversions: list[Path], stamp: str) -> None:
    prepare_default_model()
    (default_model_path() / default_model.STAMP_FILE).write_bytes(stamp.encode("latin-1"))
    assert (prepare_default_model() / "model.safetensors").read_text() == "2"


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_default_model()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_vllm_samples_as_the_folder_says(folder: Path) -> None:
    from vllm.config import ModelConfig

    settings = ModelConfig(model=str(folder)).get_diff_sampling_param()
    assert settings == {"temperature": 0.2, "top_p": 0.9, "max_tokens": 512}


def test_an_answer_ends_where_the_chat_template_ends_a_turn(folder: Path, tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    (end,) = tokenizer.encode(text.rstrip("\n"), add_special_tokens=False)[-1:]
    assert text.endswith("<|im_start|>assistant\nHello<|im_end|>\n")
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        assert settings["eos_token_id"] == end == tokenizer.eos_token_id
        assert settings["bos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert settings["pad_token_id"] == tokenizer.pad_token_id


def test_a_prompt_begins_with_one_start_token(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert tokens[:3] == ["<|im_start|>", "system", "Ċ"] and tokens[-4:] == ["<|im_start|>", "ass", "istant", "Ċ"]


def test_digits_stand_alone_and_leave_the_space_before_them_whole(tokenizer: Any) -> None:
    """As llama.cpp splits for the pre-tokenizer that the GGUF names: each digit first, then GPT-2's pattern."""
    assert tokenizer.tokenize("a\n\n12. b") == ["a", "ĊĊ", "1", "2", ".", "Ġb"]
    assert tokenizer.tokenize("x  7 x") == ["x", "ĠĠ", "7", "Ġx"]


def test_another_user_may_read_it(folder: Path) -> None:
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 1 and all(mode & 0o400 for mode in modes)
