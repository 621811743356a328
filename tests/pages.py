"""What stands in a Markdown page: Python that runs, commands, links."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
PAGES += [ROOT / "src" / "ivtp" / "micro" / "MODEL_CARD.md", ROOT / "recipes" / "micro" / "HISTORY.md"]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def run_python(page: Path) -> int:
    """Runs a page's ```python blocks one after the other, as a reader would; returns how many said what they print.

    A block prints what stands in the ```text block behind it or, without one, in the comments behind its `print`s.
    """
    names: dict[str, object] = {}
    blocks = [(found[1], found[2]) for found in _FENCE.finditer(read(page))]
    said = 0
    for (kind, code), (next_kind, text) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), names)
        comments = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.M)
        expected = text.splitlines() if next_kind == "text" else comments
        assert printed.getvalue().splitlines() == expected, page.name
        said += bool(expected)
    return said


def commands(page: Path, program: str = "ivtp") -> list[list[str]]:
    """Every command line of a program on a page: in blocks of a shell, and in `code` within a sentence."""
    text = read(page)
    fenced = "\n".join(
        found[2] for found in _FENCE.finditer(text) if not found[1].startswith(("python", "text", "bib"))
    )
    indented = "\n".join(re.findall(r"^    (\S.*)$", text, flags=re.M))
    lines = [*_joined(fenced), *_joined(indented)]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]
    found = [line for line in lines if line.startswith(f"{program} ") and "..." not in line]
    return [shlex.split(line, comments=True)[1:] for line in found]


def _joined(lines: str) -> list[str]:
    return lines.replace("\\\n", " ").splitlines()


def links(page: Path) -> list[str]:
    """Where a page's relative links lead, without the place on that page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", read(page)))
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
