"""Parts of documents that are made by scripts: what stands between `<!-- NAME -->` and `<!-- end NAME -->`."""

import re
from typing import Any


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the markers of `name`.

    Raises:
        SystemExit: the markers are missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_end:
        raise SystemExit(f"the document has no {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def command_of(record: dict[str, Any]) -> str:
    """The command that makes a record, by the names that programs have today: records keep what they were made by."""
    command = record["command"]
    words = " ".join(command if isinstance(command, list) else [command])
    words = words.replace("kvserve.bench.evict", "benchmarks.evict")
    return re.sub(r"\bbenchmarks/(\w+)\.py", r"-m benchmarks.\1", words)
