"""How the command line words its results: for people, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ivtp.cli.door import printable
from ivtp.cost.answer import Cost, unit_of

if TYPE_CHECKING:
    from ivtp.cost.prefill import FlopsReport
    from ivtp.generate import Answer
    from ivtp.trace import PruneTrace, Word

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def wide(width: int) -> Console:
    """The standard output for tables of so many columns: what is cut off to fit a terminal says nothing."""
    return Console(highlight=False, width=max(out.width, width))


PARTS = ("vision", "projector", "llm", "head", "pruning")


def print_answer(answer: Answer, cost: Cost, *, streamed: bool = False) -> None:
    """The answer on the standard output (where it was not `streamed`), everything about it on the standard error."""
    if not streamed:
        out.print(answer.text, markup=False, soft_wrap=True)
    time = f"{1000 * answer.seconds:.0f} ms"
    err.print(f"{cost.tokens()} visual tokens, prefill {cost.flops()}, {time}", markup=False)
    words = answer.trace.words[0] if answer.trace and answer.trace.words else []
    if words:
        used = guided_by(words) or "the image alone, no word passed the threshold"
        err.print(f"guided by: {used}", markup=False)
    for note in answer.notes:
        err.print(f"note: {note}", markup=False, soft_wrap=True)


def guided_by(words: Sequence[Word], most: int = 10) -> str:
    """The words of the pseudo CLS token with their relevance, each once: the `most` relevant ones, as they were asked.

    For example "left 0.31, dog 0.24".
    """
    best: dict[str, float] = {}
    for word in words:
        if word.used:
            best[word.text] = max(word.score, best.get(word.text, word.score))
    shown = set(sorted(best, key=lambda text: -best[text])[:most])
    named = ", ".join(f"{printable(text)} {score:.2f}" for text, score in best.items() if text in shown)
    return named + (f" and {len(best) - most} less relevant words" if len(best) > most else "")


def terminal_streamer(processor: Any) -> Any:
    """Prints an answer word by word where the standard output is a terminal; None elsewhere."""
    if not out.is_terminal:
        return None
    from transformers import TextStreamer

    class Printing(TextStreamer):  # type: ignore[misc]  # transformers' classes are untyped here
        """Without blanks in front, and without what would move the cursor; calls `before` ahead of the first word."""

        before: Any = None
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            if text and not self.begun:
                self.begun = True
                if self.before is not None:
                    self.before()
            shown = "\n".join(printable(line) for line in text.split("\n"))
            out.print(shown, end="\n" if stream_end else "", markup=False, soft_wrap=True)

    return Printing(getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True)


def answer_json(
    answer: Answer, cost: Cost, model: str, method: str, image: str | list[str], picture: Path | None
) -> dict[str, Any]:
    """The document of `ivtp ask --json`."""
    trace = answer.trace
    return {
        "image": image,
        "question": answer.question,
        "answer": answer.text,
        "model": model,
        "method": method,
        "tokens": {"all": cost.patches, "kept": cost.kept, "equivalent": _equivalent(trace, cost)},
        "flops": {"full": cost.full, "pruned": cost.pruned},
        "seconds": answer.seconds,
        "stages": [
            {
                "where": stage.where,
                "layer": stage.layer,
                "kept": stage.kept[0].tolist(),
                "sources": None if stage.sources is None else stage.sources[0].tolist(),
                "stand_ins": [] if stage.stand_ins is None else stage.kept[0][stage.stand_ins[0]].tolist(),
            }
            for stage in (trace.stages if trace else [])
        ],
        "words": [asdict(word) for word in (trace.words[0] if trace and trace.words else [])],
        "fallback": bool(trace and trace.fallback and trace.fallback[0]),
        "notes": list(answer.notes),
        "picture": None if picture is None else str(picture),
    }


def _equivalent(trace: PruneTrace | None, cost: Cost) -> list[float]:
    """Visual tokens that enter and that leave the decoder's layers, on average."""
    counted = trace.tokens_per_layer if trace else None
    return [float(cost.patches)] * 2 if counted is None else list(counted.equivalent)


def parts(report: FlopsReport) -> dict[str, float]:
    """FLOPs part by part, and in total."""
    return {name: getattr(report, name) for name in (*PARTS, "total")}


def print_flops(full: FlopsReport, pruned: FlopsReport, *, batch: int = 1, images: int = 1) -> None:
    """Both costs side by side, with the difference in percent of the printed totals, as papers print it."""
    size, unit = unit_of(full.total)
    totals = [round(report.total / size, 1) for report in (full, pruned)]
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    table.add_column(unit, "total")
    table.add_column(f"all {full.keep} tokens", f"{totals[0]}", justify="right")
    table.add_column(f"{pruned.method}, {pruned.keep} tokens", f"{totals[1]}", justify="right")
    for name in PARTS:
        table.add_row(name, *(f"{getattr(report, name) / size:.3f}" for report in (full, pruned)))
    several = f", {images} images in each prompt" if images > 1 else ""
    several += f", {batch} prompts at once" if batch > 1 else ""
    out.print(f"{full.model}, {full.text_tokens} prompt tokens{several}", markup=False)
    out.print(table)
    printed, exact = totals[1] / totals[0] - 1, pruned.total / full.total - 1
    entering, leaving = pruned.equivalent
    if entering != leaving:
        out.print(f"equivalent tokens: {entering:.1f} enter a layer of the decoder on average, {leaving:.1f} leave it")
    out.print(f"cost: {100 * printed:+.1f}% (of the unrounded totals {100 * exact:+.2f}%)")
    for note in pruned.notes:
        out.print(f"note: {note}", markup=False)


def print_json(document: Any) -> None:
    """One document on the standard output, a line for a key or, where it holds a list of objects, for each of these."""
    _write(_pretty(document, ascii_too=False), _pretty(document, ascii_too=True))


def print_json_list(documents: Iterable[Any]) -> None:
    """A list of documents, each as `print_json` writes it."""
    whole = list(documents)
    plain, escaped = (",\n".join(_pretty(document, ascii_too) for document in whole) for ascii_too in (False, True))
    _write(f"[\n{plain}\n]", f"[\n{escaped}\n]")


def print_json_line(document: Any) -> None:
    """A document in one line."""
    _write(json_line(document), json.dumps(document))


def json_line(document: Any) -> str:
    """A document in one line, without its end."""
    return json.dumps(document, ensure_ascii=False)


def _pretty(document: Any, ascii_too: bool) -> str:
    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_too)

    def parts_of(value: Any, indent: str) -> str:
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            return "[\n" + ",\n".join(f"{indent}  {one(part)}" for part in value) + f"\n{indent}]"
        return one(value)

    if not isinstance(document, dict):
        return parts_of(document, "")
    return "{\n" + ",\n".join(f"  {one(key)}: {parts_of(value, '  ')}" for key, value in document.items()) + "\n}"


def _write(text: str, escaped: str) -> None:
    """`escaped` where the standard output has no such characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = escaped
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def bar(total: int, title: str) -> Iterator[Callable[[int], Any]]:
    """A progress bar over so many steps on the standard error, where that is a terminal; it is told of each more."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda more: progress.advance(task, more)
