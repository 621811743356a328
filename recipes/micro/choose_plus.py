"""What IVTP+ is made of, chosen on the validation split: ``python -m recipes.micro.choose_plus``.

Every row changes one thing of the default; its difference to it is paired, question by question. ``--ablate`` leaves
one ingredient out in each row, on the test split: once, when all is chosen. Questions are the twelve formats', in
equal numbers; several of them share a photo, so that the intervals are a little too narrow.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor, nn

from ivtp.cli.door import quiet, run
from ivtp.core.merge import mean_by_size, sizes
from ivtp.core.schedule import groups, uniform_ratio
from ivtp.core.select import highest
from ivtp.cost.flops import flops
from ivtp.errors import ConfigError
from ivtp.files.machine import processor_name
from ivtp.files.outputs import check_output, write_text
from ivtp.methods.base import Merged, Plan, Window
from ivtp.methods.groups import GroupWise
from ivtp.methods.ivtp_plus import IvtpPlus, between
from ivtp.micro import world
from ivtp.plug import Pruner
from recipes.micro import plus_guides
from recipes.micro.bench import Bench
from recipes.micro.plus_guides import Guided, HighestOfWords, MeanOfWords, PeakedWords
from recipes.micro.scoring import Table, interval, write_json
from recipes.micro.units import Unit, by_format, gap

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


class Weighed(IvtpPlus):
    """Tokens merge by redundancy times importance: `power` of the rollout's share from CLS (Eq. 3-4)."""

    power = 0.5

    def make_plan(self) -> Plan:
        """All layers of a group are read, for the rollout."""
        size, options = self.geometry, self.options
        vision, llm = (groups(n, options.group_layers) for n in (size.vision_layers, options.llm_layers))
        return self.group_plan(vision, llm, between(size.num_patches, self.keep))

    def merge(self, window: Window) -> Merged | None:
        """The lowest importance ** power * (1 - cosine) goes."""
        if window.cut.where == "llm":
            return None
        assert window.sources is not None
        columns = torch.arange(window.hidden.shape[1]).expand(len(window.hidden), -1)
        unit = nn.functional.normalize(window.taps[-1].key.mean(dim=1), dim=-1)
        best, partner = (unit[:, 1::2] @ unit[:, 2::2].transpose(1, 2)).max(dim=2)  # without CLS
        loss = GroupWise.score(self, window)[:, 1::2] ** self.power * (1 - best)
        gone = highest(-loss, window.hidden.shape[1] - 1 - window.cut.keep)
        into = columns.scatter(1, 2 * gone + 1, 2 * partner.gather(1, gone) + 2)
        return Merged(mean_by_size(window.hidden, into, sizes(window.sources, window.patch)), into)


class Alike(IvtpPlus):
    """Tokens that resemble better ones are worth as much as without them."""

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 alone."""
        return GroupWise.score(self, window)


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
    between: Callable[[int], int] | None = None
    """Tokens that leave the encoder, by how many are kept."""

    def asked(self, keep: int) -> dict[str, Any]:
        """Options of `attach` and `flops`."""
        schedule = {} if self.between is None else {"schedule": (self.between(keep), keep)}
        return {**self.options, **schedule}

    def attach(self, bench: Bench, keep: int) -> Pruner | None:
        """Its pruner, at original positions."""
        if isinstance(self.method, type) and issubclass(self.method, Guided):
            return plus_guides.attach(bench.model, bench.processor, self.method, keep, **self.asked(keep))
        return bench.attach(self.method, keep, "original", **self.asked(keep))


def own(keep: int) -> int:
    """What IVTP+ hands on."""
    return between(world.GRID**2, keep)


def one_ratio(keep: int) -> int:
    """What IVTP hands on: two thirds of its groups are in the encoder."""
    return uniform_ratio(world.GRID**2, keep, 3)[1]


DEFAULT = Variant("default")
LESS = (
    Variant("dropped, not merged", Dropping),
    Variant("IVTP's choice in the encoder", "ivtp", between=own),
    Variant("every layer is a group", options={"group_layers": 1}),
    Variant("IVTP's share between the stages", between=one_ratio),
    Variant("all in the encoder", between=lambda keep: keep),
    Variant("no suppression", Alike),
    Variant("no pseudo CLS token", Unguided),
    Variant("no instruction", options={"guide": "visual"}),
)
"""One ingredient off. "IVTP's choice" chooses so in the decoder, too."""
ABLATED = (DEFAULT, *LESS, Variant("IVTP", "ivtp"))
CHOICES = (
    DEFAULT,
    *LESS,
    Variant("importance ** 0.5 in the encoder", Weighed),
    *(Variant(f"{more} more between the stages", between=partial(operator.add, more)) for more in (16, 24, 64, 80)),
    *(Variant(f"guide={guide}", options={"guide": guide}) for guide in ("text", "weighted")),
    Variant("relevant words by entropy", PeakedWords, {"guide": "weighted"}),
    Variant("all words by entropy", PeakedWords, {"guide": "weighted", "threshold": -1.0}),
    Variant("a pseudo CLS token a word, the highest", HighestOfWords),
    Variant("a pseudo CLS token a word, their mean", MeanOfWords),
    Variant("groups of 2 layers", options={"group_layers": 2}),
)


def named(names: Iterable[str], variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """The default and the variants of these names. Raises `ConfigError` for one that there is not."""
    known = {variant.name: variant for variant in variants}
    asked = list(dict.fromkeys((DEFAULT.name, *names)))
    for name in asked:
        if name not in known:
            raise ConfigError(f"--only: there is no row {name!r}; use one of {', '.join(known)}")
    return tuple(known[name] for name in asked)


def rows(bench: Bench, variants: Iterable[Variant], keep: int) -> Iterator[dict[str, Any]]:
    """A row for each variant at `keep` tokens, the default first."""
    reference: Scored | None = None
    for variant in variants:
        scored = bench.score(variant.attach(bench, keep))
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
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="rows beside the default (repeat)")] = None,
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
    variants = named(only, variants) if only else variants
    bench = Bench("micro", questions, batch, "float32", split)
    about: dict[str, Any] = {"split": split, "questions": len(bench.examples), "torch": torch.__version__}
    about |= {"dtype": "float32", "machine": f"{processor_name()}, {threads} CPU threads"}
    tables: list[Table] = []
    for count in keep or [16, 32, 64, 128]:
        title = f"IVTP+ at {count} of {world.GRID**2} tokens, {len(bench.examples)} questions of the {split} split"
        found = track(rows(bench, variants, count), f"{count} tokens", len(variants), console=Console(stderr=True))
        tables.append(Table(title, list(found)))
        console.print(Markdown(tables[-1].markdown()))
        if output is not None:
            write_json(output, tables, about)
        if markdown is not None:
            write_text(markdown, "\n".join(table.markdown() for table in tables), "--markdown")


if __name__ == "__main__":
    run(app)
