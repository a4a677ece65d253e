"""`kvserve prepare-model`: convert the default model, and print its folder."""

from __future__ import annotations

from collections.abc import Sequence

from kvserve.arguments.parser import Parser


def run(arguments: Sequence[str]) -> int:
    """Convert it, unless that was done before."""
    Parser(
        prog="kvserve prepare-model", description="Convert the default model for vLLM, once; prints its folder."
    ).parse_args(arguments)
    from kvserve.default_model import prepare_default_model

    print(prepare_default_model())
    return 0
