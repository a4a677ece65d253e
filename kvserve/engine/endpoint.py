"""GET /ready: 200 only when the model can answer. Also where requests' own limits are checked (request_limits.py),
and where the self-test begins (self_test.py).

Seam: the `vllm.endpoint_plugins` entry point group (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`).
vLLM's /health says that the engine is alive; /ready has in addition seen it produce a token, each engine one where
there are several.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Response

from kvserve.connectors import Identity, is_wrapped
from kvserve.engine import lifetime
from kvserve.engine.engines import each_engine, on_all_workers
from kvserve.engine.liveness import while_alive
from kvserve.engine.metrics import publish_self_test
from kvserve.engine.own_requests import own_request_id
from kvserve.engine.request_check import RequestCheck
from kvserve.engine.request_limits import RequestLimits
from kvserve.engine.self_test import EXTENSION_PATH, SelfTestError, is_requested, run_self_test, why_not
from kvserve.engine.settings import EngineSettings
from kvserve.pages.layout import PageLayout
from kvserve.policies.base import Policy

PROBE_TIMEOUT_SECONDS = 60.0


class ReadyEndpoint:
    """Adds /ready to vLLM's API server."""

    name = "kvserve"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.layout: PageLayout | None = None
        self.identity: Identity | None = None  # where a KV connector moves pages
        self.max_model_len = 0
        self.usable_blocks: int | None = None
        self.serving_render: Any = None
        self._engine: Any = None
        self._has_answered = False
        self._probe: asyncio.Task[str | None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Register the route and the check of requests."""
        app.add_api_route("/ready", self._ready, methods=["GET"], include_in_schema=True)
        app.add_middleware(RequestLimits, state=self)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Remember the engine to ask, and its policy; count its layers; run the self-test where it was asked for.

        Raises:
            SelfTestError: the server must not serve; vLLM then ends it before it answers.
        """
        self._engine = engine_client
        config = getattr(engine_client, "vllm_config", None)
        settings = EngineSettings.from_vllm_config(config) if config is not None else None
        if config is not None and settings is not None:
            self.layout = settings.layout(config.model_config.get_head_size())
            self.max_model_len = config.model_config.max_model_len
            if config.parallel_config.data_parallel_size == 1:  # else vLLM knows the sum over all engines
                self.usable_blocks = (config.cache_config.num_gpu_blocks or 1) - 1  # less the null block
                if groups := settings.window_groups(config.model_config.get_head_size()):
                    self.usable_blocks -= groups.most_blocks(self.max_model_len, config.max_in_flight_tokens)
                if settings.drafts:
                    self.usable_blocks -= settings.drafts.blocks_for(self.max_model_len, self.max_model_len)
            self.serving_render = getattr(state, "serving_render", None)
            if is_wrapped(config.kv_transfer_config):
                self.identity = settings.identity(config.model_config)
            self.policy = settings.policy
            RequestCheck.server = self
            if config.parallel_config.worker_extension_cls == EXTENSION_PATH:
                found = await while_alive(engine_client, on_all_workers(engine_client, "kvserve_check_layers"))
                for reason in (reason for of_engine in found for reason in of_engine if reason):
                    raise SelfTestError(reason)
            if is_requested(config) and why_not(config) is None:
                reports = await while_alive(engine_client, run_self_test(engine_client, settings))
                for index, report in enumerate(reports):
                    publish_self_test(config, report, index)
        if engine_client is not None:
            lifetime.begin(engine_client, state, args)

    async def _ready(self) -> Response:
        """200 with an empty body, or 503 with the reason."""
        reason = await self._why_not_ready()
        return Response(status_code=200) if reason is None else Response(reason, status_code=503)

    async def _why_not_ready(self) -> str | None:
        """The reason, or None; whoever asks while the engine is being asked gets that answer."""
        if self._engine is None:
            return "the engine is not attached yet"
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask_engine())
        return await asyncio.shield(self._probe)  # one who goes away leaves it to the others

    async def _ask_engine(self) -> str | None:
        try:
            return await while_alive(self._engine, self._answer(), PROBE_TIMEOUT_SECONDS)
        except TimeoutError:
            return f"the engine has not answered for {PROBE_TIMEOUT_SECONDS:g} seconds"
        except Exception as error:  # whatever stops the engine from answering is the reason it is not ready
            return f"the engine does not answer: {type(error).__name__}: {error}"

    async def _answer(self) -> str | None:
        if await self._engine.is_sleeping():
            return "the engine is asleep"
        if not self._has_answered:
            for where in each_engine(self._engine):
                await self._generate_one_token(where)
            self._has_answered = True
        return None

    async def _generate_one_token(self, where: dict[str, int]) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(max_tokens=1, temperature=0.0)
        prompt = tokens_input([1])
        async for _ in self._engine.generate(prompt, params, request_id=own_request_id("ready"), **where):
            pass
