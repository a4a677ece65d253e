"""A model that can be calibrated in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.tiny_models import make_tiny_model


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch) -> Path:
    """A tiny model with a tokenizer of bytes, and an empty cache."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    model = make_tiny_model("llama-gqa-64", tmp_path / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(model)
    return model
