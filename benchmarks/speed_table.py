"""Rewrite the speed section of README.md from benchmarks/results/*.json: `make speed`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ivtp.benchmark.growth import growth_grids
from ivtp.benchmark.table import markdown, summary

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def main(readme: Path = ROOT / "README.md", results: Path = ROOT / "benchmarks" / "results") -> int:
    """Returns the exit code; README.md is left alone where there is nothing to write or no place for it."""
    files = sorted(results.glob("*.json"))
    if not files:
        print(f"no results in {results}; measure them with the commands of benchmarks/README.md", file=sys.stderr)
        return 1
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{readme} has no lines {BEGIN} and {END}; put them where the tables belong", file=sys.stderr)
        return 1
    sections = [section(json.loads(file.read_text(encoding="utf-8")), file) for file in files]
    readme.write_text(before + "\n\n".join([BEGIN, *sections, END]) + after, encoding="utf-8")
    print(f"{readme}: {len(files)} result(s) written")
    return 0


def section(document: dict[str, Any], file: Path) -> str:
    """One result file: the machine, the command that measured it, its tables."""
    asked, machine = document["asked"], document["machine"]
    title = f"**{document['model']}** on {machine['device']} ({machine['threads']} CPU threads, "
    title += f"{document['weights']['dtype']}, torch "
    title += f"{machine['torch']}, transformers {machine['transformers']}), medians of {asked['repeats']} rounds"
    command = document["command"].replace(
        " --json ", " --output "
    )  # what a file was measured with, as it is written now
    source = f"`{command}` ([file](benchmarks/results/{file.name}))"
    grids = growth_grids(document) if document["growth"] else [summary(document)]
    return "\n\n".join([title + ":", source, *document["notes"], *map(markdown, grids)])


if __name__ == "__main__":
    raise SystemExit(main())
