"""One row stands for everything that is gone."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvserve.retention.base import HeldTokens, Retention, Rows, others


class Compensate(Retention):
    """The chosen tokens but the lowest, and in its place the mean of all tokens that go (RazorAttention, arXiv
    2407.15891, section 3.3).

    The mean key and value of N tokens enter the softmax N times: exp(q k) is weighed by N, so N's log is added to the
    logit. A compensation row of an earlier cut counts as the tokens that it stands for, and goes into the new one.
    """

    has_mass: ClassVar[bool] = True
    reads_evicted: ClassVar[bool] = True

    name: Literal["compensate"] = "compensate"

    def keep(self, held: HeldTokens, chosen: torch.Tensor) -> Rows:
        count = len(held.scores)
        if len(chosen) in (0, count):
            return Rows(held.keys[chosen], held.values[chosen], held.log_mass[chosen], chosen)
        single = chosen[held.log_mass[chosen] == 0]
        if len(single) == len(chosen):
            single = single[single != chosen[held.scores[chosen].argmin()]]
        gone = others(count, single)
        mass = held.log_mass[gone].exp()
        share = (mass / mass.sum())[:, None]
        mean_key, mean_value = ((rows[gone] * share).sum(0, keepdim=True) for rows in (held.keys, held.values))
        total = torch.cat([mass.sum().log()[None], torch.zeros(len(single), device=mass.device)])
        return Rows(
            torch.cat([mean_key, held.keys[single]]), torch.cat([mean_value, held.values[single]]), total,
            torch.cat([gone[:1], single]),
        )  # fmt: skip
