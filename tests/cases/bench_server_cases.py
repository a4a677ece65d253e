"""A server that is not vLLM's, and whether processes still run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="bench"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="bench"} 5.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="bench",reason="capacity"} 5.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="bench"} 0.75
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="bench"} 640.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="bench"} 2.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="bench"} 1.7e+09
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="22"} 1.0
"""

# Answers as a server does, and starts a process that does not end when asked to.
SERVER = f"""
import http.server, os, pathlib, subprocess, sys

port, pids = int(sys.argv[1]), pathlib.Path(sys.argv[2])
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", ignore])
pids.write_text(f"{{os.getpid()}} {{worker.pid}}")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write({METRICS!r}.encode())

    do_POST = do_GET


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server_command(folder: Path, name: str, port: int) -> list[str]:
    """Starts the server; the ids of its two processes are in `folder / name` when it answers."""
    script = folder / "server.py"
    script.write_text(SERVER)
    return [sys.executable, str(script), str(port), str(folder / name)]


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def all_end(pids: list[int], seconds: float = 120.0) -> bool:
    """Whether all processes end within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for(path: Path, seconds: float = 300.0) -> str:
    """The content of a file once it has one."""
    deadline = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.05)
    return path.read_text()
