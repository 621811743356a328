"""Do methods rank here as papers rank them on LLaVA-1.5-7B? The seventh gate, on a file of `ivtp compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivtp.evaluation.published import KEEP, beside, correlation
from recipes.micro.scoring import Table

COMPARED = Path(__file__).resolve().parents[2] / "results" / "micro-compare.json"


def like_published(compared: Path = COMPARED) -> list[Table]:
    """The correlation with its interval, then each method's two figures, both as parts of the full model's."""
    rows = beside(measured_shares(compared))
    found = correlation(rows)
    row: dict[str, Any] = {"methods": len(rows), "Spearman": found["Spearman"]}
    row["95% interval"] = f"{found['Spearman low']:.2f} to {found['Spearman high']:.2f}"
    return [
        Table(f"Rank correlation with LLaVA-1.5-7B, {KEEP} tokens", [row]),
        Table(f"Part of the full model's average, {KEEP} tokens", rows),
    ]


def measured_shares(file: Path) -> dict[str, float]:
    """Each method's accuracy in a file of `ivtp compare`, as a part of the full model's."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"][0]["rows"]
    full = next(row["accuracy"] for row in rows if row["method"] == "none")
    return {row["method"]: row["accuracy"] / full for row in rows if row["keep"] == KEEP}
