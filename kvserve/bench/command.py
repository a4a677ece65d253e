"""Run the chosen suites one after the other and write the result file after each."""

from __future__ import annotations

import hashlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from kvserve.arguments.model_folder import path_of, read_model_config
from kvserve.arguments.parser import public_argv
from kvserve.bench import capacity, load, server_suite, suites
from kvserve.bench.options import OptionError, Options, parse
from kvserve.bench.server import Server
from kvserve.bench.server_options import Load
from kvserve.errors import ChildError, UsageError
from kvserve.measuring.children import Child
from kvserve.measuring.engines import Engine, EngineConfig, least_pool_bytes
from kvserve.measuring.machine import machine, versions
from kvserve.measuring.results import SCHEMA_VERSION, Row, SuiteResult, print_table, row_content, write_json
from kvserve.measuring.shape import ModelShape
from kvserve.prose import Prose
from kvserve.text_files import one_line

ENGINE_SUITES = ("step", "prefill", "identity", "needle", "quality")


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        0 done, 1 something could not be measured, 2 refused.
    """
    try:
        options = parse(argv)
        bench = Bench(options, public_argv(argv))
    except UsageError as error:
        print(f"kvserve bench: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are closed
    try:
        bench.run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    print_table(bench.rows)
    for kind in ("left_out", "failed"):
        for suite, reason in bench.content[kind].items():
            print(f"{suite}: {kind.replace('_', ' ')}: {reason}", file=sys.stderr)
    return 1 if bench.content["failed"] else 0


def say(line: str) -> None:
    """One line of progress."""
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


class Bench:
    """One run: the model, the prompts and what was measured so far."""

    def __init__(self, options: Options, argv: list[str]) -> None:
        self.options, self.sizes = options, options.sizes
        self.model = _model_folder(options.model)
        self.shape = ModelShape.from_hf(read_model_config(str(self.model)) or {})
        if "server" in options.suites:
            self._check_server_pool()
        self.rows: list[Row] = []
        self.content: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "command": ["kvserve", "bench", *argv],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {"name": self.model.name} | {k: v for k, v in asdict(self.shape).items() if v is not None},
            "text": options.text_name and {"name": options.text_name, "sha256": _sha256(options.text or "")},
            "machine": machine(),
            "versions": versions(),
            "settings": {
                "quick": options.quick, "dtype": options.dtype, "compile": options.compile,
                "seed": options.seed, "repeats": options.repeats,
                "throughput_repeats": options.throughput_repeats, "names": options.names, **asdict(self.sizes),
                "server": asdict(options.server),
            },
            "left_out": dict(options.left_out), "failed": {}, "seconds": {}, "engines": {}, "rows": [], "raw": {},
        }  # fmt: skip

    def run(self) -> None:
        """All chosen suites."""
        chosen = self.options.suites
        if "capacity" in chosen:
            self._measure("capacity", self._capacity)
        if "operator" in chosen:
            self._measure("operator", self._operator)
        in_engines = [suite for suite in chosen if suite in ENGINE_SUITES]
        if in_engines:
            self._in_engines("main", in_engines, self._main_config())
        if "throughput" in chosen:
            sizes = self.sizes
            longest = sizes.throughput_prompt + sizes.throughput_outputs
            self._in_engines("throughput", ["throughput"], self._config(longest, kv_bytes=sizes.throughput_kv_bytes))
        if "server" in chosen:
            self._measure("server", self._server)

    # -- running ---------------------------------------------------------------------------------------------------

    def _in_engines(self, label: str, chosen: list[str], config: EngineConfig) -> None:
        """Start one engine for every name, run the suites in them, shut them down."""
        try:
            with self._engines(label, config) as engines:
                prose = Prose(self._tokenizer(), self.options.text, self.options.seed)
                for suite in chosen:
                    self._measure(suite, partial(getattr(self, f"_{suite}"), engines, prose))
        except ChildError as error:
            for suite in chosen:
                if suite not in self.content["raw"]:
                    self.content["failed"].setdefault(suite, str(error))
            self._write()

    @contextmanager
    def _engines(self, label: str, config: EngineConfig) -> Iterator[dict[str, Engine]]:
        with ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for name in self.options.names:
                say(f"starting the {label} engine of {name}")
                engines[name] = stack.enter_context(Engine(name, config))
                engines[name].call("generate", prompts=[[1, 2, 3]], max_tokens=2)
                info = {**engines[name].call("info"), "start_seconds": round(engines[name].start_seconds, 1)}
                self.content["engines"].setdefault(label, {})[name] = info
            yield engines

    def _measure(self, suite: str, run: Callable[[], SuiteResult]) -> None:
        """Run one suite; a failure is recorded and the others go on."""
        start = time.perf_counter()
        try:
            result = run()
        except (ChildError, RuntimeError, ValueError) as error:
            say(f"{suite} failed: {error}")
            self.content["failed"][suite] = str(error)
        else:
            # The targets are for the full sizes.
            self.rows += [replace(row, target=None) if self.options.quick else row for row in result.rows]
            self.content["raw"][suite] = result.raw
        self.content["seconds"][suite] = round(time.perf_counter() - start, 1)
        self._write()

    def _write(self) -> None:
        self.content["rows"] = [row_content(row) for row in self.rows]
        if self.options.out is not None:
            write_json(self.options.out, self.content)

    # -- suites ----------------------------------------------------------------------------------------------------

    def _capacity(self) -> SuiteResult:
        kwargs = {"shape": self.shape, "dtype": self.options.dtype}
        with Child("capacity", "kvserve.bench.capacity:CapacityHost", kwargs) as host:
            return capacity.run(host, self.options.names[1:], self.sizes.context)

    def _operator(self) -> SuiteResult:
        sizes, options = self.sizes, self.options
        kwargs = {
            "shape": self.shape, "dtype": options.dtype, "num_seqs": sizes.sequences, "context": sizes.context,
            "seed": options.seed,
        }  # fmt: skip
        with Child("operator", "kvserve.bench.operators:OperatorHost", kwargs) as host:
            return suites.operator(host, options.names, sizes.context, options.repeats, sizes.operator_steps, say)

    def _step(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        prompts = [prose.slice(self.sizes.context) for _ in range(self.sizes.sequences)]
        return suites.step(engines, prompts, self.sizes.decode_steps, self.options.repeats, say)

    def _prefill(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        return suites.prefill(engines, prose.slice(self.sizes.context), self.options.repeats, say)

    def _identity(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        rng, sizes = random.Random(self.options.seed), self.sizes
        lengths = [5, *(rng.randint(5, sizes.identity_longest) for _ in range(sizes.identity_prompts - 2))]
        prompts = [prose.slice(length) for length in (*lengths, sizes.identity_longest)]
        return suites.identity(engines, prompts, sizes.identity_outputs, self.options.repeats, say)

    def _needle(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        count = self.options.needles
        prompts = [prose.needle(self.sizes.context - 16, (index + 0.5) / count) for index in range(count)]
        return suites.needle(engines, prompts, prose.tokenizer.decode, say)

    def _quality(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        assert self.options.text is not None
        windows = pick_windows(prose.encode(self.options.text), self.sizes.window, self.options.windows)
        with Child("simulation", "kvserve.bench.simulation:SimulationHost", {"model": str(self.model)}) as simulation:
            return suites.quality(engines, simulation, windows, self.options.simulations, say)

    def _throughput(self, engines: dict[str, Engine], prose: Prose) -> SuiteResult:
        sizes = self.sizes
        prompts = [prose.slice(sizes.throughput_prompt) for _ in range(sizes.throughput_requests)]
        return suites.throughput(engines, prompts, sizes.throughput_outputs, self.options.throughput_repeats, say)

    def _server(self) -> SuiteResult:
        sizes, tokenizer = self.options.server, str(self.model)
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            for name in self.options.names:
                say(f"starting the server of {name}")
                server = servers[name] = stack.enter_context(Server.start(name, self._server_config()))
                server.warm_up(sizes.input_tokens)
                info = {"kv_bytes": sizes.kv_bytes, **server.info(), "start_seconds": round(server.start_seconds, 1)}
                self.content["engines"].setdefault("server", {})[name] = info

            def measure(name: str, arrivals: Load, seed: int) -> load.Measured:
                return load.measure(servers[name], arrivals, sizes, tokenizer, seed)

            repeats, seed = self.options.throughput_repeats, self.options.seed
            return server_suite.server(measure, list(servers), sizes.loads(), repeats, seed, say)

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _config(self, max_model_len: int, **pool: Any) -> EngineConfig:
        return EngineConfig(
            str(self.model), self.shape, self.options.dtype, max_model_len, self.options.seed,
            enforce_eager=not self.options.compile, **pool,
        )  # fmt: skip

    def _server_config(self) -> EngineConfig:
        sizes = self.options.server
        return self._config(
            sizes.longest_tokens, kv_bytes=sizes.kv_bytes, scheduler_options=sizes.scheduler_options
        )  # fmt: skip

    def _check_server_pool(self) -> None:
        """Refuse a pool that does not hold the longest request of every name."""
        sizes = self.options.server
        for name in self.options.names:
            least = least_pool_bytes(name, self._server_config())
            if sizes.kv_bytes < least:
                raise OptionError(
                    f"--kv-bytes {sizes.kv_bytes} is too small: a request of {sizes.longest_tokens} tokens under "
                    f"{name} needs {least}; give more, or fewer --input-tokens or --output-tokens"
                )

    def _main_config(self) -> EngineConfig:
        """Engines whose pools hold the requests of the step suite."""
        sizes = self.sizes
        longest = max(
            sizes.context + sizes.decode_steps + 2, sizes.identity_longest + sizes.identity_outputs, sizes.window + 1
        )
        return self._config(longest, num_requests=sizes.sequences)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)


def pick_windows(tokens: list[int], size: int, count: int | None) -> list[list[int]]:
    """`count` windows of `size` tokens, evenly spread over the text; None: all of them.

    Raises:
        ValueError: the text is shorter than one window.
    """
    available = len(tokens) // size
    if not available:
        raise ValueError(f"the text has {len(tokens)} tokens, a window needs {size}")
    if count is None or count >= available:
        picked = list(range(available))
    else:
        picked = [round(i * (available - 1) / max(count - 1, 1)) for i in range(count)]
    return [tokens[i * size : (i + 1) * size] for i in picked]


def _model_folder(model: str | None) -> Path:
    if model is None:
        from kvserve.default_model import prepare_default_model

        return prepare_default_model()
    folder = path_of(model)
    if not (folder / "config.json").is_file():
        raise OptionError(f"--model {model} is not a Hugging Face folder: it has no config.json")
    return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
