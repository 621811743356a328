"""`ivtp methods`: all of them in a table, or one with its options and what they mean."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated, Any

import typer
from rich.table import Table

from ivtp.cli import arguments as given
from ivtp.cli.console import err, out, print_json, wide
from ivtp.cli.door import quiet
from ivtp.config import PruneConfig

_COLUMNS = ("name", "title", "year", "stage", "guided", "trainable", "merges")
_FOR_ALL = ("keep", "positions", "cache", "logits", "repruning", "seed")
_FLAGS = {"keep": "--keep", "seed": "--seed", "threshold": "--threshold"}


@given.spoken
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options and what they mean.")] = None,
    by_host: Annotated[bool, typer.Option("--hosts", help="Which model families take them, and why not.")] = False,
    as_json: given.Json = False,
) -> None:
    """List the pruning methods, or describe one of them.

    JSON: a list with name, title, year, stage, guided, trainable, merges, paper and note (what must be known of it) of
    each; of one method these, text and options (name, default, own: whether it is this method's alone, text).

    With --hosts a list with method, host, works, options (those that it works with) and refusal (the line that refuses
    it without them) of each.
    """
    from ivtp.registry import list_methods, method_class, method_name

    with err.status("reading"):
        names = list_methods() if name is None else [method_name(name)]
        kinds = {each: method_class(each) for each in names}
    if by_host:
        _list_by_host(names, as_json)
        return
    rows = [{"name": each, **asdict(kind.info)} for each, kind in kinds.items()]
    if name is not None:
        _describe(rows[0], kinds[names[0]], as_json)
    elif as_json:
        print_json(rows)
    else:
        _list(rows)


def _list(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row[column] for column in _COLUMNS)
        table.add_row(*(("yes" if v else "-") if isinstance(v, bool) else str(v) for v in cells))
    out.print(table)
    out.print("\npapers", style="bold")  # below the table: in a column they would be broken
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        out.print(f"{row['name']:<{width}}  {row['paper']}", markup=False, soft_wrap=True)
    out.print("\nnotes", style="bold")
    for row in rows:
        if row["note"]:
            out.print(f"{row['name']:<{width}}  {row['note']}", markup=False)
    out.print("\nOne method's options: ivtp methods NAME", markup=False)


def _list_by_host(names: list[str], as_json: bool) -> None:
    """A column for each family: `yes`, what a method works with, or `-`, and below the table why."""
    from ivtp.registry import host_classes, methods_on

    quiet()
    with err.status("trying"):
        found = {host: methods_on(host, names) for host in host_classes()}
    if as_json:
        cells = [(name, host, taken[name]) for name in names for host, taken in found.items()]
        print_json([{"method": m, "host": h, "works": t.options is not None, **asdict(t)} for m, h, t in cells])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", *found):
        table.add_column(title, no_wrap=True)
    for name in names:
        table.add_row(name, *(_cell(taken[name].options) for taken in found.values()))
    wide(32 * len(table.columns)).print(table)
    for host, taken in found.items():
        refused = [each.refusal for each in taken.values() if each.options is None]
        if refused:
            out.print(f"\nrefused by {host}", style="bold")
        for line in refused:
            out.print(line, markup=False, soft_wrap=True)


def _cell(options: Mapping[str, Any] | None) -> str:
    if options is None:
        return "-"
    return ",".join(f"{name}={value}" for name, value in options.items()) or "yes"


def _describe(row: dict[str, Any], kind: Any, as_json: bool) -> None:
    own = inspect.getdoc(kind.Options) if dataclasses.fields(kind.Options) else ""
    text = inspect.getdoc(kind) or ""
    options = _options(kind)
    if as_json:
        print_json({**row, "text": text, "own_options": own, "options": options})
        return
    out.print(f"{row['title']} ({row['year']}), {row['paper']}", style="bold", markup=False, soft_wrap=True)
    _print_text(text)
    if row["note"]:
        out.print(f"\nnote: {row['note']}", markup=False)
    out.print("\nits own options" if own else "\nno options of its own", style="bold")
    if own:
        _print_text(own)
    for mine, title in ((True, ""), (False, "\noptions that it shares with other methods")):
        if title:
            out.print(title, style="bold")
        for option in options:
            if option["own"] is mine:
                flag = _FLAGS.get(option["name"], f"--option {option['name']}=...")
                out.print(f"{flag}  (default {option['default']})", markup=False)
                if option["text"]:
                    _print_text(option["text"], indent=4)


def _print_text(text: str, indent: int = 0) -> None:
    """Paragraphs of a docstring, as wide as the terminal."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    for paragraph in paragraphs:
        for line in textwrap.wrap(paragraph, max(40, out.width - indent)):
            out.print(" " * indent + line, markup=False, soft_wrap=True)


def _options(kind: Any) -> list[dict[str, Any]]:
    """Every option that the method takes, its own first."""
    shared = [field for field in dataclasses.fields(PruneConfig) if field.name in {*_FOR_ALL, *kind.reads}]
    pairs = [(field, kind.Options, True) for field in dataclasses.fields(kind.Options)]
    pairs += [(field, PruneConfig, False) for field in shared]
    return [
        {"name": f.name, "default": _default(f), "own": own, "text": _texts(owner).get(f.name, "")}
        for f, owner, own in pairs
    ]


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "none" if field.default_factory is dataclasses.MISSING else str(field.default_factory())


def _texts(owner: type[Any]) -> dict[str, str]:
    """What stands below each field of a dataclass in its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):  # made while the program runs: a pair of methods
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(str(ast.literal_eval(text.value)))
    return found
