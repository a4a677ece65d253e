"""`kvserve eval`: run every item for every policy, one engine after the other, and keep what is finished."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvserve.arguments.model_folder import check_model_files, path_of, read_model_config
from kvserve.arguments.parser import public_argv
from kvserve.checks import check_model, text_config
from kvserve.compat import check_vllm_version
from kvserve.errors import ChildError, TextError, UsageError
from kvserve.evals.engine import HOST
from kvserve.evals.items import BATCH, Item, TaskItem, TextItem
from kvserve.evals.options import DENSE, TEXT, Options, parse
from kvserve.evals.report import rows, verdicts
from kvserve.evals.source import Source
from kvserve.evals.tables import print_tables
from kvserve.evals.tasks.base import TaskError
from kvserve.evals.text import default_text, windows
from kvserve.measuring.engines import Engine, EngineConfig
from kvserve.measuring.machine import machine, versions
from kvserve.measuring.results import SCHEMA_VERSION, write_json
from kvserve.measuring.shape import ModelShape
from kvserve.measuring.tokenizer import load_tokenizer
from kvserve.policies.loading import policy_content, policy_from_config

MAX_BATCHED_TOKENS = 512  # so that prompts are filled in chunks, as those of a busy server


def run(argv: Sequence[str]) -> int:
    """Evaluate.

    Returns:
        0 done, 1 something could not be measured.

    Raises:
        UsageError, PolicyError, UnsupportedError: refused before an engine is started.
    """
    options = parse(argv)
    check_vllm_version()
    evaluation = Evaluation(options, public_argv(list(argv)))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are closed
    try:
        evaluation.run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    print_tables(evaluation.rows, evaluation.content["verdicts"], list(evaluation.content["policies"]))
    for name, reason in evaluation.content["failed"].items():
        print(f"{name}: failed: {reason}", file=sys.stderr)
    return 1 if evaluation.content["failed"] else 0


class Evaluation:
    """One run: prompts, what is finished, and the result file.

    Raises:
        UsageError: the model, the text or the lengths do not fit together, or the result file is of another run.
        UnsupportedError: a policy cannot be used with the model.
    """

    def __init__(self, options: Options, argv: Sequence[str]) -> None:
        self.options = options
        self.model, config = _model(options)
        self.shape = ModelShape.from_hf(dict(text_config(config)))
        text_name, text = (options.text_name, options.text) if options.text is not None else default_text()
        assert text is not None
        self._scratch: AbstractContextManager[str] | None = None
        self.items = self._items(text)
        self.rows: list[Any] = []
        self.content: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "command": ["kvserve", "eval", *argv],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {"name": Path(self.model).name, "config_sha256": _sha256(json.dumps(config, sort_keys=True))},
            "text": {"name": text_name, "sha256": _sha256(text)},
            "machine": machine(),
            "versions": versions(),
            "settings": {**options.settings(), "batch": BATCH, "max_num_batched_tokens": MAX_BATCHED_TOKENS},
            "policies": {label: policy_content(policy) for label, policy in options.policies.items()},
            "failed": {}, "seconds": {}, "engines": {}, "verdicts": [], "rows": [], "raw": {},
        }  # fmt: skip
        self._resume()

    def run(self) -> None:
        """Everything that is not finished yet."""
        self._write()  # from here on the result file says whose the dense distributions are
        plan = {label: self._missing(label) for label in self.options.policies}
        text = next((item for item in self.items if isinstance(item, TextItem)), None)
        records_dense = text is not None and any(text in items for items in plan.values())
        total = sum(item.num_requests for items in plan.values() for item in items)
        total += len(text.windows) if text and records_dense else 0
        with _progress(total) as self._bar:
            for label, items in plan.items():
                if items or (label == DENSE and records_dense):
                    self._evaluate(label, items, text if label == DENSE and records_dense else None)
                if DENSE in self.content["failed"]:
                    break  # nothing to compare the others with
        self._write()
        if text is not None and not self.content["failed"]:
            text.forget_dense()

    def _evaluate(self, label: str, items: list[Item], record: TextItem | None) -> None:
        """One policy; a failure ends it, and the others go on."""
        try:
            self._say(f"{label}: starting the engine")
            with Engine(self.options.sources[label], self._engine_config(), HOST) as engine:
                info = {**engine.call("info"), "start_seconds": round(engine.start_seconds, 1)}
                self.content["engines"][label] = info
                if record is not None:
                    self._say(f"{label}: {record.name}, distributions to compare with")
                    record.record_dense(engine, self._advance)
                for item in items:
                    self._say(f"{label}: {item.name}")
                    start = time.perf_counter()
                    self.content["raw"].setdefault(label, {})[item.name] = item.run(engine, self._advance)
                    seconds = self.content["seconds"].setdefault(label, {})
                    seconds[item.name] = round(time.perf_counter() - start, 1)
                    self._write()
        except ChildError as error:
            self.content["failed"][label] = str(error)
            self._write()

    def _missing(self, label: str) -> list[Item]:
        return [item for item in self.items if item.name not in self.content["raw"].get(label, {})]

    # -- progress --------------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        """What is being done: beside the bar, or a line of its own where there is no terminal."""
        self._bar.update(self._bar.task_ids[0], description=line)
        if self._bar.disable:
            print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)

    def _advance(self) -> None:
        self._bar.advance(self._bar.task_ids[0])

    # -- the result file -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        labels = list(self.content["policies"])
        self.rows = rows(self.content["raw"], labels)
        self.content["rows"] = [row.to_dict() for row in self.rows]
        self.content["verdicts"] = verdicts(self.content["raw"], labels)
        if self.options.out is not None:
            write_json(self.options.out, self.content)

    def _resume(self) -> None:
        """Take over what an earlier run with the same settings finished."""
        out = self.options.out
        if out is None or not out.exists():
            for item in self.items:
                if isinstance(item, TextItem):
                    item.forget_dense()  # of a run with unknown settings
            return
        try:
            earlier = json.loads(out.read_text(encoding="utf-8"))
            for key in ("model", "text", "settings", "versions"):
                _require_equal(out, key, earlier[key], json.loads(json.dumps(self.content[key])))
            for label, content in earlier["policies"].items():
                then = policy_from_config({"policy": content})  # which may be written otherwise today
                _require_equal(out, f"policy {label}", then, self.options.policies.get(label, then))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"--out {out} exists and is no result of kvserve eval; remove it or name another"
            ) from None
        self.content["policies"] = {**earlier["policies"], **self.content["policies"]}
        for key in ("raw", "seconds", "engines", "started"):
            self.content[key] = earlier[key]

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _items(self, text: str) -> list[Item]:
        """All prompts, so that what does not fit is refused at once."""
        tokenizer = load_tokenizer(self.model)
        source, sizes = Source(tokenizer, self.options.text), self.options.sizes
        found: list[Item] = []
        try:
            for name in self.options.items:
                if name == TEXT:
                    tokens = source.encode(text)
                    parts = windows(tokens, sizes.windows, sizes.context, sizes.continuation, source.start)
                    found.append(TextItem(parts, sizes.greedy, self._dense_folder()))
                else:
                    found.append(TaskItem(name, source, self.options))
        except (TaskError, TextError) as error:
            raise UsageError(str(error)) from None
        return found

    def _dense_folder(self) -> Path:
        """Beside the result file, for a run that is resumed; else temporary."""
        if self.options.out is not None:
            return self.options.out.with_suffix(".dense")
        self._scratch = tempfile.TemporaryDirectory(prefix="kvserve-eval-")
        return Path(self._scratch.name)

    def _engine_config(self) -> EngineConfig:
        return EngineConfig(
            self.model, self.shape, self.options.dtype, self.options.sizes.longest + 1, self.options.seed,
            num_requests=BATCH,
            scheduler_options={"max_num_seqs": BATCH, "max_num_batched_tokens": MAX_BATCHED_TOKENS},
        )  # fmt: skip


def _model(options: Options) -> tuple[str, dict[str, Any]]:
    """The model and its configuration, checked against the policies and the lengths."""
    if options.model is None:
        from kvserve.default_model import prepare_default_model

        model = str(prepare_default_model())
    else:
        model = str(path_of(options.model)) if path_of(options.model).is_dir() else options.model
    config = read_model_config(model)
    if config is None:
        raise UsageError(f"--model {model} is neither a Hugging Face folder nor a downloaded model")
    for policy in options.policies.values():
        check_model(config, policy, model)
    check_model_files(model, {})
    longest, limit = options.sizes.longest, text_config(config).get("max_position_embeddings")
    if limit and longest >= limit:
        raise UsageError(f"the longest request has {longest} tokens and the model takes {limit}; lower --lengths")
    if any(policy.calibration for policy in options.policies.values()):
        from kvserve.calibrate.prepare import prepare

        prepare(options.policies.values(), model)
    return model, config


def _require_equal(out: Path, what: str, earlier: Any, now: Any) -> None:
    if earlier != now:
        raise UsageError(f"--out {out} holds results made with other {what}; remove it, or name another file")


def _progress(total: int) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    progress.add_task("", total=total)
    return progress


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
