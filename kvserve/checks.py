"""What kvserve cannot serve, said in one sentence before anything heavy is loaded.

Nothing here imports torch or vLLM: the command line calls it with what it reads from the arguments and from
config.json, the plugin calls it again with what vLLM resolved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvserve.connectors import check_connector
from kvserve.errors import UnsupportedError
from kvserve.layer_kinds import head_dim_of, hybrid_of, num_layers_of, num_sharing_of, window_of
from kvserve.native import has_cpu_kernels
from kvserve.pages.head_dims import COMPRESSED_HEAD_DIMS, DENSE_HEAD_DIMS, check_compressed
from kvserve.pages.windows import Hybrid
from kvserve.policies.base import Policy
from kvserve.policies.limits import check_rate
from kvserve.refused_models import REFUSED
from kvserve.speculation import check_speculation, entry_of

# --attention-backend values that do not take kvserve's backend away.
OWN_BACKENDS = ("AUTO", "CUSTOM", "CPU_ATTN")

# Attention kernels by name (kvserve/attention/registry.py), and the device that each runs on; `auto` is its first.
KERNELS = {"native": "cpu", "reference": "cpu", "triton": "cuda", "cuda": "cuda"}

_STOCK = "serve it with stock vLLM, without kvserve"


@dataclass(frozen=True)
class ServeOptions:
    """The vLLM options kvserve looks at, under the names they have in vLLM's parsed arguments."""

    dtype: Any = None
    kv_cache_dtype: str | None = None
    kv_cache_dtype_skip_layers: Any = None
    block_size: int | None = None
    speculative_config: Any = None
    spec_method: Any = None
    spec_model: Any = None
    spec_tokens: Any = None
    kv_transfer_config: Any = None
    kv_offloading_size: float | None = None
    tensor_parallel_size: int | None = None
    kv_sharing_fast_prefill: bool | None = None
    decode_context_parallel_size: int | None = None
    prefill_context_parallel_size: int | None = None
    attention_backend: Any = None
    runner: str | None = None
    convert: str | None = None

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> ServeOptions:
        """Keep the known names of `options`; a backend named inside attention_config counts as attention_backend."""
        known = {field.name: options.get(field.name) for field in fields(cls)}
        if not known["attention_backend"]:
            known["attention_backend"] = entry_of(options.get("attention_config"), "backend")
        return cls(**known)


def check_options(options: ServeOptions, policy: Policy) -> None:
    """Refuse vLLM options that kvserve's cache does not support.

    Raises:
        UnsupportedError: naming the option to drop.
    """
    check_cache_dtype(options, policy)
    if options.kv_cache_dtype_skip_layers:
        raise UnsupportedError(f"policy {policy.name} covers every layer; drop --kv-cache-dtype-skip-layers")
    check_speculation(policy, options.speculative_config, options.spec_method, options.spec_model, options.spec_tokens)
    if options.kv_offloading_size:  # before the connector that vLLM makes of it
        raise UnsupportedError(
            "--kv-offloading-size makes a KV connector that does not know kvserve's pages; name OffloadingConnector in "
            "--kv-transfer-config, with cpu_bytes_to_use in its kv_connector_extra_config"
        )
    speculates = any((options.speculative_config, options.spec_method, options.spec_model, options.spec_tokens))
    check_connector(options.kv_transfer_config, policy, speculates, options.tensor_parallel_size or 1)
    if options.kv_sharing_fast_prefill not in (None, False, "false"):
        raise UnsupportedError(
            "fast prefill leaves out queries of layers that share a KV cache, and kvserve's batches have all of them; "
            "drop --kv-sharing-fast-prefill"
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (getattr(options, option) or 1) > 1:
            raise UnsupportedError(
                f"kvserve keeps each sequence's cache on one rank; drop --{option.replace('_', '-')}"
                " (--tensor-parallel-size splits the KV heads instead)"
            )
    if options.runner == "pooling" or options.convert not in (None, "auto", "none"):
        raise UnsupportedError("pooling models keep no KV cache between steps; serve them with stock vLLM")
    backend = getattr(options.attention_backend, "name", options.attention_backend)
    if backend and str(backend).upper() not in OWN_BACKENDS:
        raise UnsupportedError(
            f"kvserve brings its own attention backend, {backend} would not read its pages; drop --attention-backend"
        )
    if options.block_size and policy.has_pages and options.block_size % policy.tile_tokens:
        raise UnsupportedError(
            f"--block-size must be a multiple of the policy's tile_tokens ({policy.tile_tokens}), "
            f"got {options.block_size}; drop the option to use {policy.tile_tokens}"
        )


def check_cache_dtype(options: ServeOptions, policy: Policy) -> None:
    """Refuse a --kv-cache-dtype that is not what the policy's cache has anyway.

    Where the model's dtype is not known yet (--dtype auto), a dtype that could be the model's passes: the plugin asks
    again when vLLM has resolved it.

    Raises:
        UnsupportedError: naming the option to drop.
    """
    asked, own = options.kv_cache_dtype, str(options.dtype or "auto").removeprefix("torch.")
    own = _DTYPE_ALIASES.get(own, own)
    if asked in (None, "auto") or (policy.is_dense and asked == own):
        return
    if policy.is_dense and own == "auto" and asked in ("float16", "bfloat16"):
        return
    keeps = "sets the precision of the KV cache itself"
    if policy.is_dense:
        keeps = "keeps the model's dtype" + ("" if own == "auto" else f", {own} here")
    raise UnsupportedError(
        f"policy {policy.name} {keeps}, so --kv-cache-dtype {asked} cannot be combined with it; drop the option"
    )


_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def check_stages(num_stages: int, device_type: str, is_compiled: bool) -> None:
    """Refuse a pipeline that vLLM cannot run, with or without kvserve.

    On a CPU its worker makes room for what comes from the stage before while it warms up, which it only does for
    compiled models; others end with the first request.

    Raises:
        UnsupportedError: naming the option to add.
    """
    if num_stages > 1 and device_type == "cpu" and not is_compiled:
        raise UnsupportedError(
            "on a CPU vLLM runs pipelines only with torch.compile, which is off; add --no-enforce-eager (in LLM(...): "
            "enforce_eager=False), or drop --pipeline-parallel-size"
        )


def check_compiled(policy: Policy, kernels: str) -> None:
    """Refuse codecs that the kernels do not know: those of other packages.

    Raises:
        UnsupportedError: naming the kernels that do.
    """
    unknown = {stage.name for _, codec in policy.codecs for stage in codec.chain() if not stage.kind}
    if unknown and kernels != "reference":
        raise UnsupportedError(
            f"the codec {', '.join(sorted(unknown))} has no compiled kernels; add --kernels reference, which reads it "
            "in plain PyTorch, on a CPU and slowly"
        )


def choose_kernels(asked: str, device_type: str) -> str:
    """The attention kernels of an engine.

    Args:
        asked: a name of KERNELS, or "auto" for the device's own.
        device_type: cpu, cuda, or another name that vLLM has for a device.

    Raises:
        UnsupportedError: the name is unknown, or its kernels do not run on this device or were not built.
    """
    if asked not in ("auto", *KERNELS):
        raise UnsupportedError(f"--kernels must be one of auto, {', '.join(KERNELS)}, got {asked!r}")
    own = next((name for name, device in KERNELS.items() if device == device_type), None)
    if own is None:
        raise UnsupportedError(
            f"kvserve has kernels for CPUs and NVIDIA GPUs, this vLLM runs on {device_type}; serve with stock vLLM"
        )
    chosen = own if asked == "auto" else asked
    if KERNELS[chosen] == device_type:
        if chosen == "native" and not has_cpu_kernels():
            raise UnsupportedError(
                f"--kernels {asked} needs the CPU kernels, and this kvserve was built without them (KVSERVE_NO_NATIVE, "
                "for GPU machines); install a kvserve that has them, or build it anew where there is g++"
            )
        return chosen
    if asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return asked  # on a CPU, for tests
    hint = " (TRITON_INTERPRET=1 in the environment interprets them, very slowly)" if asked == "triton" else ""
    raise UnsupportedError(
        f"--kernels {asked} runs on {KERNELS[asked]} devices, this vLLM runs on {device_type}{hint}; "
        f"use --kernels {own}, or drop the option"
    )


def check_calibration(policy: Policy) -> None:
    """Refuse a policy that reads tables which nothing names, or that names tables which nothing reads.

    Raises:
        UnsupportedError: naming the way out.
    """
    tables = policy.calibrated_tables(COMPRESSED_HEAD_DIMS[0])
    if tables and policy.calibration is None:
        raise UnsupportedError(
            f"policy {policy.name} reads a table {next(iter(tables))}, which is fitted to a model, and names no "
            "calibration; add, for example, calibration: kvquant-2bit (`kvserve calibrate --help` lists them)"
        )
    if policy.calibration is not None and not tables:
        raise UnsupportedError(
            f"nothing reads the calibration of policy {policy.name}; leave it out, or choose a codec or transform with "
            "tables"
        )


def check_model(hf_config: Mapping[str, Any], policy: Policy, name: str = "this model") -> None:
    """Refuse models whose attention kvserve does not implement.

    Args:
        hf_config: the content of the model's config.json.
        name: what to call the model in the message.

    Raises:
        UnsupportedError: naming the reason and what works instead.
    """
    check_calibration(policy)
    text = text_config(hf_config)
    for reason, applies in REFUSED:
        if applies(hf_config) or applies(text):
            raise UnsupportedError(f"{name} {reason}; {_STOCK}")
    _check_layers(text, policy, name)
    _check_rotary(text, policy, name)
    check_estimates(special_logits(text), policy, name)
    head_dim = head_dim_of(text)
    if head_dim is None:
        return  # an unusual config: the plugin sees the real value
    if head_dim not in DENSE_HEAD_DIMS:
        raise UnsupportedError(f"{name} has head_dim {head_dim}, kvserve supports multiples of 16 up to 256; {_STOCK}")
    if not policy.is_dense:
        try:
            check_compressed(head_dim, policy.name, name)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None


def _check_layers(config: Mapping[str, Any], policy: Policy, name: str) -> None:
    """Refuse layers that the model does not have, or spared ones that leave nothing for the others at the rate."""
    num_layers = num_layers_of(config)
    if num_layers is None:
        return
    try:
        policy.of_layers(num_layers)
        if policy.eviction is None:
            return
        spared = policy.eviction.spared_layers(num_layers)
        if policy.eviction.rate:
            check_rate(policy.eviction.rate, len(spared), num_layers)
    except ValueError as error:
        raise UnsupportedError(f"policy {policy.name} does not fit {name}: {error}") from None


def check_windows(hf_config: Mapping[str, Any], policy: Policy, max_model_len: int, name: str) -> None:
    """Refuse a policy that does not fit a model of which layers see less than the longest request.

    Args:
        hf_config: the content of the model's config.json.
        max_model_len: tokens of the longest request.

    Raises:
        UnsupportedError: naming what to change.
    """
    config = text_config(hf_config)
    hybrid = hybrid_of(config, max_model_len) if policy.has_pages else None
    if hybrid is None:
        return check_window(window_of(config), policy, max_model_len, name)
    named = _names_layers(policy)
    if named:
        raise UnsupportedError(
            f"policy {policy.name} names layers ({named}), and {hybrid.num_windows} layers of {name} attend to the "
            f"last {hybrid.window:,} tokens only, which stay as they are; drop {named}, or choose another policy, for "
            "example kivi-2bit"
        )


def _names_layers(policy: Policy) -> str | None:
    """What of a policy names layers of the model by their number."""
    eviction = policy.eviction
    if policy.layers:
        return "layers"
    if eviction and eviction.spare_layers:
        return "eviction.spare_layers"
    return "eviction.budget" if eviction and eviction.budget.names_heads else None


def check_window(window: int | None, policy: Policy, max_model_len: int, name: str = "this model") -> None:
    """Refuse a policy that evicts on a model whose layers all attend to the last `window` tokens (None: to all) only.

    A window that no request exceeds never applies.

    Raises:
        UnsupportedError: naming what to change.
    """
    if policy.eviction is None or not window or window >= max_model_len:
        return
    raise UnsupportedError(
        f"the layers of {name} attend to the last {window:,} tokens only, and policy {policy.name} evicts, which "
        f"sliding windows do not allow; serve requests of at most {window:,} tokens with --max-model-len {window}, or "
        "use a policy that evicts nothing, for example kivi-2bit"
    )


def check_sharing(
    hf_config: Mapping[str, Any], num_stages: int, name: str = "this model", has_connector: bool = False
) -> None:
    """Refuse a pipeline, or a KV connector that moves pages, for layers that read the KV cache of others.

    Raises:
        UnsupportedError: naming the option to drop.
    """
    num_sharing = num_sharing_of(text_config(hf_config))
    if num_sharing and num_stages > 1:
        raise UnsupportedError(
            f"the last {num_sharing} layers of {name} read the KV cache of earlier ones, which a pipeline would "
            "divide; drop --pipeline-parallel-size"
        )
    if num_sharing and has_connector:
        raise UnsupportedError(
            f"the last {num_sharing} layers of {name} read the KV cache of earlier ones, and KV connectors move the "
            "blocks of each layer; drop --kv-transfer-config"
        )


def check_hybrid(
    hybrid: Hybrid | None, policy: Policy, block_size: int | None = None, num_stages: int = 1,
    no_hybrid_manager: Any = False,
) -> None:  # fmt: skip
    """Refuse options under which window layers and compressed ones cannot share a pool.

    Args:
        block_size: what was asked for, or vLLM's smallest once it has planned.
        num_stages: of a pipeline.
        no_hybrid_manager: --disable-hybrid-kv-cache-manager.

    Raises:
        UnsupportedError: naming the option to drop.
    """
    if hybrid is None:
        return
    if no_hybrid_manager:
        raise UnsupportedError(
            "--disable-hybrid-kv-cache-manager lets window layers keep every token in the blocks of the others, whose "
            f"pages policy {policy.name} compresses; drop the option"
        )
    if block_size and block_size > policy.tile_tokens:
        raise UnsupportedError(
            f"beside layers with a sliding window the pages of policy {policy.name} take blocks of "
            f"{policy.tile_tokens} tokens, got {block_size}; drop --block-size"
        )
    if hybrid.is_shared and hybrid.num_windows < hybrid.num_full:
        raise UnsupportedError(
            f"{hybrid.num_full} layers of the model see every token, {hybrid.num_windows} a window, and others read "
            f"their KV cache, for which vLLM would spread the pages over several groups; {_STOCK}"
        )
    if num_stages > 1:
        raise UnsupportedError(
            f"{hybrid.num_windows} layers have a sliding window, and the stages of a pipeline would need blocks of "
            "different sizes; drop --pipeline-parallel-size"
        )


def _check_rotary(config: Mapping[str, Any], policy: Policy, name: str) -> None:
    """Refuse a scorer that turns queries back, on a model whose layers do not all turn them alike.

    What only the built model shows is left to kvserve.engine.rotary.
    """
    if not policy.turns_queries or policy.eviction is None:
        return
    for reason, applies in _NOT_ROTATED_ALIKE:
        if applies(config):
            raise UnsupportedError(
                f"{policy.eviction.scorer.name} needs one rotary embedding for all layers, whose angles are a "
                f"multiple of the position; {name} {reason}; choose another policy, for example snapkv"
            )


def check_estimates(logits: str | None, policy: Policy, name: str = "this model") -> None:
    """Refuse a scorer that computes with the logits of queries yet to come, where those are not plain dot products.

    Args:
        logits: as of `special_logits`.

    Raises:
        UnsupportedError: naming the reason and what to use instead.
    """
    if logits and policy.eviction and policy.turns_queries:
        raise UnsupportedError(
            f"{policy.eviction.scorer.name} expects plain softmax attention, and {name} has {logits}; choose another "
            "policy, for example snapkv"
        )


def special_logits(config: Mapping[str, Any]) -> str | None:
    """What makes a model's softmax another than that of scaled dot products, in words; None: nothing is known."""
    if config.get("attn_logit_softcapping"):
        return "capped attention logits (attn_logit_softcapping)"
    has_sinks = config.get("model_type") == "gpt_oss" or any(
        config.get(key) for key in ("add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    )
    return "learned attention sinks" if has_sinks else None


def _has_no_rotary(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in _NO_ROTARY or config.get("position_embedding_type") == "nope"


_NO_ROTARY = {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm", "biogpt", "mpt"}


def _has_unrotated_layers(config: Mapping[str, Any]) -> bool:
    rotated = config.get("no_rope_layers")  # SmolLM3's name for a list that has 1 where a layer *is* rotated
    return isinstance(rotated, list) and not all(rotated)


def _has_kinds_of_layers(config: Mapping[str, Any]) -> bool:
    kinds = config.get("layer_types")
    return isinstance(kinds, list) and "sliding_attention" in kinds and any(k != "sliding_attention" for k in kinds)


def _has_special_rotary(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return False
    return rope.get("rope_type", rope.get("type", "default")) not in ROTARY_KINDS or "mrope_section" in rope


# rope_type values whose angles are a multiple of the position.
ROTARY_KINDS = ("default", "linear", "llama3", "yarn")

_NOT_ROTATED_ALIKE: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("has no rotary embedding", _has_no_rotary),
    ("has layers without one (no_rope_layers)", _has_unrotated_layers),
    ("has layers of several kinds (layer_types), which may turn queries differently", _has_kinds_of_layers),
    ("has one of another kind (rope_parameters)", _has_special_rotary),
)


def text_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal config that describes the language model."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        nested = hf_config.get(key)
        if isinstance(nested, Mapping):
            return text_config(nested)
    return hf_config
