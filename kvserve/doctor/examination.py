"""What the doctor finds out about one policy: every layer's distances, and what they do to the next token."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvserve.evals.distances import distances
from kvserve.evals.text import Window
from kvserve.probe.distances import ProbeReport, complaints

# A server whose next-token distributions are further from the dense ones, on average, writes another text: the dense
# cache's most likely tokens have lost 7/8 of their odds.
KL_LIMIT_NATS = 2.0


@dataclass(frozen=True)
class EndToEnd:
    """Next-token distributions against those of a dense cache, on the same tokens.

    Attributes:
        kl: mean Kullback-Leibler divergence, nats.
        agreement: share of positions with the same most likely token.
        positions: how many were compared.
    """

    kl: float
    agreement: float
    positions: int


@dataclass
class Examination:
    """Findings of one policy.

    Attributes:
        alone: by layer, the mean KL where only this layer uses the policy and all others answer densely.
    """

    policy: str
    report: ProbeReport
    complaints: list[str]
    end_to_end: EndToEnd
    alone: dict[int, float] = field(default_factory=dict)

    @property
    def is_fit(self) -> bool:
        """Whether a server may serve with it."""
        return not self.complaints

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"fit": self.is_fit}


class Examiner:
    """Runs one engine's measurements; the distributions of the dense cache are recorded once.

    Args:
        windows: contexts with what is forced behind them.
        prompt: tokens of the self-test.
        say: is told what is being done.
    """

    def __init__(self, windows: Sequence[Window], prompt: list[int], say: Callable[[str], None]) -> None:
        self.windows, self.prompt, self.say = windows, prompt, say
        self._folder = tempfile.TemporaryDirectory(prefix="kvserve-doctor-")
        self._dense: list[np.ndarray] = []

    def examine(self, engine: Any, policy: str, num_alone: int = 0) -> Examination:
        """The probe's report, the distance end to end, and the layers that lose most, each alone.

        Args:
            engine: a DoctorHost behind a proxy.
            num_alone: how many layers are tried alone; the first and the last one are always among them.
        """
        self.say(f"{policy}: self-test")
        seen = engine.call("self_test", tokens=self.prompt)
        report = ProbeReport.of_ranks(seen["ranks"])
        layers = [layer.layer for layer in report.layers]
        if not self._dense:
            self.say(f"{policy}: distributions of a dense cache")
            self._dense = [self._record(engine, window, layers) for window in self.windows]
        self.say(f"{policy}: its own distributions")
        found = self._compare(engine, self.windows, [])
        examination = Examination(policy, report, complaints(report, seen["num_tokens"]), found)
        if not found.kl <= KL_LIMIT_NATS:
            examination.complaints.append(
                f"next-token distributions are {found.kl:.2g} nats from the dense cache's on average (limit "
                f"{KL_LIMIT_NATS:g}): another text"
            )
        for layer in suspects(report, num_alone):
            self.say(f"{policy}: layer {layer} alone")
            others = [other for other in layers if other != layer]
            examination.alone[layer] = self._compare(engine, self.windows[:1], others).kl
        return examination

    def _compare(self, engine: Any, windows: Sequence[Window], dense_layers: list[int]) -> EndToEnd:
        kl: list[float] = []
        agrees: list[int] = []
        for window, dense in zip(windows, self._dense, strict=False):
            found = self._record(engine, window, dense_layers)
            # The first token still comes from the whole prompt.
            distance = distances(dense[1:], found[1:], window.continuation[1:])
            kl, agrees = kl + distance.kl, agrees + distance.agrees
        return EndToEnd(float(np.mean(kl)), float(np.mean(agrees)), len(kl))

    def _record(self, engine: Any, window: Window, dense_layers: list[int]) -> np.ndarray:
        path = Path(self._folder.name) / "distributions.npy"
        path.unlink(missing_ok=True)
        engine.call("record", context=window.context, forced=window.continuation, path=path, dense_layers=dense_layers)
        return np.load(path)


def suspects(report: ProbeReport, count: int) -> list[int]:
    """The layers whose answers are off most, and the first and the last one: the usual suspects; ascending."""
    if count < 1:
        return []
    order = sorted(report.layers, key=lambda layer: -layer.cache)
    ends = {report.layers[0].layer, report.layers[-1].layer}
    return sorted(ends | {layer.layer for layer in order[:count]})
