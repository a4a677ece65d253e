#!/usr/bin/env python3
"""docs/compatibility.md from the result file that `make matrix` writes.

python -m benchmarks.reports.compatibility
"""

import json
import sys
from pathlib import Path

from benchmarks.reports.documents import fill

ROOT = Path(__file__).resolve().parents[2]
RECORD, DOCUMENT = ROOT / "benchmarks" / "results" / "compatibility.json", ROOT / "docs" / "compatibility.md"


def table(matrix: dict[str, dict[str, str]]) -> str:
    """Policies down, features across."""
    features = list(dict.fromkeys(feature for cells in matrix.values() for feature in cells))
    lines = [f"| policy | {' | '.join(features)} |", f"|{'---|' * (len(features) + 1)}"]
    for policy, cells in sorted(matrix.items()):
        lines.append(f"| `{policy}` | {' | '.join(cells.get(feature, 'not run') for feature in features)} |")
    return "\n".join(lines)


def document() -> str:
    """The page with its table made anew."""
    matrix = json.loads(RECORD.read_text(encoding="utf-8"))["matrix"]
    return fill(DOCUMENT.read_text(encoding="utf-8"), "matrix", table(matrix))


def main() -> int:
    """Write the page."""
    DOCUMENT.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
