"""The measurements that run in engines or in the operator process, and the rows they report.

A `hosts` argument maps a name ("stock" or a policy) to its engine; `say` prints one line of progress.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvserve.measuring.engines import STOCK
from kvserve.measuring.results import Row, SuiteResult, interleave, ratio_row, ratios, spread
from kvserve.prose import NeedlePrompt

Say = Callable[[str], None]
Hosts = Mapping[str, Any]
Prompts = list[list[int]]

DENSE = "none"
DENSE_ERROR_LIMIT = 0.02  # RMS over RMS; what bfloat16 rounding explains
IDENTITY_SPEED_TARGET = 0.95
PREFILL_TIME_TARGET = 1.05
EXCESS_TARGET_PERCENT = 0.5  # of the engine's perplexity over the simulation's
OPERATOR_SPEED_TARGETS = {"kivi-2bit": 6.0}
STEP_SPEED_TARGETS = {"kivi-2bit": 2.5}
THROUGHPUT_TARGETS = {"kivi-2bit": 3.0}


def operator(host: Any, names: Sequence[str], context: int, repeats: int, steps: int, say: Say) -> SuiteResult:
    """Attention alone: decode, prefill and sealing of every policy against stock, in one process.

    Decode is timed half a tile before the end of `context`, where a request is on average; sealing is what a step
    that completes a tile costs more.
    """
    middle = context - 32
    raw: dict[str, Any] = {"decode_context_tokens": middle, "setup": {}, "relative_error": {}}
    outputs = {}
    for name in names:
        raw["setup"][name] = host.call("fill", name=name)
        outputs[name] = host.call("output", name=name, seq_len=middle)
        raw["relative_error"][name] = relative_error(outputs[name], outputs[STOCK])
        if name == DENSE and raw["relative_error"][name] > DENSE_ERROR_LIMIT:
            raise RuntimeError(f"the dense cache's output differs from stock's by {raw['relative_error'][name]:.2g}")
        say(f"operator: {name} filled")
    samples: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in names} for kind in ("decode_seconds", "prefill_seconds", "seal_seconds")
    }
    for repeat, name in interleave(names, repeats):
        decode = host.call("decode", name=name, seq_len=middle, steps=steps)
        prefill = host.call("prefill", name=name, num_tokens=context)
        before = host.call("decode", name=name, seq_len=context - 1, steps=steps)
        seal = host.call("decode", name=name, seq_len=context, steps=steps) - before
        for kind, value in zip(samples, (decode, prefill, seal), strict=True):
            samples[kind][name].append(value)
        say(f"operator {repeat + 1}/{repeats} {name}: decode {decode * 1e3:.3f} ms, prefill {prefill:.3f} s a layer")
    return SuiteResult(_operator_rows(samples), {**raw, **samples})


def _operator_rows(samples: dict[str, dict[str, list[float]]]) -> list[Row]:
    decode, prefill, seal = samples.values()
    rows = [Row("operator", STOCK, "decode attention, one layer", "ms", spread([1e3 * s for s in decode[STOCK]]))]
    for name in decode:
        if name == STOCK:
            continue
        speed = ratios(decode[STOCK], decode[name])
        rows += [
            ratio_row("operator", name, "decode attention speed", speed, OPERATOR_SPEED_TARGETS.get(name)),
            ratio_row("operator", name, "prefill attention time", ratios(prefill[name], prefill[STOCK])),
            ratio_row("operator", name, "sealing a tile, over a decode step", ratios(seal[name], decode[name])),
        ]
    return rows


def relative_error(found: Sequence[float], expected: Sequence[float]) -> float:
    """RMS of the difference over RMS of the expected values."""
    difference = sum((a - b) ** 2 for a, b in zip(found, expected, strict=True))
    return float((difference / sum(b**2 for b in expected)) ** 0.5)


def step(hosts: Hosts, prompts: Prompts, num_steps: int, repeats: int, say: Say) -> SuiteResult:
    """Time of a decode step with all prompts running; the first call of each engine fills its prefix cache."""
    raw: dict[str, Any] = {"sequences": len(prompts), "context_tokens": len(prompts[0]), "step_seconds": {}}
    for name, host in hosts.items():
        host.call("generate", prompts=prompts, max_tokens=1)
        raw["step_seconds"][name] = []
        say(f"step: {name} prefilled")
    for repeat, name in interleave(list(hosts), repeats):
        times = hosts[name].call("decode_steps", prompts=prompts, num_steps=num_steps)
        raw["step_seconds"][name].append(times)
        say(f"step {repeat + 1}/{repeats} {name}: {1e3 * statistics.mean(times):.1f} ms a step")
    means = {name: [statistics.mean(times) for times in found] for name, found in raw["step_seconds"].items()}
    rows = [Row("step", STOCK, "decode step, mean over a repeat", "ms", spread([1e3 * s for s in means[STOCK]]))]
    for name in _policies(hosts):
        speed = ratios(means[STOCK], means[name])
        rows.append(ratio_row("step", name, "decode step speed", speed, STEP_SPEED_TARGETS.get(name)))
    return SuiteResult(rows, raw)


def prefill(hosts: Hosts, prompt: list[int], repeats: int, say: Say) -> SuiteResult:
    """Time to the first token of one prompt on an idle engine, nothing taken from the prefix cache."""
    seconds: dict[str, list[float]] = {name: [] for name in hosts}
    for repeat, name in interleave(list(hosts), repeats):
        seconds[name].append(hosts[name].call("generate", prompts=[prompt], max_tokens=1).seconds)
        say(f"prefill {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.2f} s")
    rows = [Row("prefill", STOCK, f"prefill of {len(prompt):,} tokens", "s", spread(seconds[STOCK]))]
    for name in _policies(hosts):
        taken = ratios(seconds[name], seconds[STOCK])
        rows.append(ratio_row("prefill", name, "prefill time", taken, PREFILL_TIME_TARGET, "<="))
    return SuiteResult(rows, {"prompt_tokens": len(prompt), "seconds": seconds})


def throughput(hosts: Hosts, prompts: Prompts, num_outputs: int, repeats: int, say: Say) -> SuiteResult:
    """Output tokens per second of all requests at once, in equal KV bytes."""
    rates: dict[str, list[float]] = {name: [] for name in hosts}
    for repeat, name in interleave(list(hosts), repeats):
        found = hosts[name].call("generate", prompts=prompts, max_tokens=num_outputs)
        if any(len(tokens) != num_outputs for tokens in found.tokens):
            raise RuntimeError(f"{name} returned fewer than {num_outputs} tokens for a request")
        rates[name].append(len(prompts) * num_outputs / found.seconds)
        say(f"throughput {repeat + 1}/{repeats} {name}: {rates[name][-1]:.1f} tokens/s")
    rows = [Row("throughput", STOCK, "output tokens per second", "tok/s", spread(rates[STOCK]))]
    for name in _policies(hosts):
        gain = ratios(rates[name], rates[STOCK])
        rows.append(ratio_row("throughput", name, "throughput in equal bytes", gain, THROUGHPUT_TARGETS.get(name)))
    return SuiteResult(
        rows, {"requests": len(prompts), "output_tokens": num_outputs, "output_tokens_per_second": rates}
    )


def identity(hosts: Hosts, prompts: Prompts, num_outputs: int, repeats: int, say: Say) -> SuiteResult:
    """Greedy tokens of the dense policy against stock's, and stock's against its own first repeat."""
    names = [STOCK, DENSE]
    outputs: dict[str, list[Prompts]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat, name in interleave(names, repeats):
        found = hosts[name].call("generate", prompts=prompts, max_tokens=num_outputs)
        outputs[name].append(found.tokens)
        seconds[name].append(found.seconds)
        say(f"identity {repeat + 1}/{repeats} {name}: {found.seconds:.2f} s")
    same = [count_equal(a, b) for a, b in zip(outputs[DENSE], outputs[STOCK], strict=True)]
    control = [count_equal(again, outputs[STOCK][0]) for again in outputs[STOCK][1:]]
    unit, speed = f"of {len(prompts)}", ratios(seconds[STOCK], seconds[DENSE])
    rows = [Row("identity", DENSE, "prompts with stock's tokens", unit, spread(same), len(prompts))]
    if control:
        rows.append(Row("identity", STOCK, "prompts with its own tokens again", unit, spread(control)))
    rows.append(ratio_row("identity", DENSE, "speed", speed, IDENTITY_SPEED_TARGET))
    raw = {
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "output_tokens": num_outputs,
        "identical": same,
        "stock_identical_to_first_repeat": control,
        "seconds": seconds,
    }
    return SuiteResult(rows, raw)


def count_equal(a: Prompts, b: Prompts) -> int:
    """Positions at which both lists hold the same tokens."""
    return sum(x == y for x, y in zip(a, b, strict=True))


def needle(hosts: Hosts, prompts: Sequence[NeedlePrompt], decode: Callable[[list[int]], str], say: Say) -> SuiteResult:
    """How many greedy answers contain the number hidden in the prompt."""
    raw: dict[str, Any] = {"expected": [prompt.answer for prompt in prompts], "answers": {}}
    rows = []
    for name, host in hosts.items():
        found = host.call("generate", prompts=[prompt.tokens for prompt in prompts], max_tokens=16, ignore_eos=False)
        answers = raw["answers"][name] = [decode(tokens) for tokens in found.tokens]
        hits = sum(prompt.answer in answer.replace(",", "") for prompt, answer in zip(prompts, answers, strict=True))
        rows.append(Row("needle", name, "needles found", f"of {len(prompts)}", spread([hits])))
        say(f"needle {name}: {hits} of {len(prompts)}")
    return SuiteResult(rows, raw)


def quality(hosts: Hosts, simulation: Any, windows: Prompts, simulations: int, say: Say) -> SuiteResult:
    """Perplexity through the engines and through the independent simulation, on the same windows.

    Args:
        simulation: the SimulationHost's Child; stock has no simulation of its own.
        simulations: simulated runs of each compressed policy, all but the first jittered (see simulation.py).
    """
    counted = sum(len(window) - 1 for window in windows)
    raw: dict[str, Any] = {"windows": len(windows), "window_tokens": len(windows[0]), "log_likelihoods_nats": {}}
    engine: dict[str, float] = {}
    simulated: dict[str, list[float]] = {}
    for name, host in hosts.items():
        sums = host.call("log_likelihoods", windows=windows)
        engine[name] = perplexity(sums, counted)
        raw["log_likelihoods_nats"][name] = {"engine": sums}
        say(f"quality {name}: perplexity {engine[name]:.4f}")
        if name == STOCK:
            continue
        runs = raw["log_likelihoods_nats"][name]["simulations"] = []
        for seed in (None, *range(1, 1 if name == DENSE else simulations)):
            runs.append(simulation.call("log_likelihoods", policy=name, windows=windows, jitter_seed=seed))
            say(f"quality {name}: perplexity {perplexity(runs[-1], counted):.4f} simulated")
        simulated[name] = [perplexity(sums, counted) for sums in runs]
    rows = [Row("quality", name, "perplexity", "", spread([engine[name]])) for name in hosts]
    for name in _policies(hosts):
        increase = 100 * (engine[name] / engine[STOCK] - 1)
        excess = [100 * (engine[name] / expected - 1) for expected in simulated[name]]
        rows += [
            Row("quality", name, "perplexity over stock", "%", spread([increase])),
            Row("quality", name, "perplexity, simulated", "", spread(simulated[name])),
            Row("quality", name, "perplexity over simulated", "%", spread(excess), EXCESS_TARGET_PERCENT, "<="),
        ]  # fmt: skip
    return SuiteResult(rows, raw)


def perplexity(log_likelihoods: Sequence[float], num_tokens: int) -> float:
    """exp of the mean negative log likelihood (nats)."""
    return math.exp(-sum(log_likelihoods) / num_tokens)


def _policies(hosts: Hosts) -> list[str]:
    return [name for name in hosts if name != STOCK]
