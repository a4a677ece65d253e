"""Which of vLLM's KV connectors may move a policy's pages, and what makes the pages of two engines the same.

A connector copies the bytes of blocks. kvserve wraps it (kvserve/engine/tile_connector.py) so that it sees the sealed
tiles of a prompt as a row of blocks like any other's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvserve.errors import UnsupportedError
from kvserve.policies.base import Policy
from kvserve.speculation import entry_of

PARAMS_KEY = "kvserve"  # in a request's kv_transfer_params

MODULE = "kvserve.engine.tile_connector"
# vLLM's name of a connector, and the class of MODULE that wraps it.
WRAPPERS = {
    "ExampleConnector": "ExampleTiles",
    "OffloadingConnector": "OffloadingTiles",
    "NixlConnector": "NixlTiles",
    "NixlPullConnector": "NixlPullTiles",
}
STORAGE_KEY = "shared_storage_path"  # of ExampleConnector


def asked_connector(transfer: Any) -> str | None:
    """The connector that a --kv-transfer-config names, or None; of a wrapped one, vLLM's own name."""
    name = entry_of(transfer, "kv_connector") if transfer else None
    return next((own for own, wrapper in WRAPPERS.items() if wrapper == name), name)


def is_wrapped(transfer: Any) -> bool:
    """Whether the connector is one of MODULE's."""
    return entry_of(transfer, "kv_connector_module_path") == MODULE


def wrapped(transfer: Mapping[str, Any]) -> dict[str, Any]:
    """The --kv-transfer-config that has kvserve's wrapper in the place of vLLM's connector."""
    return {**transfer, "kv_connector": WRAPPERS[transfer["kv_connector"]], "kv_connector_module_path": MODULE}


def check_connector(transfer: Any, policy: Policy, speculates: bool = False, tensor_parallel_size: int = 1) -> None:
    """Refuse a connector that would move something else than a policy's tiles.

    Args:
        transfer: --kv-transfer-config, wrapped or not.
        speculates: whether steps have drafts.

    Raises:
        UnsupportedError: naming what to change.
    """
    name = asked_connector(transfer)
    if name is None:
        return
    if name not in WRAPPERS:
        raise UnsupportedError(
            f"kvserve knows how the KV connectors {', '.join(WRAPPERS)} move blocks, and not {name!r:.80}; use one of "
            "them, or drop --kv-transfer-config"
        )
    reason = _reason_of_policy(policy)
    if reason:
        raise UnsupportedError(f"{reason}, or drop --kv-transfer-config")
    if speculates:
        raise UnsupportedError(
            "a KV connector counts drafts of speculative decoding as tokens whose tiles are sealed; drop "
            "--speculative-config (and --spec-*), or --kv-transfer-config"
        )
    if name == "ExampleConnector":
        _check_files(transfer, tensor_parallel_size)
    if entry_of(transfer, "kv_load_failure_policy") == "recompute":
        raise UnsupportedError(
            "vLLM would count blocks that could not be loaded by their place in a row, where kvserve has others before "
            "them; drop kv_load_failure_policy from --kv-transfer-config"
        )


def _reason_of_policy(policy: Policy) -> str | None:
    """Why the tiles of a policy cannot be moved, and what to use instead; None: they can."""
    if policy.eviction:
        return (
            f"policy {policy.name} gives back tiles that a KV connector would move; use a policy that evicts nothing, "
            "for example kivi-2bit with --policy-set sink_tokens=0"
        )
    if policy.sink_tokens:
        return (
            f"KV connectors move the tiles of a prompt, and policy {policy.name} keeps {policy.sink_tokens} first "
            "tokens in blocks beside them; add --policy-set sink_tokens=0"
        )
    if policy.layers:
        return f"KV connectors want the same pages in every layer, and policy {policy.name} names layers; drop layers"
    return None


def _check_files(transfer: Any, tensor_parallel_size: int) -> None:
    if tensor_parallel_size > 1:
        raise UnsupportedError(
            "vLLM's ExampleConnector gives the files of all ranks one name; drop --tensor-parallel-size"
        )
    if not storage_path(transfer):
        raise UnsupportedError(
            f"ExampleConnector needs a folder of its own; add {STORAGE_KEY} to kv_connector_extra_config of "
            "--kv-transfer-config"
        )


def storage_path(transfer: Any) -> str | None:
    """The folder whose files a connector shares with other engines; None: it has none."""
    if asked_connector(transfer) != "ExampleConnector":
        return None
    return entry_of(entry_of(transfer, "kv_connector_extra_config"), STORAGE_KEY) or None


class Identity(NamedTuple):
    """What two engines must have in common to read each other's pages.

    Attributes:
        policy: its name, for messages.
        content: SHA-256 of everything that the policy sets.
        calibration: SHA-256 of its file, or "".
        model: fingerprint of the weights' shape and of a sample of them.
        pages: bytes of a block, its tokens, and the dtype of dense slots.
    """

    policy: str
    content: str
    calibration: str
    model: str
    pages: str

    @classmethod
    def of(cls, policy: str, content: Mapping[str, Any], calibration: str, model: str, pages: str) -> Identity:
        """Of a policy's content as `policy_content` gives it; its name and its prose do not count."""
        counted = {name: value for name, value in content.items() if name not in ("name", "summary", "paper")}
        digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
        return cls(policy, digest, calibration, model, pages)

    def difference(self, other: Any) -> str | None:
        """What of `other`, a mapping, is another's, in words; None: nothing."""
        theirs = other if isinstance(other, Mapping) else {}
        if theirs.get("content") != self.content:
            return f"policy {theirs.get('policy', 'none of kvserve')!s:.80}, not {self.policy} as it is here"
        for name in ("calibration", "model", "pages"):
            if theirs.get(name) != getattr(self, name):
                return f"another {name}: {theirs.get(name)!s:.80}, here {getattr(self, name)!s:.80}"
        return None

    def check_remote_blocks(self, params: Any) -> None:
        """Refuse a request that names blocks of an engine with other pages.

        Args:
            params: its kv_transfer_params.

        Raises:
            ValueError: saying whose they are.
        """
        if not isinstance(params, Mapping) or not params.get("remote_block_ids"):
            return
        difference = self.difference(params.get(PARAMS_KEY))
        if difference:
            raise ValueError(
                f"kv_transfer_params names blocks of {difference}; serve both engines with the same policy and model"
            )
