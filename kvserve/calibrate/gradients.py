"""Collects rows, and the gradients of the loss with respect to them, from transformers' implementation of a model.

The square of an element's gradient is the diagonal of the Fisher information: how much the loss minds an error there
(KVQuant, arXiv 2401.18079, section 3.2; CQ, arXiv 2405.03917, section 3.3). vLLM computes no gradients.

Seams: `transformers.AttentionInterface` and `AttentionMaskInterface`, by whose names a model finds its attention.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvserve.calibration.rows import RowWriter, gradient_kind, write_rotary
from kvserve.codecs.tile import Half
from kvserve.layer_kinds import num_sharing_of

HOST = "kvserve.calibrate.gradients:GradientHost"
_ATTENTION = "kvserve-calibration"


class GradientHost:
    """The child's side: a model whose attention notes what it gets.

    Args:
        model: a Hugging Face folder.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(self, model: str, dtype: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(_ATTENTION, self._attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        self.dtype = getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=self.dtype, attn_implementation=_ATTENTION, local_files_only=True
        )
        self.model.eval().requires_grad_(False)
        # Gradients of activations alone: they begin where the tokens become numbers.
        self.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        text = self.model.config.get_text_config()
        self.num_layers = text.num_hidden_layers - num_sharing_of(text.to_dict())
        self.writers: dict[int, RowWriter] = {}
        self.num_tokens = 0

    def start(self, folder: str, num_tokens: int) -> None:
        """Write the rows of the next `num_tokens` tokens into a folder."""
        self.folder, self.wanted, self.num_tokens = Path(folder), num_tokens, 0

    def read(self, tokens: list[int]) -> None:
        """Read one part of the text, and how much its loss minds each row.

        Raises:
            RuntimeError: the loss is not finite.
        """
        inputs = torch.tensor([tokens])
        loss = self.model(input_ids=inputs, labels=inputs, use_cache=False).loss
        if not loss.isfinite():
            raise RuntimeError("the model's loss on the text is not finite; use --importance none")
        loss.backward()
        self.num_tokens += len(tokens)

    def finish(self, folder: str, segment: int) -> dict[str, Any]:
        """As `RowHost.finish`."""
        from kvserve.engine.rotary import NoRotaryError, transformers_table

        seen = [self.num_tokens]
        try:
            write_rotary(Path(folder), transformers_table(self.model.config.get_text_config(), segment, self.dtype))
        except NoRotaryError as error:
            return {"seen": seen, "no_rotary": error.reason}
        return {"seen": seen, "no_rotary": ""}

    def _attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        """transformers' own, and its keys and values [1, kv_heads, tokens, head_dim] noted."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if module.layer_idx >= self.num_layers:  # reads an earlier layer's rows
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        for half, rows in ((Half.KEY, key), (Half.VALUE, value)):
            self._put(module.layer_idx, half, self.num_tokens, rows)
            rows.register_hook(partial(self._put, module.layer_idx, gradient_kind(half), self.num_tokens))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def _put(self, layer: int, kind: str, first: int, rows: torch.Tensor) -> None:
        writer = self.writers.get(layer)
        if writer is None:
            writer = self.writers[layer] = RowWriter(self.folder, layer, self.wanted)
        writer.put(kind, first, rows[0].transpose(0, 1))

    def close(self) -> None:
        """Nothing stays but the files."""
