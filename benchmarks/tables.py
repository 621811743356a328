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

import torch

from benchmarks.blocks import rewrite, table
from ivtp import flops, list_compressors, list_hosts, list_methods
from ivtp.config import PruneConfig
from ivtp.cost.sizes import sizes
from ivtp.evaluation.reproduce.base import shown, shown_difference
from ivtp.evaluation.reproduce.complexity import PRINTED
from ivtp.hosts.base import Host
from ivtp.micro.world.crowds import crowd_name
from ivtp.plan import PLACES
from ivtp.registry import compressor_class, host_class, method_class
from ivtp.towers.base import TextTower, Tower, VisionTower

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ROOT / "results" / "figure3.json"
IN_README = ("none", "ivtp+", "ivtp", "topk", "random")
"""And the best RIVALS others."""
RIVALS = 4
IN_README_AT = (16, 64)
COSTED = "llava-1.5-7b"
PUBLISHED = {line.options["compressor"]: f"{line.tflops:.1f}" for line in PRINTED if "compressor" in line.options}
"""TFLOPs of `COSTED` with 64 tokens of an image and 512 of prompt, in the IVTP paper."""
Row = dict[str, Any]


def blocks() -> dict[Path, dict[str, str]]:
    """Every page with what it holds between its marks."""
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": {"families": named_families(), "methods": named_methods(), "results": results()},
        docs / "methods.md": {"methods": methods()},
        docs / "families.md": {"families": families()},
        docs / "results.md": {"compared": compared(), "gates": gates()},
        docs / "configuration.md": {"fields": fields(), "options": options()},
        docs / "compressors.md": {"compressors": compressors()},
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


def named_methods() -> str:
    """Every method by its name."""
    return " · ".join(f"`{name}`" for name in list_methods())


def methods() -> str:
    """A row for each method: the first line of its file, and its `MethodInfo`."""
    stages = {"vision": "encoder", "llm": "decoder", "both": "both"}
    rows = []
    for name in list_methods():
        kind = method_class(name)
        info = kind.info
        line = what_it_is(kind)
        if info.trainable:
            line += " (untrained here)"
        paper = f"[{info.year}]({info.paper})" if info.paper.startswith("http") else "–"
        rows.append((f"`{name}`", line, stages[info.stage], "yes" if info.guided else "–", paper))
    return table(("method", "what it is", "cuts in", "reads the question", "paper"), rows)


def compressors() -> str:
    """A row for each trained projector: its file's first line, its `CompressorInfo`, and what it costs."""
    geometry, rows = sizes(COSTED).geometry, []
    for name in list_compressors():
        kind = compressor_class(name)
        info = kind.info
        tokens = 64 if name != "mlp" else geometry.num_patches
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in kind(geometry, tokens).parameters())
        total = flops(COSTED, compressor=name, keep=tokens, text_tokens=512).total
        cells = (f"{parameters / 1e6:.0f} M", f"{total / 1e12:.3f}", PUBLISHED.get(name, "–"))
        question = "yes" if info.reads_question else "–"
        rows.append((f"`{name}`", what_it_is(kind), info.counts, question, *cells, f"[{info.year}]({info.paper})"))
    header = ("compressor", "what it is", "tokens", "reads the question", "parameters", "TFLOPs", "published", "paper")
    return table(header, rows)


def what_it_is(kind: type[Any]) -> str:
    """The first line of a class's file, without the paper that it names."""
    line = inspect.getdoc(inspect.getmodule(kind)).partition("\n")[0].rstrip(".")
    return re.sub(r" \([^()]*(?:arXiv|doi)[^()]*\)$", "", line)


def results() -> str:
    """The comparison's main rows at 16 and 64 tokens, simple and crowded photos apart, and their cost."""
    crowds = (crowd_name(0), crowd_name(2))
    header = ["method"]
    for keep in IN_README_AT:
        header += [f"{keep} tokens", *(f"{crowd}" for crowd in crowds), "GFLOPs"]
    others = [name for name in by_mean(IN_README_AT) if name not in IN_README]
    made = []
    for name in (*IN_README, *others[:RIVALS]):
        cells = [label(name)]
        for keep in IN_README_AT:
            row = row_of(name, keep)
            cells += [shown(row, "mean"), *(f"{row['objects'][crowd]['mean']:.1f}" for crowd in crowds)]
            cells.append(f"{1000 * row['tflops']:.1f}")
        made.append(tuple(cells))
    return table(tuple(header), made)


def compared() -> str:
    """All rows of the comparison, best mean first; then simple and crowded photos apart; then paired differences."""
    keeps = tuple(sorted({row["keep"] for row in measured()} - {"all"}))
    names = ["none", *by_mean(keeps)]
    header = ["method", *(f"{keep} tokens" for keep in keeps), *(f"GFLOPs, {keep}" for keep in keeps)]
    first = []
    for name in names:
        rows = [row_of(name, keep) for keep in keeps]
        costs = [f"{1000 * row['tflops']:.1f}" for row in rows]
        first.append((label(name), *(shown(row, "mean") for row in rows), *costs))
    crowds = (crowd_name(0), crowd_name(2))
    apart = ("method", *(f"{keep}: {crowd}" for keep in keeps for crowd in crowds))
    second = [
        (label(n), *(f"{row_of(n, k)['objects'][crowd]['mean']:.1f}" for k in keeps for crowd in crowds)) for n in names
    ]
    made = [table(tuple(header), first), table(apart, second)]
    for other, side in (("all tokens", "change"), ("IVTP", "to ivtp"), ("the best", "to best")):
        gaps = (f"to {other}", *(f"{keep} tokens" for keep in keeps))
        lines = [(label(n), *(shown_difference(row_of(n, k), side) for k in keeps)) for n in names[1:]]
        made.append(table(gaps, lines))
    return "\n\n".join(made)


def by_mean(keeps: tuple[int, ...]) -> list[str]:
    """Methods that were measured at all these numbers of tokens, the best mean first."""
    found = dict.fromkeys(row["method"] for row in measured() if row["method"] != "none")
    there = {(row["method"], row["keep"]) for row in measured()}
    whole = [name for name in found if all((name, keep) in there for keep in keeps)]
    return sorted(whole, key=lambda name: -sum(row_of(name, keep)["mean"] for keep in keeps))


def label(name: str) -> str:
    """A method's name as the tables of results show it."""
    if name == "none":
        return "all 576 tokens"
    return f"`{name}`" + " (untrained)" * method_class(name).info.trainable


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
    rows: list[Row] = json.loads(COMPARED.read_text(encoding="utf-8"))["rows"]
    return rows


def row_of(name: str, keep: int) -> Row:
    """One method at one count; the full model has a single row."""
    return next(row for row in measured() if row["method"] == name and row["keep"] in (keep, "all"))


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
