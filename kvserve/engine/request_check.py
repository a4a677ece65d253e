"""A request's own limit is checked before it enters the engine, whichever way it came: any route, or `LLM(...)`.

Seam: the entry point group `vllm.logits_processors`. Before it hands a request to the engine, vLLM calls the class
method `validate_params` of each class named there and refuses the request where that raises: with HTTP 400, or with the
exception from `LLM.generate`. As a logits processor this one changes nothing.

Both model runners instantiate such classes in their workers, each with other arguments; this one suits both. It sees
the first request there, whatever the layers are: where none is kvserve's, no other code of kvserve's runs in a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from kvserve.accounting.plan import check_limit
from kvserve.engine.log import logger
from kvserve.policies.limits import PREFIX, check_request, own_limit, request_limit

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

    from kvserve.policies.base import Policy


def check_arguments(arguments: Mapping[str, Any], state: Any) -> None:
    """Refuse a request by its arguments; `state` as of RequestLimits.

    Raises:
        ValueError: one sentence that names the argument and what it takes.
    """
    check_request(arguments, state.policy, state.max_model_len)
    eviction = state.policy.eviction
    limit = eviction and request_limit(eviction, state.policy, arguments, state.max_model_len)
    if limit:
        check_limit(state.layout, limit, state.max_model_len)


class RequestCheck(ProcessorV1, ProcessorV2):
    """Refuses requests; leaves logits alone.

    Attributes:
        server: what `RequestLimits` knows of this process's server; None with `LLM(...)`, whose policy only the engine
            knows, so that here only types and ranges are checked.
    """

    server: Any = None

    def __init__(self, vllm_config: VllmConfig, *args: Any) -> None:
        policy = _policy(vllm_config)
        self._dropped_by = policy.name if policy and policy.eviction is None else None
        self._unchecked = vllm_config if policy else None  # until the model has layers

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse limits that cannot be followed, and blocks that cannot be read.

        Raises:
            ValueError: one sentence that names the argument and what it takes.
        """
        arguments = sampling_params.extra_args
        if not arguments:
            return
        if cls.server is not None and cls.server.identity is not None:
            cls.server.identity.check_remote_blocks(arguments.get("kv_transfer_params"))
        if cls.server is not None and cls.server.policy is not None:
            check_arguments(arguments, cls.server)
        else:
            own_limit(arguments)

    # -- model runner V1 ------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for _, params, *_ in batch_update.added if batch_update else ():
            self._note(params)

    # -- model runner V2 ------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._note(sampling_params)
        return False

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits

    def _note(self, params: SamplingParams) -> None:
        """Say that a policy which evicts nothing drops a request's limits; a server refuses them.

        Raises:
            UnsupportedError: at the first request: the model has layers to which the policy does not apply.
        """
        if self._unchecked is not None:
            config, self._unchecked = self._unchecked, None
            _check_layers(config)
        own = [name for name in (params and params.extra_args) or () if str(name).startswith(PREFIX)]
        if own and self._dropped_by:
            logger.warning("policy %s evicts nothing, so %s has no effect", self._dropped_by, ", ".join(sorted(own)))


def _check_layers(vllm_config: VllmConfig) -> None:
    """Refuse layers that are not kvserve's; on a GPU that may be for want of an option."""
    from kvserve.engine.backend import KvserveImpl
    from kvserve.engine.device import check_gpu, device_type
    from kvserve.engine.own_layers import check_own_layers

    if device_type() == "cuda":
        check_gpu(vllm_config)
    check_own_layers(vllm_config, KvserveImpl)


def _policy(vllm_config: VllmConfig) -> Policy | None:
    """The policy in effect, if there is one."""
    from kvserve.engine.settings import section_of
    from kvserve.policies.loading import policy_from_config

    section = section_of(vllm_config)
    return policy_from_config(section) if section else None
