"""Do methods rank here as on LLaVA-1.5-7B? The seventh gate, of what `ivtp reproduce published` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivtp.evaluation.published import KEEP
from recipes.micro.scoring import Table

REPRODUCED = Path(__file__).resolve().parents[2] / "results" / "published.json"


def like_published(file: Path = REPRODUCED) -> list[Table]:
    """The correlation with its interval, then each method's two figures, in percent of the full model's."""
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = document["about"]["correlation"]
    row: dict[str, Any] = {"methods": found["methods"], "Spearman": found["Spearman"]}
    row["95% interval"] = f"{found['Spearman low']:.2f} to {found['Spearman high']:.2f}"
    columns = ("method", "published", "rank", "here", "rank here")
    return [
        Table(f"Rank correlation with LLaVA-1.5-7B, {KEEP} tokens", [row]),
        Table(
            f"Percent of the full model's average, {KEEP} tokens",
            [{column: own[column] for column in columns} for own in document["rows"]],
        ),
    ]
