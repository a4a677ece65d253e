"""A model's tokenizer, and what it puts before a text."""

from __future__ import annotations

from typing import Any

from kvserve.errors import UsageError


def load_tokenizer(model: str) -> Any:
    """The transformers tokenizer of a folder, or of a downloaded model.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"cannot load the tokenizer of {model}: {reason}") from None


def start_of(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, if it does."""
    first = tokenizer("", verbose=False).input_ids[:1]
    return list(first) if first == [getattr(tokenizer, "bos_token_id", None)] else []
