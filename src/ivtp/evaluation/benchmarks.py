"""The twelve benchmarks of the paper's Table 1: lmms-eval's names for them, and which of its figures it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One benchmark of the table."""

    title: str
    task: str
    metric: str
    """Of the task's results."""
    to_percent: float = 100.0
    """Times the metric is what the table shows, 0 to 100."""
    judged: bool = False
    """A language model behind a web service rates answers, of MMBench those that name no option."""

    def value(self, results: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The figure among lmms-eval's `results`; None where the task did not run, or could not be judged."""
        found = results.get(self.task, {}).get(f"{self.metric},none")
        return self.to_percent * float(found) if isinstance(found, int | float) else None


PAPER12 = (
    Column("VQAv2", "vqav2_val", "exact_match"),
    Column("GQA", "gqa", "exact_match"),
    Column("VizWiz", "vizwiz_vqa_val", "exact_match"),
    Column("ScienceQA", "scienceqa_img", "exact_match"),
    Column("TextVQA", "textvqa_val", "exact_match"),
    Column("POPE", "pope", "pope_f1_score"),
    Column("MME", "mme", "mme_perception_score", to_percent=1 / 20),  # 0 to 2000
    Column("MMBench", "mmbench_en_dev", "gpt_eval_score", to_percent=1.0, judged=True),
    Column("MMBench-CN", "mmbench_cn_dev", "gpt_eval_score", to_percent=1.0, judged=True),
    Column("SEED", "seedbench", "seed_all"),
    Column("LLaVA-Bench", "llava_in_the_wild", "gpt_eval_llava_all", to_percent=1.0, judged=True),
    Column("MM-Vet", "mmvet", "gpt_eval_score", to_percent=1.0, judged=True),
)
"""In the paper's order; MME is divided by 20, so that the plain mean of all is a score from 0 to 100."""
