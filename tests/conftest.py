"""Triton decides on import whether it interprets: without a GPU the kernels are imported under its interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401 (the interpreter's first launch would import it)

        import kvserve.attention.triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
    finally:
        del os.environ["TRITON_INTERPRET"]  # servers that tests start must not interpret


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
