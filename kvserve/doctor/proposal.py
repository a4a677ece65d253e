"""What would help: a policy like the one that was examined, with more bits or more tokens where they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvserve.doctor.examination import Examination
from kvserve.policies.base import Eviction, Policy
from kvserve.policies.loading import load_policy, policy_content
from kvserve.policies.registry import policy_names
from kvserve.probe.distances import layers_text

# Codecs of shipped policies, from the cheapest to the one that loses nothing but rounding.
LADDER = ("kivi-2bit", "boost-2bit", "kivi-4bit", "int8", "dense")
SHARE_OF_LAYERS = 10  # one layer in so many gets more
WORTH_MORE = 0.1  # a layer that costs less than this part of the worst one's cost gets nothing


class Proposal(NamedTuple):
    """A policy, and in words what it changes."""

    policy: Policy
    change: str


def propose(policy: Policy, examination: Examination) -> Proposal | None:
    """The smallest change that this version of kvserve can make where the loss is; None: nothing is left to add."""
    layers = worst_layers(examination)
    content = policy_content(policy)
    if policy.eviction and loses_by_evicting(examination):
        num_layers = sum(layer.target is None for layer in examination.report.layers)
        return _evict_less(content, policy.eviction, layers, num_layers)
    codec = next_codec(policy)
    if codec is None:
        return None
    if policy.eviction is None and "layers" in Policy.model_fields:
        return _single_layers(content, layers, "int8" if codec != "dense" else codec)
    changed = policy_content(load_policy(codec))
    for key in ("key", "value", "dense_pages", "tile_tokens", "sink_tokens"):
        content.pop(key, None)
        if key in changed:
            content[key] = changed[key]
    return _proposal(content, f"the codec of {codec} for all layers")


def worst_layers(examination: Examination) -> list[int]:
    """One layer in ten: those that cost most alone, or where none was tried alone, those that are off most.

    In the place of a layer that reads another's cache stands the other one, of which a policy can say something.
    """
    report = examination.report
    cost = examination.alone or {layer.layer: layer.cache for layer in report.layers}
    count = max(len(report.layers) // SHARE_OF_LAYERS, 1)
    worst = sorted(cost, key=lambda layer: -cost[layer])[:count]
    targets = {layer.layer: layer.target for layer in report.layers if layer.target is not None}
    return sorted({targets.get(layer, layer) for layer in worst if cost[layer] >= WORTH_MORE * cost[worst[0]]})


def loses_by_evicting(examination: Examination) -> bool:
    """Whether the tokens that are gone cost more than the bits that are."""
    worst = examination.report.worst("cache")
    return worst.cache**2 > 2 * worst.codec**2  # squares of independent errors add up


def next_codec(policy: Policy) -> str | None:
    """The shipped codec that follows the policy's own, or its bits', on the ladder."""
    if policy.key is None or policy.value is None:
        return None
    known = [name for name in LADDER if name in policy_names()]
    own = [name for name in known if (codec := load_policy(name)).key == policy.key and codec.value == policy.value]
    bits = policy.code_bits
    found = own[0] if own else "int8" if bits >= 8 else "kivi-4bit" if bits >= 4 else "boost-2bit"
    return known[known.index(found) + 1] if found != known[-1] else None


def write_policy(path: Path, proposal: Proposal) -> None:
    """The proposal as a policy file, with a comment that says what it changes."""
    content = yaml.safe_dump(policy_content(proposal.policy), sort_keys=False)
    path.write_text(f"# Written by kvserve doctor: {proposal.change}.\n{content}", encoding="utf-8")


def _single_layers(content: dict[str, Any], layers: list[int], codec: str) -> Proposal:
    """Only these layers with the codec of a shipped policy."""
    own = policy_content(load_policy(codec))
    parts = {key: own[key] for key in ("key", "value") if key in own}
    content["layers"] = {**content.get("layers", {}), **{str(layer): parts for layer in layers}}
    return _proposal(content, f"{layers_text(layers)} as {codec}")


def _evict_less(content: dict[str, Any], eviction: Eviction, layers: list[int], num_layers: int) -> Proposal:
    """Spare the worst layers as long as they leave half of the budget to the others, else keep twice as much."""
    spared = sorted({*eviction.spared_layers(num_layers), *layers})
    if eviction.rate and eviction.rate * len(spared) <= num_layers / 2:
        content["eviction"]["spare_layers"] = spared
        return _proposal(content, f"{layers_text(spared)} keep all tokens")
    if eviction.rate:
        rate = max(eviction.rate / 2, 1.0)
        content["eviction"]["rate"] = rate
        return _proposal(content, f"rate {rate:g} instead of {eviction.rate:g}")
    assert eviction.max_tokens is not None
    content["eviction"]["max_tokens"] = 2 * eviction.max_tokens
    return _proposal(content, f"{2 * eviction.max_tokens} tokens instead of {eviction.max_tokens}")


def _proposal(content: dict[str, Any], change: str) -> Proposal:
    name = content["name"]
    content["name"] = name if name.endswith("-doctored") else f"{name}-doctored"
    return Proposal(Policy.model_validate(content), change)
