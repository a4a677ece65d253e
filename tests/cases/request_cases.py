"""Bodies with arguments of kvserve's, good and bad, in every spelling that JSON allows; and what each asks for.

`wanted` is this file's own reading of the documentation, independent of kvserve/policies/limits.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

RATE, MAX_TOKENS, OFF = "kvserve_rate", "kvserve_max_tokens", "kvserve_off"
MAX_MODEL_LEN = 2048
BAD = object()

EDGES = [
    0, 1, 2, 4, 64, 300, 512, 1024, 1025, 2048, 2049, 2**31, 2**63, 2**64, 2**70, 10**400, -1, -(2**70),
    0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 4.0, 512.0, 512.5, 1024.0, 1e16, 1e308, -1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"), True, False, None, "", "4", "four", "Infinity", "\ud800", "x" * 500,
    [], [4], {}, {"a": 1},
]  # fmt: skip
NAMES = [RATE, MAX_TOKENS, OFF, "kvserve_ratio", "kvserve_", "kvserve_\ud800", "kvserve_" + "x" * 300, "kvserve_Rate"]

values = st.one_of(
    st.sampled_from(EDGES),
    st.integers(),
    st.integers(1, MAX_MODEL_LEN),
    st.floats(),
    st.floats(1, 1024),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
)
names = st.one_of(st.sampled_from([RATE, MAX_TOKENS, OFF]), st.sampled_from(NAMES), st.text(max_size=12))
arguments = st.dictionaries(names, values, max_size=3)


def wanted(arguments: dict[str, Any]) -> Any:
    """(rate, max_tokens, off) that the arguments ask for, None where not given; BAD: to be refused."""
    own = {name: value for name, value in arguments.items() if name.startswith("kvserve_")}
    if not own.keys() <= {RATE, MAX_TOKENS, OFF}:
        return BAD
    numbers = {name: value for name, value in own.items() if type(value) in (int, float)}
    rate, tokens = numbers.get(RATE), numbers.get(MAX_TOKENS)
    if (RATE in own and rate is None) or (MAX_TOKENS in own and tokens is None):
        return BAD
    if rate is not None and not 1 <= rate <= 1024:
        return BAD
    if tokens is not None and tokens not in range(1, MAX_MODEL_LEN + 1):
        return BAD
    off = own.get(OFF, False)
    if type(off) not in (bool, int, float) or off not in (0, 1):
        return BAD
    if (rate is not None) + (tokens is not None) + (off == 1) > 1:
        return BAD
    return rate, tokens, off == 1


@dataclass(frozen=True)
class Spelling:
    """How a JSON text is written.

    Attributes:
        encoding: a Unicode encoding that json.loads detects.
        escapes: whether names begin with an escape, as in \\u006bvserve_rate.
        twice: whether each argument stands there twice, first with another value; the last one counts.
    """

    encoding: str = "utf-8"
    escapes: bool = False
    twice: bool = False

    def write(self, body: dict[str, Any]) -> bytes:
        text = json.dumps(self._doubled(body) if self.twice else body)
        if self.twice:
            text = text.replace("twice\\u0000", "")
        if self.escapes:
            text = text.replace('"kvserve_', '"\\u006bvserve_')
        return text.encode(self.encoding)

    def _doubled(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        doubled: dict[str, Any] = {}
        for name, inner in value.items():
            if name.startswith("kvserve_"):
                doubled["twice\0" + name] = 3
            doubled[name] = self._doubled(inner)
        return doubled


spellings = st.builds(
    Spelling,
    encoding=st.sampled_from(
        ["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
    ),
    escapes=st.booleans(),
    twice=st.booleans(),
)

# Texts that no dictionary of Python's spells; all are to be refused by vLLM or kvserve.
BAD_TEXTS = [
    b'{"vllm_xargs": {"kvserve_max_tokens": ' + b"9" * 5000 + b"}}",
    b'{"vllm_xargs": {"kvserve_rate": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    b'{"vllm_xargs": {"kvserve_rate": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}}",
    b'{"vllm_xargs": {"kvserve_rate": 4',
    b'{"vllm_xargs": {"kvserve_rate": 1e999}}',
    b'{"vllm_xargs": {"kvserve_rate": -Infinity}}',
    b'{"vllm_xargs": {"\\u006b\\u0076serve_max_tokens": Infinity}}',
    b'{"vllm_xargs": ["kvserve_rate", 4]}',
    b'{"vllm_xargs": "kvserve_rate"}',
    b'["kvserve_rate"]',
    b'"kvserve_rate"',
    b"\xff\xfekvserve_rate",
    b"\x00kvserve_rate",
    b'{"vllm_xargs": {"kvserve_rate": 4}}\xff',
    b"kvserve_rate=4",
]


@dataclass(frozen=True)
class BadRequest:
    """One POST that must be answered with HTTP 400."""

    route: str
    body: bytes


def bad_requests(model: str, count: int, evicts: bool) -> list[BadRequest]:
    """`count` different ones: the texts above, and random arguments in every spelling on several routes.

    Args:
        evicts: whether the server's policy does; one that doesn't takes no argument at all.
    """
    found: dict[tuple[str, bytes], None] = {("/v1/completions", text): None for text in BAD_TEXTS}

    @settings(
        max_examples=20 * count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(arguments, spellings, st.sampled_from(sorted(BODIES)))
    def collect(given: dict[str, Any], spelling: Spelling, route: str) -> None:
        names_one = any(name.startswith("kvserve_") for name in given)
        if len(found) < count and (wanted(given) is BAD or (names_one and not evicts)):
            found[route, spelling.write({"model": model} | body_of(route, given))] = None

    collect()
    assert len(found) == count
    return [BadRequest(*key) for key in found]


def body_of(route: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A small request for a route of vLLM's, with arguments where the route reads them."""
    body = BODIES[route]
    if "sampling_params" in body:
        return body | {"sampling_params": body["sampling_params"] | {"extra_args": arguments}}
    return body | {"vllm_xargs": arguments}


TEXT = "The harbour master counted the boats twice that evening, for the storm had come in early. " * 12
MESSAGES = [{"role": "user", "content": TEXT}]
SHORT = {"max_tokens": 3, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, **SHORT},
    "/v1/chat/completions": {"messages": MESSAGES, **SHORT},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], **SHORT},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 3, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, **SHORT},
    "/invocations": {"prompt": TEXT, **SHORT},
    "/inference/v1/generate": {"token_ids": [11 + i for i in range(300)], "sampling_params": SHORT},
}
