"""Whether a model shows the tokens of an image those that follow in the same image.

Seam: `ModelConfig.is_mm_prefix_lm`, which is false where the configuration leaves no images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvserve.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def check_images(model: ModelConfig, name: str = "this model") -> None:
    """Refuse images whose tokens attend in both directions.

    Raises:
        UnsupportedError: naming the option that leaves images out.
    """
    if model.is_mm_prefix_lm:
        raise UnsupportedError(
            f"{name} lets the tokens of an image see later ones of the same image, and kvserve's kernels show a token "
            "only those before it; serve it for text, with --language-model-only, or serve it with stock vLLM, without "
            "kvserve"
        )
