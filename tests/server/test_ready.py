"""GET /ready against engines that answer, hang, sleep and die: it always answers, and in time."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

from kvserve.engine import endpoint
from kvserve.engine.endpoint import ReadyEndpoint
from kvserve.engine.liveness import while_alive
from tests.cases.server_cases import server_process

CALLS = ("check_health", "is_sleeping", "generate")


class Engine:
    """What /ready asks of vLLM's `EngineClient`; a call named in `stuck` never comes back, as of a dead engine."""

    def __init__(self, *stuck: str, asleep: bool = False) -> None:
        self.stuck, self.asleep, self.dead = stuck, asleep, False
        self.calls: list[str] = []

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.stuck:
            await asyncio.Event().wait()

    async def check_health(self) -> None:
        await self._call("check_health")
        if self.dead:
            raise RuntimeError("the engine core is gone")

    async def is_sleeping(self) -> bool:
        await self._call("is_sleeping")
        return self.asleep

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[None]:
        await self._call("generate")
        yield


def with_ready(engine: Engine, test: Callable[[Callable[[], Awaitable[httpx.Response]]], Awaitable[None]]) -> None:
    """Run `test`, which gets a function that asks for /ready over ASGI."""

    async def run() -> None:
        ready, app = ReadyEndpoint(), FastAPI()
        ready.attach_router(app)
        await ready.init_state(engine, app.state, None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ready") as client:
            await test(lambda: client.get("/ready"))

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(endpoint, "PROBE_TIMEOUT_SECONDS", 0.5)
    return 0.5


def test_an_engine_that_has_answered_once_is_not_made_to_generate_again() -> None:
    engine = Engine()

    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        assert [(await ready()).status_code for _ in range(3)] == [200, 200, 200]

    with_ready(engine, test)
    assert engine.calls.count("generate") == 1 and engine.calls.count("is_sleeping") == 3


def test_a_sleeping_engine_is_not_ready() -> None:
    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        answer = await ready()
        assert (answer.status_code, answer.text) == (503, "the engine is asleep")

    with_ready(Engine(asleep=True), test)


@pytest.mark.parametrize("stuck", CALLS)
def test_whatever_call_hangs_ready_says_so_after_its_timeout(stuck: str, short_timeout: float) -> None:
    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        start = time.monotonic()
        answer = await ready()
        assert (answer.status_code, answer.text) == (503, "the engine has not answered for 0.5 seconds")
        assert time.monotonic() - start < 10 * short_timeout

    with_ready(Engine(stuck), test)


@pytest.mark.parametrize("stuck", CALLS)
def test_probes_at_the_same_time_share_one_question(stuck: str, short_timeout: float) -> None:
    """Ten of them end when the first one does, not one timeout after the other."""
    engine = Engine(stuck)

    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        start = time.monotonic()
        answers = await asyncio.gather(*(ready() for _ in range(10)))
        assert {answer.status_code for answer in answers} == {503}
        assert time.monotonic() - start < 4 * short_timeout

    with_ready(engine, test)
    assert engine.calls.count(stuck) == 1


def test_a_client_that_goes_away_leaves_the_answer_to_the_others() -> None:
    engine = Engine("generate")

    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        first = asyncio.ensure_future(ready())
        second = asyncio.ensure_future(ready())
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        assert not second.done()
        engine.dead = True
        assert (await second).status_code == 503

    with_ready(engine, test)


@pytest.mark.parametrize("stuck", ["is_sleeping", "generate"])
def test_a_probe_in_flight_ends_at_once_when_the_engine_dies(stuck: str) -> None:
    engine = Engine(stuck)

    async def test(ready: Callable[[], Awaitable[httpx.Response]]) -> None:
        probe = asyncio.ensure_future(ready())
        await asyncio.sleep(0.1)
        engine.dead, start = True, time.monotonic()
        answer = await probe
        assert answer.status_code == 503 and "the engine core is gone" in answer.text
        assert time.monotonic() - start < 2
        assert (await ready()).status_code == 503

    with_ready(engine, test)


def test_what_waits_for_a_dead_engine_ends_with_its_error() -> None:
    """As the self-test does at the start of a server."""
    engine = Engine("is_sleeping")

    async def run() -> None:
        waiting = asyncio.ensure_future(while_alive(engine, engine.is_sleeping()))
        await asyncio.sleep(0.1)
        engine.dead = True
        with pytest.raises(RuntimeError, match="the engine core is gone"):
            await waiting

    asyncio.run(asyncio.wait_for(run(), 10))


def engine_core_of(server: subprocess.Popen[bytes]) -> psutil.Process:
    (core,) = [child for child in psutil.Process(server.pid).children() if "EngineCore" in " ".join(child.cmdline())]
    return core


@pytest.mark.server
@pytest.mark.slow
def test_a_server_whose_engine_is_killed_says_503_and_ends_with_a_code_that_says_failure() -> None:
    with server_process("int8", 64_000_000, "--no-self-test") as (url, process), ThreadPoolExecutor(4) as pool:
        core = engine_core_of(process)
        core.send_signal(signal.SIGSTOP)  # so that the probes are under way when it dies
        probes = [pool.submit(httpx.get, f"{url}/ready", timeout=60) for _ in range(4)]
        time.sleep(2)
        assert not any(probe.done() for probe in probes)
        core.kill()
        killed = time.monotonic()
        assert {probe.result(20).status_code for probe in probes} == {503}
        assert time.monotonic() - killed < 10
        assert process.wait(30) == 1


@pytest.mark.server
@pytest.mark.slow
def test_a_server_that_is_stopped_while_its_engine_hangs_ends() -> None:
    with server_process("int8", 64_000_000, "--no-self-test") as (url, process), ThreadPoolExecutor(1) as pool:
        core = engine_core_of(process)
        core.send_signal(signal.SIGSTOP)
        probe = pool.submit(httpx.get, f"{url}/ready", timeout=60)
        time.sleep(2)
        process.terminate()
        process.wait(45)
        assert probe.exception(20) is not None or probe.result().status_code == 503
        assert not core.is_running()
