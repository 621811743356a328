"""Parts of a page that a command writes: between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

import re
from pathlib import Path


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`. Raises `ValueError` where it does not have them once each."""
    marks = re.compile(rf"(<!-- {name}:begin\b[^>]*-->\n).*?(^<!-- {name}:end -->)", re.DOTALL | re.MULTILINE)
    new, count = marks.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"has no lines <!-- {name}:begin --> and <!-- {name}:end -->; put them where it belongs")
    return new


def rewrite(page: Path, blocks: dict[str, str]) -> bool:
    """Write all `blocks` of a page, or none; returns whether the page changed."""
    before = text = page.read_text(encoding="utf-8")
    for name, content in blocks.items():
        text = replaced(text, name, content)
    if text != before:
        page.write_text(text, encoding="utf-8")
    return text != before


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
