"""Runs the cases of attention_cases.py and kept_cases.py on the Triton kernels: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kvserve.attention.base import Answers, Batch, NewRows
from kvserve.attention.triton import TritonAttention
from kvserve.pages.kept import KeptTable
from tests.cases.attention_cases import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cells_on(device: torch.device, cells: torch.Tensor) -> torch.Tensor:
    """A copy of a layer's cells, and of what lies between them, with the same strides."""
    offset = cells.storage_offset()
    whole = torch.empty(0, dtype=torch.uint8).set_(cells.untyped_storage())
    return whole.clone().to(device).as_strided(cells.shape, cells.stride(), offset)


def batch_on(device: torch.device, batch: Batch) -> Batch:
    """The batch with its tensors on a device; the block table stays a view of a wider one."""
    width = batch.block_table.shape[1]
    wide = torch.nn.functional.pad(batch.block_table, (0, 3), value=1 << 30).to(device)
    kept = None if batch.kept is None else KeptTable(*(table.to(device) for table in batch.kept))
    starts, lengths = batch.query_start_loc.to(device), batch.seq_lens.to(device)
    return Batch(starts, lengths, wide[:, :width], kept, batch.max_query_len)


def run(
    attention: TritonAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cells: torch.Tensor,
    batch: Batch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse and the cells after one forward, all on the CPU; the arguments stay as they are."""
    arena = cells_on(DEVICE, cells)
    output = torch.full_like(query, torch.nan, device=DEVICE)
    lse = torch.full(query.shape[:2], torch.nan, device=DEVICE)
    rows = (tensor.to(DEVICE) for tensor in (query, key, value))
    attention.forward(NewRows(*rows), arena, batch_on(DEVICE, batch), Answers(output, lse))
    return output.cpu(), lse.cpu(), cells_on(torch.device("cpu"), arena)


def attention_of(case: Case) -> TritonAttention:
    """The kernels for a case of attention_cases.py, with its tables on their device."""
    tables = {name: table.to(DEVICE) for name, table in case.tables.items()}
    return TritonAttention(case.layout, case.spec.on(DEVICE), tables)


def run_case(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`run` of a case of attention_cases.py."""
    return run(attention_of(case), case.query, case.key, case.value, case.cells, case.batch)


def with_wide_lengths(batch: Batch, max_query_len: int) -> Batch:
    """The batch as an engine makes it, which knows the longest query without asking the device."""
    return replace(batch, max_query_len=max_query_len)


def run_python(*arguments: str, **environment: str) -> str:
    """Standard output of a Python process that imports the tests' helpers and kvserve as this one does."""
    path = ":".join([str(Path(__file__).resolve().parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments], env={"PYTHONPATH": path, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
