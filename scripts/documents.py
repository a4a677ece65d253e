"""Parts of documents that are made by scripts: what stands between `<!-- NAME -->` and `<!-- end NAME -->`."""


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
