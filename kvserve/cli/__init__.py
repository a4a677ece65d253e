"""The `kvserve` command. Importing it loads neither torch nor vLLM."""

from kvserve.cli.main import main

__all__ = ["main"]
