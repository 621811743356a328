"""Write the generated parts of README.md and of docs/: `make tables`.

Methods, model families and options are read from the library's own files, figures from results/*.json.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from benchmarks.blocks import rewrite, table
from ivtp import list_hosts, list_methods
from ivtp.config import PruneConfig
from ivtp.evaluation.units import crowd_name
from ivtp.hosts.base import Host
from ivtp.plan import PLACES
from ivtp.registry import host_class, method_class
from ivtp.towers.base import TextTower, Tower, VisionTower

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ROOT / "results" / "micro-compare.json"
CHANGED = ("dart", "hiprune", "prumerge", "prumerge+", "sparsevlm")
"""Methods that choose otherwise since `COMPARED` was measured; to be emptied when it is measured anew."""
IN_README = ("none", "ivtp", "topk", "random", "tome", "divprune", "pyramiddrop")
"""The full model, IVTP, the two baselines, and its strongest rivals that are not in `CHANGED`."""
Row = dict[str, Any]


def blocks() -> dict[Path, dict[str, str]]:
    """Every page with what it holds between its marks."""
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": {"families": named_families(), "methods": methods(), "results": results()},
        docs / "results.md": {"compared": compared(), "gates": gates()},
        docs / "configuration.md": {"fields": fields(), "options": options()},
        docs / "families.md": {"families": families()},
        docs / "add_host.md": {"host": members(Host), "towers": members(Tower, VisionTower, TextTower)},
    }


def named_families() -> str:
    """Every model family by its name and its class."""
    return " · ".join(f"`{name}` ({host_class(name).model_class})" for name in list_hosts())


def families() -> str:
    """A row for each model family: its class's docstring, which ends with a paragraph `Refuses: ...`, and its facts."""
    rows = []
    for name in list_hosts():
        host = host_class(name)
        text = inspect.cleandoc(host.__doc__)
        refused = re.search(r"^Refuses: (.*?)(?=\n\n|\Z)", text, re.M | re.S)
        if refused is None:
            raise ValueError(f"hosts/{name}.py: the docstring of its class has no paragraph `Refuses: ...`")
        taken = one_line(text.partition("\n\n")[0]).rstrip(".")
        cuts = ", ".join(text for place, text in PLACES.items() if place in host.cuts)
        summary = "its own" if "cls" in host.gives else "the mean row"
        rows.append((f"`{name}`", taken, cuts, summary, one_line(refused[1]).rstrip(".")))
    return table(("family", "what is taken", "cuts in the encoder", "CLS", "what is refused, in one line"), rows)


def methods() -> str:
    """A row for each method: the first line of its file, and its `MethodInfo`."""
    stages = {"vision": "encoder", "llm": "decoder", "both": "both"}
    rows = []
    for name in list_methods():
        kind = method_class(name)
        info = kind.info
        line = inspect.getdoc(inspect.getmodule(kind)).partition("\n")[0].rstrip(".")
        line = re.sub(r" \([^()]*(?:arXiv|doi)[^()]*\)$", "", line)
        if info.trainable:
            line += " (untrained here)"
        paper = f"[{info.year}]({info.paper})" if info.paper.startswith("http") else "–"
        rows.append((f"`{name}`", line, stages[info.stage], "yes" if info.guided else "–", paper))
    return table(("method", "what it is", "cuts in", "reads the question", "paper"), rows)


def results() -> str:
    """The comparison's main rows at 16 and 64 tokens, simple and crowded photos apart."""
    return overview(IN_README, (16, 64), apart())


def compared() -> str:
    """All rows of the comparison, best mean accuracy first; then the same for simple and crowded photos."""
    keeps = tuple(sorted({row["keep"] for row in measured()} - {576}))
    found = {row["method"] for row in measured()}
    mean = {name: sum(row_of(name, keep)["accuracy"] for keep in keeps) for name in found}
    names = sorted(found, key=lambda name: -mean[name])
    made = [overview(names, keeps)]
    if crowds := apart():
        header = ("method", *(f"{keep}: {crowd}" for keep in keeps for crowd in crowds))
        rows = [(label(name), *crowd_cells(name, keeps, crowds)) for name in names]
        made.append(table(header, rows))
    return "\n\n".join(made)


def overview(names: typing.Iterable[str], keeps: tuple[int, ...], crowds: tuple[str, ...] = ()) -> str:
    """Each method's accuracies with their intervals, those of some crowds, GFLOPs and milliseconds at every count."""
    header = ["method", *(f"{keep} tokens" for keep in keeps)]
    header += [f"{keep}: {crowd}" for keep in keeps for crowd in crowds]
    header += [f"{unit}, {keep}" for unit in ("GFLOPs", "ms") for keep in keeps]
    made = []
    for name in names:
        rows = [row_of(name, keep) for keep in keeps]
        cells = [share(row, "accuracy") for row in rows] + crowd_cells(name, keeps, crowds)
        cells += [f"{row['GFLOPs']:.1f}" for row in rows] + [f"{row['ms a prefill']:.0f}" for row in rows]
        made.append((label(name), *cells))
    return table(tuple(header), made)


def crowd_cells(name: str, keeps: tuple[int, ...], crowds: tuple[str, ...]) -> list[str]:
    """A method's accuracies for photos of so many objects, at every count."""
    return [share(row_of(name, keep)["by objects"][crowd], "accuracy") for keep in keeps for crowd in crowds]


def apart() -> tuple[str, ...]:
    """Simple and crowded photos; neither where the comparison was measured without telling them apart."""
    return tuple(crowd for crowd in (crowd_name(0), crowd_name(2)) if all("by objects" in row for row in measured()))


def label(name: str) -> str:
    """A method's name as the tables of results show it."""
    if name == "none":
        return "all 576 tokens"
    return f"`{name}`" + " †" * (name in CHANGED) + " (untrained)" * method_class(name).info.trainable


def gates() -> str:
    """The mean of the twelve formats under every condition of the first two gates."""
    header, cells = ["mean of"], ["twelve formats"]
    for number in (1, 2):
        tables = json.loads((ROOT / "results" / f"micro-gates-{number}.json").read_text(encoding="utf-8"))["tables"]
        mean = next(row for row in tables[0]["rows"] if row["format"] == "mean")
        for column in [name for name in mean if f"{name} low" in mean]:
            title = "all tokens" if column == "test" else column
            if title not in header:
                header.append(title)
                cells.append(share(mean, column))
    return table(tuple(header), [tuple(cells)])


def fields() -> str:
    """A row for each field of `PruneConfig`: values, default, its docstring, and which methods read it."""
    types, texts = typing.get_type_hints(PruneConfig), field_texts(PruneConfig)
    rows = []
    for field in dataclasses.fields(PruneConfig):
        readers = [f"`{name}`" for name in list_methods() if field.name in method_class(name).reads]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        rows.append(
            (
                f"`{field.name}`",
                values(types[field.name]),
                code(default),
                texts[field.name],
                ", ".join(readers) or "all",
            )
        )
    return table(("field", "values", "default", "what it means", "read by"), rows)


def options() -> str:
    """A row for each method with options of its own."""
    rows = []
    for name in list_methods():
        kind = method_class(name).Options
        own = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        if not own:
            continue
        types, texts = typing.get_type_hints(kind), field_texts(kind)
        listed = "; ".join(f"`{f.name}` = {code(f.default)} ({values(types[f.name])})" for f in own)
        meaning = "; ".join(f"`{n}`: {text}" for n, text in texts.items()) or one_line(inspect.getdoc(kind) or "")
        rows.append((f"`{name}`", listed, meaning))
    return table(("method", "option = default (values)", "what it means"), rows)


def members(*kinds: type[Any]) -> str:
    """A row for each public member of the classes: whether a family must give it, and what it is."""
    rows = []
    for kind in kinds:
        texts = field_texts(kind)
        for node in class_body(kind):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, must = node.target.id, node.value is None
                text = texts.get(name) or f"a `{ast.unparse(node.annotation)}`"
            elif isinstance(node, ast.FunctionDef):
                name, must = node.name, "NotImplementedError" in ast.unparse(node.body[-1])
                text = (ast.get_docstring(node) or "").partition("\n\n")[0]
            else:
                continue
            if not name.startswith("_") or name == "__init__":
                owner = f"{kind.__name__}." if len(kinds) > 1 else ""
                rows.append((f"`{owner}{name}`", "yes" if must else "–", one_line(text)))
    return table(("member", "must be given", "what it is"), rows)


def class_body(kind: type[Any]) -> list[ast.stmt]:
    """What stands in a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    return node.body


def field_texts(kind: type[Any]) -> dict[str, str]:
    """The docstrings that stand below the fields of a class, those that it inherits first."""
    body = [part for base in reversed(kind.__mro__) if base is not object for part in class_body(base)]
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = one_line(ast.literal_eval(text.value))
    return found


def values(kind: Any) -> str:
    """What an annotation admits, without the sign that would end a table's cell."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    parts = typing.get_args(kind) if "|" in str(kind) else (kind,)
    names = [re.sub(r"\btyping\.|collections\.abc\.", "", getattr(p, "__name__", str(p))) for p in parts]
    return " or ".join(name.replace("NoneType", "None") for name in names)


def code(value: object) -> str:
    """A default, as it would be typed."""
    return f"`{value!r}`"


def one_line(text: str) -> str:
    """Text of several lines as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def measured() -> list[Row]:
    """The rows of the comparison."""
    rows: list[Row] = json.loads(COMPARED.read_text(encoding="utf-8"))["tables"][0]["rows"]
    return rows


def row_of(name: str, keep: int) -> Row:
    """One method at one count; the full model has a single row."""
    return next(row for row in measured() if row["method"] == name and row["keep"] in (keep, 576))


def share(row: Row, column: str) -> str:
    """A share in percent with its 95% interval."""
    value, low, high = (100 * row[f"{column}{end}"] for end in ("", " low", " high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def main() -> None:
    """Write them, and say what changed."""
    for page, contents in blocks().items():
        print(f"{page.relative_to(ROOT)}: {'written' if rewrite(page, contents) else 'unchanged'}")


if __name__ == "__main__":
    main()
