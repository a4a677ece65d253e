"""What a draft model beside the policy's pages relies on in vLLM, one test per seam."""

from __future__ import annotations

import inspect


def test_the_configuration_of_the_draft_model_holds_its_own_model_config() -> None:
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    source = inspect.getsource(DraftModelProposer._create_draft_vllm_config)
    assert "model_config=spec.draft_model_config" in source
    models = {"target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config"}
    assert models | {"attention_backend", "parallel_drafting", "method"} <= set(SpeculativeConfig.__dataclass_fields__)


def test_the_draft_model_takes_the_backend_of_the_speculative_config() -> None:
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    assert "backend=spec_cfg.attention_backend" in inspect.getsource(SpecDecodeBaseProposer._create_draft_vllm_config)


def test_the_proposer_gets_the_first_groups_table_and_builds_with_build_for_drafting() -> None:
    """BatchBuilder.build_for_drafting puts the table of the draft model's own group in its place."""
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.spec_decode.utils import compute_new_slot_mapping
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._build_attention_metadata)
    assert "spec_decode_common_attn_metadata is None" in source and "spec_decode_common_attn_metadata = cm" in source
    source = inspect.getsource(SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata)
    assert "build_metadata_for_drafting(" in source
    parameters = inspect.signature(AttentionMetadataBuilder.build_for_drafting).parameters
    assert list(parameters) == ["self", "common_attn_metadata", "draft_index"]
    assert hasattr(CommonAttentionMetadata, "replace")
    # Its slots are computed in the first group's table with the draft model's block size: PageSpec is wide enough.
    assert "clamped_positions // block_size" in inspect.getsource(compute_new_slot_mapping)


def test_drafting_stops_where_a_token_would_lie_beyond_the_longest_request() -> None:
    """So no pass of the draft model has a clamped position, which would overwrite a request's first token."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._input_fits_in_drafter)
    assert "common_attn_metadata.max_seq_len + num_drafter_query_tokens" in source


def test_a_group_knows_what_the_model_needs_without_the_drafts() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    names = list(inspect.signature(SingleTypeKVCacheManager.get_num_blocks_to_allocate).parameters)
    assert names[:7] == [
        "self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens",
        "num_tokens_main_model",
    ]  # fmt: skip
    names = list(inspect.signature(SingleTypeKVCacheManager.allocate_new_blocks).parameters)
    assert names == ["self", "request_id", "num_tokens", "num_tokens_main_model"]
