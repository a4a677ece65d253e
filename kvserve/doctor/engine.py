"""The engine of one policy in a child process, with the probe in its workers.

Seams: those of kvserve/evals/engine.py, and `LLM(worker_extension_cls=...)`, `LLM.collective_rpc`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvserve.evals.engine import EvalHost, Request
from kvserve.measuring.engines import EngineConfig
from kvserve.probe.request import num_queries, plan_test

HOST = "kvserve.doctor.engine:DoctorHost"


class DoctorHost(EvalHost):
    """The child's side."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        from kvserve.engine.self_test import EXTENSION_PATH

        super().__init__(name, config, worker_extension_cls=EXTENSION_PATH)

    def self_test(self, tokens: list[int]) -> dict[str, Any]:
        """The self-test's requests on these tokens: what the workers' probes saw, and how many queries there were."""
        from vllm import SamplingParams

        from kvserve.engine.settings import EngineSettings

        config = self.llm.llm_engine.vllm_config
        settings = EngineSettings.from_vllm_config(config)
        assert settings is not None
        plan = plan_test(settings.layout(config.model_config.get_head_size()), config.model_config.max_model_len)
        self.llm.collective_rpc("kvserve_probe_start")
        num_tokens = 0
        for length, params in plan.requests():
            self.llm.collective_rpc("kvserve_probe_begin")
            prompt: Any = {"prompt_token_ids": tokens[:length]}
            (output,) = self.llm.generate([prompt], SamplingParams(**params), use_tqdm=False)
            num_tokens += num_queries(length, output.num_cached_tokens, params["max_tokens"])
        return {"ranks": self.llm.collective_rpc("kvserve_probe_finish"), "num_tokens": num_tokens}

    def record(self, context: list[int], forced: list[int], path: Path, dense_layers: list[int]) -> None:
        """Write the distributions before each forced token, with some layers answering like a dense cache."""
        self.llm.collective_rpc("kvserve_probe_start")
        try:
            self.llm.collective_rpc("kvserve_probe_begin", args=(dense_layers,))
            self.complete([Request(context, forced, record=path)])
        finally:
            self.llm.collective_rpc("kvserve_probe_finish")
