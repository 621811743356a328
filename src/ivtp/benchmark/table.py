"""The numbers as tables: for the terminal and for a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ivtp.benchmark.results import Document, Row


@dataclass(frozen=True)
class Grid:
    """A table before anyone draws it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def number(value: float | None) -> str:
    """Four digits, and no exponent; "-" for none."""
    if value is None:
        return "-"
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{min(max(decimals, 0), 4)}f}"


def ratio(value: float | None) -> str:
    """Two decimals."""
    return "-" if value is None else f"{value:.2f}"


def in_units(unit: float) -> Callable[[float | None], str]:
    """Numbers in `unit`."""
    return lambda value: number(None if value is None else value / unit)


Column = tuple[str, str, Callable[[Any], str]]
"""Its title, the key of a row, and how its values are written."""

PREFILL: tuple[Column, ...] = (
    ("prefill ms", "prefill_ms", number),
    ("x oracle", "over_oracle", ratio),
    ("full / this", "full_over_this", ratio),
    ("in FLOPs", "full_over_this_flops", ratio),
    ("clock / FLOPs", "clock_over_flops", ratio),
)
PARTS: tuple[Column, ...] = (
    ("vision ms", "vision_ms", number),
    ("projector, guide ms", "between_ms", number),
    ("decoder ms", "decoder_ms", number),
    ("rest ms", "rest_ms", number),
)
DECODING: tuple[Column, ...] = (
    ("first token ms", "first_token_ms", number),
    ("decode ms", "decode_ms", number),
    ("stock, same cache", "stock_decode_ms", number),
    ("decode / stock", "decode_over_stock", ratio),
)
COST: tuple[Column, ...] = (
    ("peak MB", "peak_bytes", in_units(1e6)),
    ("cache MB", "cache_bytes", in_units(1e6)),
    ("cache tokens", "cache_tokens", str),
    ("GFLOPs", "flops", in_units(1e9)),
    ("GFLOP/s", "flops_per_second", in_units(1e9)),
)
COMPILED: tuple[Column, ...] = (
    ("compile s", "compile_seconds", number),
    ("graphs", "graphs", str),
    ("graph breaks", "graph_breaks", str),
    ("prefill ms, compiled", "prefill_ms", number),
    ("compiled / eager", "over_eager", ratio),
    ("", "error", lambda value: value or ""),
)


def grids(document: Document) -> list[Grid]:
    """Narrow tables for each configuration, the first of them with its title."""
    found = []
    for result in document["results"]:
        if "error" in result:
            found.append(Grid(title_of(result), ("",), [(result["error"],)]))
            continue
        rows = result["rows"]
        compiled = [{"run": row["run"], **row.get("compiled", {})} for row in rows]
        tables = [_grid(columns, rows) for columns in (PREFILL, PARTS, DECODING, COST)] + [_grid(COMPILED, compiled)]
        tables = [table for table in tables if len(table.header) > 1]
        found += [dataclasses.replace(tables[0], title=title_of(result)), *tables[1:]]
    return found


def summary(document: Document) -> Grid:
    """One table of all configurations, with what a reader compares."""
    columns = (*PREFILL, *(c for c in DECODING if c[1] != "stock_decode_ms"), *COST[:2])
    if any("compiled" in row for result in document["results"] for row in result.get("rows", [])):
        columns += tuple((title, f"compiled {key}", write) for title, key, write in COMPILED[1:-1])
    places = ("keep", "text", "images", "batch")
    lines = []
    for result in document["results"]:
        rows = result.get("rows") or [{"run": result["error"]}]
        rows = [row | {f"compiled {k}": v for k, v in row.get("compiled", {}).items()} for row in rows]
        place = tuple(str(result[name]) for name in places)
        lines += [(*place, *line) for line in _grid(columns, rows, complete=True).rows]
    return Grid("", (*places, "run", *(title for title, _, _ in columns)), lines)


def title_of(result: Row) -> str:
    """The configuration in words."""
    text = result.get("text_tokens", result["text"])
    return f"keep {result['keep']}, {text} text tokens, {result['images']} image(s), batch {result['batch']}"


def rich_table(grid: Grid) -> Table:
    """For the terminal."""
    table = Table(title=grid.title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(grid.header):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(grid: Grid) -> str:
    """For a page."""
    lines = [grid.header, tuple("---" if place == 0 else "---:" for place in range(len(grid.header))), *grid.rows]
    title = [f"{grid.title}:", ""] if grid.title else []
    return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines)])


def _grid(columns: tuple[Column, ...], rows: list[Row], *, complete: bool = False) -> Grid:
    """Columns that no row has are left out, unless the table has to be `complete`."""
    there = [column for column in columns if complete or any(row.get(column[1]) is not None for row in rows)]
    header = ("run", *(name for name, _, _ in there))
    cells = [(str(row["run"]), *(_cell(row, key, write) for _, key, write in there)) for row in rows]
    return Grid("", header, cells)


def _cell(row: Row, key: str, write: Callable[[Any], str]) -> str:
    value = row.get(key)
    return "-" if value is None and write is str else write(value)
