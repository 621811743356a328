"""Rewrite the tables of docs/speed.md from results/speed/*.json: `make speed`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.blocks import rewrite
from ivtp.benchmark.growth import growth_grids
from ivtp.benchmark.table import markdown, summary

ROOT = Path(__file__).resolve().parents[1]


def main(page: Path = ROOT / "docs" / "speed.md", results: Path = ROOT / "results" / "speed") -> int:
    """Returns the exit code; the page is left alone where there is nothing to write or no place for it."""
    files = sorted(results.glob("*.json"))
    if not files:
        print(f"no results in {results}; measure them with the commands of docs/speed.md", file=sys.stderr)
        return 1
    try:
        rewrite(page, {"speed": tables(files)})
    except ValueError as error:
        print(f"{page} {error}", file=sys.stderr)
        return 1
    print(f"{page}: {len(files)} result(s) written")
    return 0


def tables(files: list[Path]) -> str:
    """All result files, one behind the other."""
    return "\n\n".join(section(json.loads(file.read_text(encoding="utf-8")), file) for file in files)


def section(document: dict[str, Any], file: Path) -> str:
    """One result file: the machine, the command that measured it, its tables."""
    asked, machine = document["asked"], document["machine"]
    title = f"**{document['model']}** on {machine['device']} ({machine['threads']} CPU threads, "
    title += f"{document['weights']['dtype']}, torch "
    title += f"{machine['torch']}, transformers {machine['transformers']}), medians of {asked['repeats']} rounds"
    # what a file was measured with, as it is written now, and to where the file lies now
    command = re.sub(r" --(json|output) \S+", f" --output results/speed/{file.name}", document["command"])
    source = f"`{command}` ([file](../results/speed/{file.name}))"
    grids = growth_grids(document) if document["growth"] else [summary(document)]
    return "\n\n".join([title + ":", source, *document["notes"], *map(markdown, grids)])


if __name__ == "__main__":
    raise SystemExit(main())
