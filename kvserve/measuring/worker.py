"""Main loop of a child process (see children.py): `python -m kvserve.measuring.worker FD`."""

from __future__ import annotations

import importlib
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


def create(target: str, kwargs: dict[str, Any]) -> Any:
    """Instantiate `package.module:Class`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(**kwargs)


def serve(pipe: Connection) -> None:
    """Create the object, then answer calls until the parent closes the pipe."""
    host: Any = None
    try:
        while True:
            try:
                name, kwargs = pipe.recv()
            except (EOFError, ConnectionResetError):
                break
            try:
                if host is None:
                    host, result = create(name, kwargs), None
                else:
                    result = getattr(host, name)(**kwargs)
                reply = (True, result)
            except Exception as error:  # every failure belongs to the caller in the parent process
                traceback.print_exc()
                reply = (False, f"{type(error).__name__}: {error}")
            pipe.send(reply)
    finally:  # also when the parent died during a call
        if hasattr(host, "close"):
            host.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
