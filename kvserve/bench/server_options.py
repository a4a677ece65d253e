"""What the server suite sends: its sizes, its loads and their options."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

from kvserve.arguments.parser import positive, whole


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        request_rate: arrivals per second, a Poisson process; None: all at once.
        max_concurrency: requests under way at most, the others wait in the client; None: no limit.
    """

    name: str
    request_rate: float | None
    max_concurrency: int | None


@dataclass(frozen=True)
class ServerSizes:
    """What the server suite sends, and what counts as good.

    Attributes:
        requests: of one load.
        input_tokens, output_tokens: of a request, on average.
        length_spread: lengths are uniform within this part of the average on both sides.
        request_rate: of the Poisson load, requests per second.
        max_concurrency: requests that the closed loop keeps under way.
        kv_bytes: the KV pool of every server.
        max_num_seqs, max_num_batched_tokens: vLLM's defaults for a server on one CPU.
        goodput_ttft_ms, goodput_tpot_ms: limits of a good request. 10 s is how long people keep their attention on a
            dialogue (Nielsen, Usability Engineering, 1993), 200 ms a token is about the speed of reading.
    """

    requests: int = 32
    input_tokens: int = 256
    output_tokens: int = 64
    length_spread: float = 0.5
    request_rate: float = 0.3
    max_concurrency: int = 16
    kv_bytes: int = 48 * 2**20
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    goodput_ttft_ms: float = 10_000.0
    goodput_tpot_ms: float = 200.0

    @property
    def longest_tokens(self) -> int:
        """Prompt and answer of the longest request, and a few tokens more: prompts are random text."""
        longest = [math.ceil(mean * (1 + self.length_spread)) for mean in (self.input_tokens, self.output_tokens)]
        return sum(longest) + 32

    @property
    def scheduler_options(self) -> dict[str, int]:
        """vLLM options that are the same for all servers."""
        return {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}

    def loads(self) -> list[Load]:
        """The loads of the suite."""
        return [
            Load("closed loop", None, self.max_concurrency),
            Load("Poisson", self.request_rate, None),
        ]


QUICK = ServerSizes(
    requests=6, input_tokens=128, output_tokens=32, request_rate=1.0, max_concurrency=4, kv_bytes=32 * 2**20
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The suite's options; None where one is not given."""
    group = parser.add_argument_group("server suite")
    add = group.add_argument
    add("--requests", type=whole(1), help=f"of one load; default: {_defaults('requests')}")
    add("--input-tokens", type=whole(1), help=f"of a prompt, on average; default: {_defaults('input_tokens')}")
    add("--output-tokens", type=whole(4), help=f"of an answer, on average; default: {_defaults('output_tokens')}")
    add("--request-rate", type=positive, help=f"Poisson arrivals per second; default: {_defaults('request_rate')}")
    add("--max-concurrency", type=whole(1), help=f"of the closed loop; default: {_defaults('max_concurrency')}")
    add("--kv-bytes", type=whole(1), help=f"KV pool of every server; default: {_defaults('kv_bytes')}")
    limit = "limit of a good request; default: {:.0f}"
    add("--goodput-ttft-ms", type=positive, help=limit.format(ServerSizes.goodput_ttft_ms))
    add("--goodput-tpot-ms", type=positive, help=limit.format(ServerSizes.goodput_tpot_ms))


def server_sizes(given: argparse.Namespace, quick: bool) -> ServerSizes:
    """The sizes that the options ask for.

    Raises:
        ValueError: options that contradict each other, in one sentence.
    """
    sizes = QUICK if quick else ServerSizes()
    changed = {name: getattr(given, name, None) for name in sizes.__dataclass_fields__}
    sizes = replace(sizes, **{name: value for name, value in changed.items() if value is not None})
    if sizes.max_concurrency > sizes.requests:
        raise ValueError(
            f"--max-concurrency {sizes.max_concurrency} needs at least as many --requests, there are {sizes.requests}"
        )
    return sizes


def _defaults(field: str) -> str:
    return f"{getattr(ServerSizes(), field)}, with --quick {getattr(QUICK, field)}"
