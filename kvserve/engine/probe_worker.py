"""Puts the probe (kvserve/probe/probe.py) on the attention layers of a worker, and takes it off again.

Seams: `--worker-extension-cls`, whose methods `collective_rpc` calls in every worker, and
`CompilationConfig.static_forward_context`, where vLLM keeps the attention layers by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvserve.engine.backend import KvserveImpl
from kvserve.engine.own_layers import check_own_layers
from kvserve.engine.stats import worker_log
from kvserve.errors import UnsupportedError
from kvserve.probe.probe import LayerProbe, Probe

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ProbeWorker:
    """Mixed into vLLM's worker class."""

    vllm_config: VllmConfig

    def kvserve_check_layers(self) -> str | None:
        """Why the model cannot be served: layers that are not kvserve's. Where none is, no other code would see it."""
        try:
            check_own_layers(self.vllm_config, KvserveImpl)
        except UnsupportedError as error:
            return str(error)
        return None

    def kvserve_probe_start(self) -> None:
        """Watch every layer from the next step on; a probe that is there is replaced."""
        probes = []
        for layer, impl in kvserve_layers(self.vllm_config):
            impl.probe = LayerProbe(layer, impl.attention, index_of(impl.target, self.vllm_config))
            probes.append(impl.probe)
        worker_log.recorder = Probe(probes)

    def kvserve_probe_begin(self, dense_layers: list[int] | None = None) -> None:
        """The next step begins another request; `dense_layers` answer it like a dense cache."""
        probe = worker_log.recorder
        assert isinstance(probe, Probe), "kvserve_probe_start comes first"
        probe.begin()
        for layer in probe.layers:
            layer.answers_densely = layer.layer in (dense_layers or ())

    def kvserve_probe_finish(self) -> dict[str, Any]:
        """Take the probe off; what it saw, as of `ProbeReport.to_dict`."""
        probe, worker_log.recorder = worker_log.recorder, None
        for _, impl in kvserve_layers(self.vllm_config):
            impl.probe = None
        assert isinstance(probe, Probe), "kvserve_probe_start comes first"
        return probe.report().to_dict()


def kvserve_layers(config: VllmConfig) -> list[tuple[int, KvserveImpl]]:
    """This worker's attention layers with their index in the model, ascending; also those that read another's cache."""
    from vllm.model_executor.models.utils import extract_layer_index

    context = config.compilation_config.static_forward_context
    found = [(name, getattr(layer, "impl", None)) for name, layer in context.items()]
    layers = [(extract_layer_index(name), impl) for name, impl in found if isinstance(impl, KvserveImpl)]
    return sorted(layers, key=lambda layer: layer[0])


def owners(config: VllmConfig) -> list[tuple[int, KvserveImpl]]:
    """Those of `kvserve_layers` that have a KV cache of their own."""
    return [(layer, impl) for layer, impl in kvserve_layers(config) if impl.target is None]


def index_of(wanted: KvserveImpl | None, config: VllmConfig) -> int | None:
    """The index in the model of one of `kvserve_layers`; None of none."""
    return next((layer for layer, impl in kvserve_layers(config) if impl is wanted), None)
