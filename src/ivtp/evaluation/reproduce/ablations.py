"""The paper's ablations of IVTP, each at 64 and at 16 tokens, in both stages and in either alone.

At 64 tokens what stage 1 has lost hides what the guide of stage 2 does, so that each stage is looked at alone, too.
Every row changes one thing; its difference to the default of the same stages and tokens is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ivtp.cost.sizes import Sizes, sizes
from ivtp.evaluation.asked import Row, Run
from ivtp.evaluation.reproduce import base

KEEPS = (64, 16)
STAGES = {"both": "both stages", "vision": "stage 1 alone", "llm": "stage 2 alone"}
PAPER_LAYERS = 32
"""Of the decoder of LLaVA-1.5-7B, whose first 4, 8 and 12 the paper prunes in; other depths take the same shares."""


WORSE, NO_BETTER = "worse", "no better"


@dataclass(frozen=True)
class Variant:
    """One thing that differs from the default."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("both", "vision", "llm")
    """In which it makes a difference."""
    paper: float | None = None
    """The paper's difference in points, without retraining, where it prints one."""
    says: str = ""
    """What the paper says of it, beside the default: WORSE, NO_BETTER or, where it does not speak of it, nothing."""


def ablations(model: Sizes, keep: int) -> dict[str, list[Variant]]:
    """All variants of a model of such sizes, by what they are about."""
    layers, told = model.geometry.text_layers, model.recommended
    threshold = float(told.get("threshold", 0.2))
    own = min(int(told.get("llm_layers", 12)), layers)
    guided = ("both", "llm")
    shares = {f"{of} of {PAPER_LAYERS}": max(1, round(layers * of / PAPER_LAYERS)) for of in (4, 8, 12)}
    depths = {f"the first {name} decoder layers": count for name, count in shares.items()} | {"all layers": layers}
    return {
        "how a group's attention maps become one (default: rollout with residual)": [
            Variant("the last layer's alone", {"aggregation": "layer"}, paper=-4.5, says=WORSE),
            *(Variant(f"their {name}", {"aggregation": name}, says=WORSE) for name in ("mean", "max")),
            Variant("their product", {"aggregation": "multiply"}, says=WORSE),
        ],
        "what guides stage 2 (default: OTT+TE+RT)": [
            Variant("OTT: all words", {"guide": "text"}, guided, paper=-2.9, says=WORSE),
            Variant("TE: CLIP's sentence", {"guide": "clip"}, guided, says=WORSE),
            Variant("OTT+TE: words by relevance", {"guide": "weighted"}, guided, says=WORSE),
            Variant("none: visual CLS", {"guide": "visual"}, guided),
        ],
        f"threshold of relevance (default: {threshold:g})": [
            Variant(f"{part:g} of it", {"threshold": threshold * part}, guided) for part in (0, 0.5, 1.5, 2)
        ],
        f"decoder layers that take part (default: {own} of {layers}; none is stage 1 alone)": [
            Variant(name, {"llm_layers": count}, guided, says=NO_BETTER if count > own else WORSE)
            for name, count in depths.items()
            if count != own
        ],
        "layers of a group (default: 3)": [
            Variant(f"G = {count}", {"group_layers": count}, says=WORSE) for count in (1, 2, 4, 6)
        ],
        "tokens between the stages (default: one ratio)": [
            Variant(f"{between}", {"schedule": (between, keep)}, ("both",))
            for between in sorted({keep, keep + 36, 2 * keep, 3 * keep, 288})
        ],
        "positions (default: original)": [Variant("compact", {"positions": "compact"})],
        "cache (default: evict)": [Variant("layered", {"cache": "layered"}, guided)],
    }


def run_of(keep: int, stages: str, options: Mapping[str, Any]) -> Run:
    """IVTP with options in some stages."""
    return Run("ivtp", keep, {**options, **({} if stages == "both" else {"stages": stages})})


def cells(model: Sizes, keeps: Sequence[int]) -> Iterator[tuple[str, int, str, Variant, Run]]:
    """Every cell: what it is about, tokens, stages, variant and its run."""
    for keep in keeps:
        for about, variants in ablations(model, keep).items():
            for variant in variants:
                for stages in variant.stages:
                    yield about, keep, stages, variant, run_of(keep, stages, variant.options)


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row a cell, with its difference to the default of the same tokens and stages."""
    of_model, keeps = sizes(request.asked.model), request.keeps or KEEPS
    wanted = list(cells(of_model, keeps))
    defaults = {(keep, stages): run_of(keep, stages, {}) for keep in keeps for stages in STAGES}
    found = base.measure(request, [*defaults.values(), *(run for *_, run in wanted)], report)
    full = found[base.FULL]
    made: list[Row] = [base.row(base.FULL, full)]
    for (_, stages), run in defaults.items():
        made.append({"about": "default", "stages": stages} | base.row(run, found[run], [("change", full)]))
    for about, keep, stages, variant, run in wanted:
        against = [("change", full), ("to default", found[defaults[keep, stages]])]
        made.append(
            {"about": about, "variant": variant.name, "stages": stages, "paper": variant.paper, "says": variant.says}
            | base.row(run, found[run], against)
        )
    return base.Result("Ablations of IVTP", made, page(made, keeps))


def page(rows: list[Row], keeps: Sequence[int]) -> str:
    """The defaults, then a table for each thing that is looked at."""
    defaults = [row for row in rows if row.get("about") == "default"]
    parts = [
        base.grid(
            ("default", *STAGES.values()),
            [("all tokens", *[base.shown(rows[0], "mean")] * len(STAGES))]
            + [
                (f"{keep} tokens", *(base.shown(row, "mean") for row in defaults if row["keep"] == keep))
                for keep in keeps
            ],
        )
    ]
    for about in dict.fromkeys(row["about"] for row in rows if row.get("about", "default") != "default"):
        mine = [row for row in rows if row.get("about") == about]
        columns = [(keep, stages) for keep in keeps for stages in STAGES if any(_at(row, keep, stages) for row in mine)]
        header = ("points to the default", *(f"{keep}, {STAGES[stages]}" for keep, stages in columns), "paper", "sign")
        lines = []
        for name in dict.fromkeys(row["variant"] for row in mine):
            own = [row for row in mine if row["variant"] == name]
            by_place = {(row["keep"], row["stages"]): row for row in own}
            told = (
                base.shown_difference(by_place[place], "to default") if place in by_place else "–" for place in columns
            )
            paper = own[0]["paper"]
            said = own[0]["says"] or "–"
            lines.append((name, *told, said if paper is None else f"{paper:+.1f}", sign(own)))
        parts.append(f"## {about[0].upper()}{about[1:]}\n\n{base.grid(header, lines)}")
    return "\n\n".join(parts)


def _at(row: Row, keep: int, stages: str) -> bool:
    return bool(row["keep"] == keep and row["stages"] == stages)


def sign(rows: Sequence[Row]) -> str:
    """In how many cells of a variant the difference is the paper's, there is none, or it is the opposite."""
    known = [row for row in rows if row["to default low"] is not None]
    if not rows[0]["says"] or not known:
        return "–"
    worse = sum(row["to default high"] < 0 for row in known)
    better = sum(row["to default low"] > 0 for row in known)
    none = len(known) - worse - better
    if rows[0]["says"] == NO_BETTER:
        return f"paper's in {worse + none}, opposite in {better}"
    return f"paper's in {worse}, none in {none}, opposite in {better}"
