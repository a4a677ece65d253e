"""vLLM's CPU worker, with random numbers that prompts in several steps do not disturb.

Seam: `--worker-cls`, and `Worker.sample_tokens`, in which a step samples.

A step that ends within a prompt samples, too, and throws the token away. For a request with a seed vLLM then sets its
generator back by the numbers that it drew, through `get_offset` and `set_offset` (GPUModelRunner._bookkeeping_sync).
Generators of the CPU have no offset: the worker dies, with any policy and without one. So such a row draws from the
common generator here, and its own stays as it is: the answer then depends on the seed alone, not on the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class SeededCpuWorker(CPUWorker):
    """CPUWorker for requests with a seed, however their prompts are cut."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_v2_model_runner:  # has no generators
            return super().sample_tokens(*args, **kwargs)
        with kept_generators(self.model_runner):
            return super().sample_tokens(*args, **kwargs)


@contextmanager
def kept_generators(runner: GPUModelRunner) -> Iterator[None]:
    """Leave out the generators of rows whose token is thrown away."""
    generators = runner.input_batch.generators
    discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    kept = {row: generators.pop(row) for row in list(generators) if discarded[row]}
    try:
        yield
    finally:
        generators.update(kept)
