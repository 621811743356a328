"""What a prefill costs against the tokens of text and image, beside what the paper prints: counted, not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ivtp.cost.flops import flops
from ivtp.cost.sizes import sizes
from ivtp.evaluation.asked import Row
from ivtp.evaluation.reproduce import base

MODELS = ("llava-1.5-7b", "llava-1.5-13b")
METHODS = ("ivtp", "ivtp+", "topk", "tome", "fastv", "sparsevlm", "pyramiddrop")
"""Those whose cost differs. Behind the encoder all cost what TopK does, but for choosing; inside it what ToMe does."""
TEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Tokens of the prompt, with one placeholder for the image."""
KEEPS = (16, 32, 64, 128, 192, 256, 384, 512, 576)
TEXT, KEEP = 512, 64
"""Where the other number is varied; the setting of the paper's table."""
SHORT = 70
"""Percent that short prompts save "up to", in the paper's words."""


@dataclass(frozen=True)
class Printed:
    """A row of the paper's table (doi 10.1007/978-3-031-72643-9_13), of MODELS[0] at KEEP and TEXT."""

    title: str
    tflops: float
    method: str
    """Ours; "none" with a compressor in its options."""
    options: Mapping[str, Any] = field(default_factory=dict)


PRINTED = (
    Printed("all tokens", 15.4, "none"),
    Printed("random, in the ViT", 8.0, "random", {"where": "layers"}),
    Printed("TopK, in the ViT", 8.0, "topk", {"where": "layers"}),
    Printed("spatial pooling, after the ViT", 8.1, "spatial"),
    Printed("EViT", 8.0, "evit"),
    Printed("ToMe", 8.0, "tome"),
    Printed("Honeybee (C-Abstractor)", 8.1, "none", {"compressor": "cabstractor"}),
    Printed("LLaMA-VID", 8.2, "none", {"compressor": "llamavid"}),
    Printed("Qwen-VL (resampler)", 8.1, "none", {"compressor": "resampler"}),
    Printed("IVTP", 8.2, "ivtp"),
)


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row for each model and method at each number of text tokens, and at each of visual ones."""
    models = (request.asked.model,) if request.asked.model else MODELS
    methods = ("none", *(request.methods or METHODS))
    asked = [(model, method, *point) for model in models for method in methods for point in points(model, method)]
    rows = []
    with report(len(asked), "prefills") as on_count:
        for one in asked:
            rows.append(count(*one))
            on_count(1)
    beside = printed() if MODELS[0] in models else []
    about = {"models": list(models), "published": beside}
    return base.Result("Complexity: TFLOPs of a prefill", rows, page(rows, beside), about, draw(rows))


def points(model: str, method: str) -> Iterator[tuple[str, int, int]]:
    """What is varied, text tokens and visual tokens."""
    patches = sizes(model).geometry.num_patches
    yield from (("text", text, min(KEEP, patches)) for text in TEXTS)
    if method != "none":
        yield from (("keep", TEXT, keep) for keep in KEEPS if keep <= patches)


def count(model: str, method: str, varied: str, text: int, keep: int) -> Row:
    """TFLOPs of one prefill, and what it saves in percent of the full model's."""
    full = flops(model, method="none", text_tokens=text).total
    row: Row = {"model": model, "method": method, "varied": varied, "text": text}
    if method == "none":
        return row | {"keep": "all", "tflops": full / 1e12, "saving": 0.0}
    total = flops(model, method=method, keep=keep, text_tokens=text).total
    return row | {"keep": keep, "tflops": total / 1e12, "saving": 100 * (1 - total / full)}


def printed() -> list[Row]:
    """The paper's table beside ours; savings are those of the printed totals, as the paper's are."""
    found: list[Row] = []
    for line in PRINTED:
        keep = {} if line.title == "all tokens" else {"keep": KEEP}
        asked = {"text_tokens": TEXT, **keep, **line.options}
        ours = flops(MODELS[0], method=line.method, **asked).total / 1e12
        found.append({"row": line.title, "published": line.tflops, "tflops": ours})
    for column in ("published", "tflops"):
        full = round(found[0][column], 1)
        for row in found:
            row[f"{column} saving"] = 100 * (1 - round(row[column], 1) / full)
    return found


def page(rows: Sequence[Row], beside: Sequence[Row]) -> str:
    """Published beside ours, then for each model the cost against both numbers of tokens."""
    parts = []
    if beside:
        parts += [f"## {MODELS[0]}, {KEEP} visual tokens, {TEXT} text tokens", compared(beside)]
        parts.append("Savings here are of the printed totals, as the paper's are, below of exact ones.")
    short = [row for row in rows if row["method"] == "ivtp" and row["varied"] == "text"]
    parts += [short_prompts(model, own) for model, own in groups(short, "model").items()]
    for model, own in groups(rows, "model").items():
        text, keep = (groups(own, "varied").get(name, []) for name in ("text", "keep"))
        parts += [f"## {model}: text tokens, {text[-1]['keep']} visual tokens", *grids(text, "text")]
        all_tokens = f"All tokens: {at_text(own)['tflops']:.3g} TFLOPs."
        parts += [f"## {model}: visual tokens, {TEXT} text tokens", all_tokens, *grids(keep, "keep")]
    return "\n\n".join(parts)


def compared(beside: Sequence[Row]) -> str:
    """The paper's table and ours."""
    header = ("TFLOPs", "published", "ours", "saving, published", "saving, ours")
    cells = []
    for row in beside:
        savings = (f"{row[name]:.1f}%" for name in ("published saving", "tflops saving"))
        cells.append((row["row"], f"{row['published']:.1f}", f"{row['tflops']:.1f}", *savings))
    return base.grid(header, cells)


def short_prompts(model: str, rows: Sequence[Row]) -> str:
    """What the paper says of them, beside IVTP's savings here."""
    reached = [row["text"] for row in rows if row["saving"] >= SHORT]
    ours = f"{rows[0]['saving']:.1f}% at {rows[0]['text']} text tokens"
    until = f", {SHORT}% or more up to {max(reached)}" if reached else ""
    return f'Short prompts save "up to {SHORT}%" (published); IVTP on {model} here: {ours}{until}.'


def groups(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """Rows by what stands in a column, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def at_text(rows: Sequence[Row]) -> Row:
    """The full model where visual tokens are varied."""
    return next(row for row in rows if row["method"] == "none" and row["text"] == TEXT)


def grids(rows: Sequence[Row], axis: str) -> list[str]:
    """TFLOPs, then what is saved in percent of the full model's: a row a method, a column for each number of tokens."""
    by_method = groups(rows, "method")
    numbers = [str(row[axis]) for row in next(iter(by_method.values()))]
    costs = [(title(name), *(f"{row['tflops']:.3g}" for row in own)) for name, own in by_method.items()]
    saved = [(name, *(percent(row["saving"]) for row in own)) for name, own in by_method.items() if name != "none"]
    return [base.grid(("TFLOPs", *numbers), costs), base.grid(("saved, %", *numbers), saved)]


def percent(value: float) -> str:
    """With one digit, and without the sign of a rounded zero."""
    return f"{round(value, 1) + 0.0:.1f}"


def title(method: str) -> str:
    """How tables and figure call a method."""
    return "all tokens" if method == "none" else method


def draw(rows: Sequence[Row]) -> Figure:
    """TFLOPs against text tokens and against visual ones: a colour a method, a line style a model."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    models = groups(rows, "model")
    styles = dict(zip(models, ("solid", "dashed"), strict=False))
    for place, varied in enumerate(("text", "keep")):
        axes = figure.add_subplot(1, 2, place + 1)
        for model, own in models.items():
            for number, (method, line) in enumerate(groups(own, "method").items()):
                look: dict[str, Any] = {"color": f"C{number - 1}" if number else "black", "linestyle": styles[model]}
                found = [row for row in line if row["varied"] == varied]
                if found:
                    columns = ([row[name] for row in found] for name in (varied, "tflops"))
                    axes.plot(*columns, marker=".", label=title(method) if model == rows[0]["model"] else None, **look)
                else:
                    axes.axhline(at_text(line)["tflops"], **look)
        axes.grid(alpha=0.3)
    left, right = figure.axes
    left.set(xscale="log", yscale="log", xlabel=f"text tokens ({KEEP} visual ones kept)")
    left.set_xticks(TEXTS, map(str, TEXTS))
    left.minorticks_off()
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("TFLOPs of a prefill, choosing included")
    left.legend(fontsize=8)
    left.set_title(", ".join(f"{style}: {model}" for model, style in styles.items()), fontsize=9)
    right.set(xlabel=f"visual tokens kept ({TEXT} text tokens)", ylim=(0, None), xticks=range(0, KEEPS[-1] + 1, 64))
    return figure
