"""`kvserve calibrate`: fit the tables that some policies need to a model, once."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvserve.arguments.model_folder import check_model_files, path_of, read_model_config
from kvserve.arguments.parser import MAX_SEED, Parser, given_text, result_file, whole
from kvserve.calibrate.collect import Importance, Reading
from kvserve.calibrate.fit import Recipe, calibrate, check
from kvserve.calibration.corpus import Corpus, default_corpus, segments
from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.methods.base import AnyMethod, Method
from kvserve.calibration.methods.registry import RECIPES, make_method
from kvserve.calibration.store import stored_path, weights_of
from kvserve.checks import check_model, text_config
from kvserve.compat import check_vllm_version
from kvserve.default_model import default_model_path, prepare_default_model
from kvserve.engine.environment import cpu_has_bfloat16
from kvserve.errors import ChildError, TextError, UsageError
from kvserve.measuring.shape import ModelShape
from kvserve.measuring.tokenizer import load_tokenizer, start_of
from kvserve.policies.loading import load_policy

DESCRIPTION = """\
Read a text with a model and fit the tables that some policies need to its keys and values, once. Policies find them by
the model's weights; the files hold numbers only.
"""
TOKENS = 16384
SEGMENT = 1024  # tokens that are read together, from position 0 on


def run(arguments: Sequence[str]) -> int:
    """Calibrate.

    Returns:
        0 done, 1 the model could not be loaded or run.

    Raises:
        UsageError, UnsupportedError: refused before the model is loaded, or not fit to be calibrated.
    """
    args = _parser().parse_args(arguments)
    names = args.method.split(",")
    methods = {name: make_method(name, args.set) for name in names}
    if args.set and not args.out:
        raise UsageError("--set needs --out FILE: under its name a method keeps its own parameters")
    if args.out and len(names) > 1:
        raise UsageError("--out FILE takes one method; drop it, or run the command for each method")
    _check_reading(args, methods)
    check_vllm_version()
    text = given_text(args.text)
    corpus = default_corpus() if text is None else Corpus(args.text.name, text)
    model = args.model or str(prepare_default_model())
    reading = reading_of(model, corpus, args.tokens, args.importance, args.dtype, args.seed)
    recipes = [Recipe(name, method, args.out or _place(name, model)) for name, method in methods.items()]
    check(recipes, reading.cache)
    return _calibrate(reading, corpus, recipes)


def _check_reading(args: argparse.Namespace, methods: Mapping[str, AnyMethod]) -> None:
    """Refuse options about a text that nobody reads."""
    if any(isinstance(method, Method) for method in methods.values()):
        return
    given = {"--text": args.text, "--tokens": args.tokens != TOKENS, "--importance": args.importance}
    for option in (option for option, value in given.items() if value):
        raise UsageError(f"{args.method} reads random tokens and no text; drop {option}")


def _calibrate(reading: Reading, corpus: Corpus, recipes: list[Recipe]) -> int:
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are closed
    start = time.monotonic()
    try:
        calibrate(reading, corpus, recipes)
    except ChildError as error:
        print(f"kvserve calibrate: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or 'the calibration'}: {error.strerror}") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    for recipe in recipes:
        print(f"{recipe.name}: {recipe.path} ({recipe.path.stat().st_size / 2**20:.2f} MiB)")
    print(f"{time.monotonic() - start:.0f} s, importance: {reading.importance}", file=sys.stderr)
    return 0


def reading_of(
    model: str, corpus: Corpus, num_tokens: int = TOKENS, importance: Importance | None = None,
    dtype: str | None = None, seed: int = 0,
) -> Reading:  # fmt: skip
    """A model and its parts of a text, checked.

    Args:
        importance: None: gradients for the default model, where they take a minute or two, else none.
        dtype: None: bfloat16, or float32 on a CPU without bfloat16 arithmetic.

    Raises:
        UsageError, UnsupportedError: the model cannot be served, or the text is too short.
    """
    folder = path_of(model)
    model = str(folder) if folder.is_dir() else model
    config = read_model_config(model)
    if config is None:
        raise UsageError(f"--model {model} is neither a Hugging Face folder nor a downloaded model")
    check_model(config, load_policy("none"), model)
    check_model_files(model, {})
    shape = ModelShape.from_hf(dict(text_config(config)))
    tokenizer = load_tokenizer(model)
    longest = text_config(config).get("max_position_embeddings") or SEGMENT + 1
    tokens = tokenizer(corpus.text, add_special_tokens=False, verbose=False).input_ids
    try:
        parts = segments(tokens, num_tokens, min(SEGMENT, longest - 1, num_tokens), start_of(tokenizer))
    except TextError as error:
        raise UsageError(str(error)) from None
    is_default = folder == default_model_path()
    return Reading(
        model, shape, parts, importance or ("gradient" if is_default else "none"),
        dtype or ("bfloat16" if cpu_has_bfloat16() else "float32"), seed,
    )  # fmt: skip


def _place(recipe: str, model: str) -> Path:
    return stored_path(recipe, fingerprint(weights_of(model)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="kvserve calibrate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", required=True, metavar="NAME", help=f"one or more, with commas: {', '.join(RECIPES)}")
    add("--model", help="a Hugging Face folder or downloaded model (default: the model that needs no download)")
    add("--text", type=Path, metavar="FILE", help="your own text (default: docstrings of Python's library)")
    add("--tokens", type=whole(64), default=TOKENS, metavar="N", help="of the text (default: %(default)s)")
    add(
        "--importance", choices=("gradient", "none"),
        help="what an error counts: by the loss's gradient, with transformers, or all alike, with vLLM (default: "
        "gradient for the model that needs no download, else none)",
    )  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a parameter; needs --out")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model while it reads")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="of what is drawn (default: %(default)s)")
    add("--out", type=result_file, metavar="FILE", help="write there, for policies that name the file")
    return parser
