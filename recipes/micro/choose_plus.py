"""What IVTP+ is made of, chosen on the validation split: ``python -m recipes.micro.choose_plus``.

Every row changes one thing of the default; its difference to it is paired, question by question. ``--ablate`` leaves
one ingredient out in each row, on the test split: once, when all is chosen. Questions are the twelve formats', in
equal numbers; several of them share a photo, so that the intervals are a little too narrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from ivtp.cli.door import quiet, run
from ivtp.core.rollout import attention_row, importance
from ivtp.cost.flops import flops
from ivtp.evaluation.compare import Bench
from ivtp.evaluation.scoring import Table, interval, write_json
from ivtp.evaluation.units import Unit, by_format, gap
from ivtp.files.machine import processor_name
from ivtp.files.outputs import check_output, write_text
from ivtp.methods.base import Merged, Plan, Window
from ivtp.methods.ivtp_plus import IvtpPlus
from ivtp.micro import world

PROMPT = 48
"""Tokens of the prompt that GFLOPs are counted with."""
Scored = list[tuple[Unit, list[float]]]


class Dropping(IvtpPlus):
    """What would merge is dropped."""

    def merge(self, window: Window) -> Merged | None:
        """The tokens that stay, as they were."""
        merged = super().merge(window)
        if merged is None:
            return None
        columns = torch.arange(merged.into.shape[1], device=merged.into.device)
        return Merged(window.hidden, torch.where(merged.into == columns, columns, -1), scores=merged.scores)


class ByImportance(IvtpPlus):
    """The encoder drops the least important tokens, as IVTP does."""

    def merge(self, window: Window) -> Merged | None:
        """Nothing merges: `score` chooses."""
        return None


class LayerWise(IvtpPlus):
    """The attention of a group's last layer in the place of the rollout."""

    def score(self, window: Window) -> torch.Tensor:
        """Eq. 4 of one layer's row."""
        tap = window.taps[-1]
        return importance(attention_row(tap, window.reference), tap.value, window.visual)


class Unguided(IvtpPlus):
    """The last token of the prompt in the place of the pseudo CLS token."""

    def make_plan(self) -> Plan:
        """The same cuts without a guide."""
        return Plan(super().make_plan().cuts)


@dataclass(frozen=True)
class Variant:
    """A row: what differs from the default."""

    name: str
    method: Any = IvtpPlus
    options: dict[str, Any] = field(default_factory=dict)
    between: int | None = None
    """Tokens that leave the encoder."""

    def fits(self, keep: int) -> bool:
        """Whether it can keep so many."""
        return self.between is None or self.between >= keep

    def asked(self, keep: int) -> dict[str, Any]:
        """Options of `attach` and `flops`."""
        schedule = {} if self.between is None else {"schedule": (self.between, keep)}
        return {**self.options, **schedule}


DEFAULT = Variant("default")
CHOICES = (
    DEFAULT,
    *(Variant(f"importance={power:g}", options={"importance": power}) for power in (0.0, 0.25, 0.5, 1.0)),
    *(Variant(f"group_layers={layers}", options={"group_layers": layers}) for layers in (1, 2)),
    *(Variant(f"{count} tokens between the stages", between=count) for count in (32, 48, 64, 80, 100, 128, 160)),
    *(Variant(f"guide={guide}", options={"guide": guide}) for guide in ("text", "weighted", "visual")),
)
ABLATED = (
    DEFAULT,
    Variant("dropped, not merged", Dropping),
    Variant("the least important dropped", ByImportance),
    Variant("no redundancy", options={"importance": 8.0}),
    Variant("layer-wise, not rollout", LayerWise),
    Variant("no pseudo CLS token", Unguided),
    Variant("no instruction", options={"guide": "visual"}),
    Variant("IVTP", "ivtp"),
)


def rows(bench: Bench, variants: Iterable[Variant], keep: int) -> Iterator[dict[str, Any]]:
    """A row for each variant at `keep` tokens, the default first."""
    reference: Scored | None = None
    for variant in variants:
        if not variant.fits(keep):
            continue
        scored = bench.score(bench.attach(variant.method, keep, "original", **variant.asked(keep)))
        reference = reference or scored
        mean = by_format(scored, "accuracy")["mean"]
        cost = flops(bench.model, method=variant.method, keep=keep, text_tokens=PROMPT, **variant.asked(keep))
        yield {
            "variant": variant.name,
            **mean,
            **interval("to the default", *gap(scored, reference)),
            "GFLOPs": round(cost.total / 1e9, 2),
        }


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    keep: Annotated[list[int] | None, typer.Option(min=1, max=world.GRID**2, help="tokens that stay (repeat)")] = None,
    questions: Annotated[int, typer.Option(min=1, help="questions in all, in equal numbers of every format")] = 520,
    ablate: Annotated[bool, typer.Option("--ablate", help="one ingredient off in each row, on the test split")] = False,
    batch: Annotated[int, typer.Option(min=1, help="questions at once")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file for all numbers")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
) -> None:
    check_output(output, "--output")
    check_output(markdown, "--markdown", inputs=(output,))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    quiet()
    split, variants = ("test", ABLATED) if ablate else ("validation", CHOICES)
    bench = Bench("micro", questions, batch, "float32", split)
    about: dict[str, Any] = {"split": split, "questions": len(bench.examples), "torch": torch.__version__}
    about |= {"dtype": "float32", "machine": f"{processor_name()}, {threads} CPU threads"}
    tables: list[Table] = []
    for count in keep or [16, 32, 64, 128]:
        title = f"IVTP+ at {count} of {world.GRID**2} tokens, {len(bench.examples)} questions of the {split} split"
        fitting = [variant for variant in variants if variant.fits(count)]
        found = track(rows(bench, fitting, count), f"{count} tokens", len(fitting), console=Console(stderr=True))
        tables.append(Table(title, list(found)))
        console.print(Markdown(tables[-1].markdown()))
        if output is not None:
            write_json(output, tables, about)
        if markdown is not None:
            write_text(markdown, "\n".join(table.markdown() for table in tables), "--markdown")


if __name__ == "__main__":
    run(app)
