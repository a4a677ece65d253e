"""The parts of an evaluation: each is run once for every policy, and kept when it is finished."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvserve.evals.distances import distances
from kvserve.evals.engine import Request
from kvserve.evals.options import TEXT, Options
from kvserve.evals.source import Source
from kvserve.evals.tasks.base import Example, score
from kvserve.evals.tasks.registry import TASKS
from kvserve.evals.text import Window

BATCH = 8  # requests submitted together, in the same groups for every policy
LENGTH_JITTER = 64  # a tile

Advance = Callable[[], None]


class Host(Protocol):
    """What an item needs of an engine: `complete`, see EvalHost."""

    def call(self, method: str, **kwargs: Any) -> Any:
        """Run a method of the host."""


class Item(Protocol):
    """A part of an evaluation; `num_requests` is what the progress bar counts."""

    name: str
    num_requests: int

    def run(self, host: Host, advance: Advance) -> Any:
        """Measure one policy; returns what goes into the result file."""


class TextItem:
    """Distributions along the text, and greedy text, behind the same contexts.

    Args:
        dense: folder for the dense distributions, one file a window; they stay until every policy is done.
    """

    name = TEXT

    def __init__(self, windows: Sequence[Window], num_greedy: int, dense: Path) -> None:
        self.windows, self.num_greedy, self.dense = windows, num_greedy, dense
        self.num_requests = len(windows) * (2 if num_greedy else 1)

    def record_dense(self, host: Host, advance: Advance) -> None:
        """Write the files that are missing, with the dense policy's engine."""
        self.dense.mkdir(parents=True, exist_ok=True)
        for batch in batches(range(len(self.windows))):
            if not all(self._file(index).exists() for index in batch):
                partial = [self._file(index).with_suffix(".partial.npy") for index in batch]
                self._follow(host, batch, partial)
                for index, path in zip(batch, partial, strict=True):
                    path.rename(self._file(index))
            for _ in batch:
                advance()

    def forget_dense(self) -> None:
        """Remove the files."""
        for path in self.dense.glob("*.npy"):
            path.unlink()
        with suppress(OSError):  # not there, or not empty
            self.dense.rmdir()

    def run(self, host: Host, advance: Advance) -> dict[str, Any]:
        found: dict[str, Any] = {"windows": [], "greedy_tokens": []}
        for batch in batches(range(len(self.windows))):
            paths = [self.dense / f"found-{index}.npy" for index in batch]
            self._follow(host, batch, paths)
            for index, path in zip(batch, paths, strict=True):
                found["windows"].append(self._compare(index, path))
                path.unlink()
                advance()
        for batch in batches(self.windows if self.num_greedy else []):
            requests = [Request(window.context, [], free=self.num_greedy, ends=False) for window in batch]
            found["greedy_tokens"] += host.call("complete", requests=requests)
            for _ in batch:
                advance()
        return found

    def _file(self, index: int) -> Path:
        return self.dense / f"dense-{index}.npy"

    def _follow(self, host: Host, batch: Sequence[int], paths: Sequence[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        windows = [self.windows[index] for index in batch]
        requests = [
            Request(window.context, window.continuation, record=path.absolute(), ends=False)
            for window, path in zip(windows, paths, strict=True)
        ]
        host.call("complete", requests=requests)

    def _compare(self, index: int, path: Path) -> dict[str, Any]:
        """From the second token on: the first one still comes from the whole prompt, whatever the policy."""
        dense, found = (np.load(file, mmap_mode="r")[1:] for file in (self._file(index), path))
        return distances(dense, found, self.windows[index].continuation[1:]).to_dict()


@dataclass(frozen=True)
class Question:
    """One request of a task: an example and where its question is."""

    length: int
    depth: float | None
    place: str
    example: Example

    def request(self, answer_tokens: int) -> Request:
        """Inside, the question is part of the prompt; after it, its tokens are forced behind the prompt."""
        context, question = self.example.context, self.example.question
        if self.place == "inside":
            return Request([*context, *question], [], free=answer_tokens)
        return Request(context, question, free=answer_tokens)


class TaskItem:
    """All questions of one task.

    Raises:
        TaskError: a length is too small for it.
    """

    def __init__(self, name: str, source: Source, options: Options) -> None:
        self.name, self.source = name, source
        self.questions = list(_questions(name, source, options))
        self.num_requests = len(self.questions)

    def run(self, host: Host, advance: Advance) -> list[dict[str, Any]]:
        answer_tokens, found = TASKS[self.name].answer_tokens, []
        for batch in batches(self.questions):
            outputs = host.call("complete", requests=[question.request(answer_tokens) for question in batch])
            for question, output in zip(batch, outputs, strict=True):
                answer = self.source.tokenizer.decode(output, skip_special_tokens=True)
                expected = question.example.answers
                found.append({
                    "length": question.length, "depth": question.depth, "question": question.place,
                    "expected": expected, "answer": answer, "score": score(answer, expected),
                })  # fmt: skip
                advance()
        return found


def _questions(name: str, source: Source, options: Options) -> Iterator[Question]:
    task, sizes = TASKS[name], options.sizes
    for length in sizes.lengths:
        for index in range(options.sizes.examples):
            seed = f"{options.seed} {length} {index}"
            depth = sizes.depths[index % len(sizes.depths)]
            exact = length - random.Random(seed).randrange(LENGTH_JITTER)
            example = task.example(source, exact, depth, seed)
            for place in options.questions:
                yield Question(length, depth if task.has_depth else None, place, example)


def batches(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Slices of at most BATCH."""
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]
