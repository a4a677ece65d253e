"""All engines behind one API server: with data parallelism there are several.

Seams: `AsyncMPClient.core_engines` and `call_utility_all_async`, and `data_parallel_rank` of `AsyncLLM.generate`.
vLLM's own `collective_rpc` asks every engine, and returns what the workers of the first one say.
"""

from __future__ import annotations

from typing import Any


def num_engines(engine: Any) -> int:
    """Engines that the server divides its requests among."""
    return len(getattr(getattr(engine, "engine_core", None), "core_engines", ())) or 1


def each_engine(engine: Any) -> list[dict[str, int]]:
    """The arguments of `generate` by which a request goes to each engine; the only one needs none."""
    count = num_engines(engine)
    return [{}] if count == 1 else [{"data_parallel_rank": rank} for rank in range(count)]


async def on_all_workers(engine: Any, method: str) -> list[list[Any]]:
    """What every worker of every engine returns, by engine."""
    if num_engines(engine) == 1:
        return [await engine.collective_rpc(method)]
    found: list[list[Any]] = await engine.engine_core.call_utility_all_async("collective_rpc", method, None, (), None)
    return found
