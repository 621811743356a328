"""The same question with several methods, side by side: a table, and the panels of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ivtp.cli.console import err, out
from ivtp.cost.answer import Cost

if TYPE_CHECKING:
    from ivtp.cli.models import Asked
    from ivtp.generate import Answer

Side = tuple[str, "Answer", Cost]
"""A method's title, its answer and what that cost."""


def side_by_side(
    asked: Asked, model: Any, processor: Any, photos: Sequence[Any], question: str, methods: Mapping[str, str]
) -> list[Side]:
    """One answer for each method (title to name), timed behind a first one that pays for set-up."""
    sides = []
    for title, method in methods.items():
        with err.status(escape(f"{title}: {question}")), asked.asking(model, processor, method) as answer:
            for _ in range(2):
                found = answer(list(photos), question)
        sides.append((title, found, Cost.of(model, found)))
    return sides


def print_side_by_side(question: str, sides: Sequence[Side], *, titled: bool) -> None:
    """The table of one question, and what has to be known of the answers."""
    if titled:
        out.print(f"\n{question}", markup=False, soft_wrap=True)
    table = Table("", "answer", "visual tokens", "prefill", "time", box=None, pad_edge=False)
    for title, answer, cost in sides:
        table.add_row(title, escape(answer.text), cost.tokens(), cost.flops(), f"{1000 * answer.seconds:.0f} ms")
    out.print(table)
    notes = dict.fromkeys(note for _, answer, _ in sides for note in answer.notes)
    for note in notes:
        err.print(f"note: {note}", markup=False, soft_wrap=True)


def panels(sides: Sequence[Side], right: str | None = None) -> list[Any]:
    """The panels of `draw_comparison`; `right`: the right answer, where it is known."""
    from ivtp.micro.formats.base import normalise
    from ivtp.visualize import Panel

    def is_right(answer: Answer) -> bool | None:
        return None if right is None else normalise(answer.text) == normalise(right)

    return [
        Panel(f"{title}: {cost.tokens()}", answer.trace, answer.text, cost.flops(), is_right(answer))
        for title, answer, cost in sides
    ]
