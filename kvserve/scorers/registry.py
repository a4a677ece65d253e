"""Scorers by the name that YAML files use."""

from __future__ import annotations

from kvserve.part_registry import PartRegistry
from kvserve.scorers.accumulated_attention import AccumulatedAttention
from kvserve.scorers.base import Scorer
from kvserve.scorers.expected_attention import ExpectedAttention
from kvserve.scorers.key_diff import KeyDiff
from kvserve.scorers.key_norm import KeyNorm
from kvserve.scorers.position import Position
from kvserve.scorers.random import Random
from kvserve.scorers.window_attention import WindowAttention

SCORERS: PartRegistry[Scorer] = PartRegistry(
    "scorer", Scorer, (AccumulatedAttention, ExpectedAttention, KeyDiff, KeyNorm, Position, Random, WindowAttention)
)
scorer_class = SCORERS.class_of
make_scorer = SCORERS.make
