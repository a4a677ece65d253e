"""What an engine's pages are those of, and whether what lies in a shared storage is the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvserve.calibration.fingerprint import fingerprint
from kvserve.calibration.store import weights_of
from kvserve.connectors import STORAGE_KEY, Identity, storage_path
from kvserve.errors import UnsupportedError
from kvserve.policies.loading import policy_content

if TYPE_CHECKING:
    from kvserve.calibration.artefact import Calibration
    from kvserve.pages.layout import PageLayout

MANIFEST = "kvserve.json"


def identity_of(layout: PageLayout, calibration: Calibration | None, model: str) -> Identity:
    """Of an engine's pages.

    Args:
        model: name or folder.

    Raises:
        UnsupportedError: the model's weights cannot be read.
    """
    pages = f"{layout.cell_bytes} bytes for {layout.block_size} tokens, {layout.dense_dtype}"
    try:
        weights = fingerprint(weights_of(model))
    except ValueError as error:
        raise UnsupportedError(f"cannot tell whose pages a KV connector moves: {error}") from None
    policy, tables = layout.policy, calibration.sha256 if calibration else ""
    return Identity.of(policy.name, policy_content(policy), tables, weights, pages)


def check_storage(transfer: Any, identity: Identity) -> None:
    """Refuse a storage with the pages of another policy, calibration or model.

    Raises:
        UnsupportedError: naming what differs.
    """
    path = storage_path(transfer)
    if path is None or not Path(path).is_dir():
        return
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        if any(not name.startswith(MANIFEST) for name in os.listdir(folder)):
            raise UnsupportedError(f"nothing says whose the files in {folder} are; name an empty {STORAGE_KEY}")
        return
    try:
        theirs = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"cannot read {folder / MANIFEST}: {error}; name another {STORAGE_KEY}") from None
    difference = identity.difference(theirs)
    if difference:
        raise UnsupportedError(f"{folder} has the pages of {difference}; name another {STORAGE_KEY}")


def claim_storage(transfer: Any, identity: Identity) -> None:
    """Write whose pages the storage has, unless that is said already.

    Raises:
        UnsupportedError: it has another's, or cannot be written.
    """
    path = storage_path(transfer)
    if path is None:
        return
    check_storage(transfer, identity)
    folder = Path(path)
    own = folder / f"{MANIFEST}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(identity._asdict(), indent=1) + "\n", encoding="utf-8")
        try:
            os.link(own, folder / MANIFEST)  # of two engines that start at once, one
        except FileExistsError:
            pass
        finally:
            own.unlink()
    except OSError as error:
        raise UnsupportedError(f"cannot write to {folder}: {error}; name another {STORAGE_KEY}") from None
    check_storage(transfer, identity)
