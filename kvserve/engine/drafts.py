"""A draft model beside the model: which configuration is whose, and what its layers are.

vLLM builds the draft model with a copy of the configuration, in which `model_config` is the draft model's.

Seam: `vllm.config.SpeculativeConfig` (method, draft_model_config, target_model_config, attention_backend).
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from kvserve.checks import text_config
from kvserve.engine.block_size import asked_block_size
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import num_sharing_of
from kvserve.pages.drafts import DraftLayers
from kvserve.speculation import DRAFT_MODEL, entry_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvserve.policies.base import Policy


def drafts_with_a_model(config: VllmConfig) -> bool:
    """Whether a model of its own proposes the tokens that are speculated on."""
    return entry_of(config.speculative_config, "method") == DRAFT_MODEL


def is_draft_config(config: VllmConfig) -> bool:
    """Whether this is the configuration that vLLM builds the draft model with."""
    return drafts_with_a_model(config) and config.model_config is config.speculative_config.draft_model_config


def target_config(config: VllmConfig) -> VllmConfig:
    """The draft model's configuration with the model's own in their places."""
    own, speculative = copy(config), config.speculative_config
    own.model_config, own.parallel_config = speculative.target_model_config, speculative.target_parallel_config
    return own


def draft_layers(config: VllmConfig, policy: Policy, hybrid: Any) -> DraftLayers | None:
    """The layers of the draft model; None: there is none.

    Args:
        hybrid: not None where window layers of the model have blocks of their own.

    Raises:
        UnsupportedError: they cannot share the pool with the model's.
    """
    if not drafts_with_a_model(config):
        return None
    check_draft_model(config, policy, hybrid)
    model, parallel = config.speculative_config.draft_model_config, config.speculative_config.draft_parallel_config
    return DraftLayers(model.get_num_layers(parallel), model.get_num_kv_heads(parallel), model.get_head_size())


def check_draft_model(config: VllmConfig, policy: Policy, hybrid: Any) -> None:
    """Refuse what leaves a draft model's layers no place beside the model's; as `draft_layers`."""
    drop = "drop the draft model, or use --spec-method ngram"
    if hybrid is not None:
        raise UnsupportedError(
            "beside a draft model all layers of the model need the same pages, and some of this one's have a sliding "
            f"window; {drop}"
        )
    models = (config.model_config, config.speculative_config.draft_model_config)
    if any(num_sharing_of(text_config(model.hf_config.to_dict())) for model in models):
        raise UnsupportedError(f"layers that share a KV cache are not proven in or beside a draft model; {drop}")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedError(
            "a draft model runs in the last stage of a pipeline, whose blocks would differ from the others'; drop "
            "--pipeline-parallel-size, or the draft model"
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise UnsupportedError(
            "--disable-hybrid-kv-cache-manager leaves the layers of a draft model no blocks of their own; drop the "
            "option, or the draft model"
        )
    block_size = asked_block_size(config.cache_config)
    if policy.has_pages and block_size and block_size > policy.tile_tokens:
        raise UnsupportedError(
            f"beside a draft model the pages of policy {policy.name} take blocks of {policy.tile_tokens} tokens, got "
            f"{block_size}; drop --block-size"
        )
    if config.speculative_config.parallel_drafting:
        raise UnsupportedError(f"drafting all tokens in one pass (parallel_drafting) is not proven; {drop}")


def share_backend(config: VllmConfig) -> None:
    """Let the draft model's layers take the backend of the model's, whose blocks they share.

    vLLM chooses it anew unless it is named, so this has to happen before it builds the draft model.
    """
    if drafts_with_a_model(config) and config.speculative_config.attention_backend is None:
        config.speculative_config.attention_backend = config.attention_config.backend
