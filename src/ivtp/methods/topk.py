"""TopK by CLS attention (known as FasterVLM when it is done once, behind the encoder; arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ivtp.core.rollout import attention_row
from ivtp.methods.base import Method, MethodInfo, Plan, Window, check_choice, vision_only_plan


@dataclass(frozen=True)
class Options:
    """`where` cuts once behind the encoder or a little in every layer; `score` is what ranks a patch."""

    where: Literal["after", "layers"] = "after"
    score: Literal["attention", "cosine"] = "attention"

    def __post_init__(self) -> None:
        check_choice("where", self.where, ("after", "layers"))
        check_choice("score", self.score, ("attention", "cosine"))


class TopK(Method):
    """Keeps the patches that the CLS token attends to most, in raster order.

    `where="after"`: once, by the attention of the last layer whose output the projector reads (the encoder's
    second-to-last). `where="layers"`: in each encoder layer, by that layer's attention, the same number of tokens
    less each time. `score="cosine"` ranks by the similarity of the patch with the CLS token instead.
    """

    info = MethodInfo(
        title="TopK (CLS attention)",
        year=2024,
        stage="vision",
        paper="https://arxiv.org/abs/2412.01818",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut behind the encoder or one in each of its layers."""
        return vision_only_plan(
            self.geometry,
            self.keep,
            every_layer=self.options.where == "layers",
            tapped=self.options.score != "cosine",
        )

    def score(self, window: Window) -> Tensor:
        """CLS attention, or the cosine with the CLS token."""
        if self.options.score == "cosine":
            hidden = window.hidden.float()
            cls = hidden.mean(dim=1, keepdim=True) if window.reference is None else hidden[:, window.reference, None]
            return torch.cosine_similarity(hidden, cls, dim=-1)
        return attention_row(window.taps[-1], window.reference)


METHOD = TopK
