"""The address that a server is to listen on, tried before anything is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvserve.errors import UsageError

DEFAULT_PORT = 8000  # vLLM's
OPEN_HOSTS = (None, "", "0.0.0.0", "::")  # all interfaces; the first is vLLM's default


def check_address(options: Mapping[str, Any]) -> None:
    """Bind the address as vLLM will, and let it go.

    Args:
        options: vLLM's options by their names in its parsed arguments.

    Raises:
        UsageError: it is taken, or this process may not have it.
    """
    if options.get("headless") or options.get("uds"):
        _check_socket_file(options.get("uds"))
        return
    host, port = str(options.get("host") or ""), options.get("port")
    port = DEFAULT_PORT if port is None else int(port)
    try:
        with socket.socket(socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(_why_not(host, port, error)) from None
    except (OverflowError, UnicodeError):
        raise UsageError(f"--host {host!r:.200} --port {port} is no address") from None


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another process; stop that one, or give another --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this process has; give a --port of 1024 or more"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine; use 127.0.0.1 for this machine only, 0.0.0.0 for all"
    return f"cannot listen on --host {host} --port {port}: {error.strerror}"


def _check_socket_file(uds: Any) -> None:
    if not uds:
        return
    path = Path(str(uds))
    if path.exists():
        raise UsageError(f"--uds {uds} exists; remove it, or give another path")
    if not path.parent.is_dir():
        raise UsageError(f"--uds {uds} cannot be made: there is no folder {path.parent}")


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
