"""SparseVLM: text tokens that look at the image rate its tokens (Zhang et al., ICML 2025, arXiv 2410.04417)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivtp.core.cluster import cluster_means, density_peaks
from ivtp.core.rollout import weighted_column_sum
from ivtp.core.schedule import uniform_ratio
from ivtp.core.select import highest, others
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window

RECYCLED = 0.3
"""Share of the dropped tokens, the best, that are clustered."""
PER_CLUSTER = 10
NEIGHBOURS = 5


class SparseVlm(Method):
    """Keeps what the raters attend to, and merges the best of the rest into clusters, behind three decoder layers.

    Raters are the question's tokens whose mean relevance softmax(V T^T), of the embeddings that enter the decoder, is
    above the average; a visual token's score is their mean attention. Of the dropped tokens the best 30% are recycled:
    density peaks of their 5 nearest neighbours make one cluster for every ten of them, plus one, and its mean takes
    the place of its centre. The cuts lie behind layers 2, 6 and 15 of 32 (0-based), in that proportion in other
    decoders. Of several images each keeps and recycles tokens of its own, unless they share a budget, while the raters
    are those of the whole prompt. One keep ratio for all cuts, recycled tokens counted; `schedule` gives other counts:
    82,32,18 is the paper's setting for 64 tokens (66, 30 and 17 kept, 16, 2 and 1 recycled).
    """

    info = MethodInfo(
        title="SparseVLM",
        year=2024,
        stage="llm",
        guided=True,
        merges=True,
        paper="https://arxiv.org/abs/2410.04417",
    )
    reads = frozenset({"schedule", "budget"})
    reads_text = True

    def make_plan(self) -> Plan:
        """Three cuts behind layers."""
        size = self.geometry
        layers = [round(layer * (size.text_layers - 1) / 31) for layer in (2, 6, 15)]
        if len(set(layers)) < 3:
            raise ConfigError(f"SparseVLM needs at least 8 decoder layers; this model has {size.text_layers}")
        counts = self.explicit_counts(3) or uniform_ratio(size.num_patches, self.keep, 3)
        return Plan(tuple(Cut("llm", i, k, place="behind", taps=(i,)) for i, k in zip(layers, counts, strict=True)))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """Pairs of recycled tokens, rows of the raters and, once, who they are."""
        recycled, clusters = recycling(entering, cut.keep)
        pairs = recycled * (recycled + clusters)
        if cut == self.plan.cuts[0]:
            pairs += entering * text_tokens
        return ChoiceCost(2.0 * pairs * self.geometry.text_hidden, rows=("text",))

    def read_text(self, entry: Tensor, visual: Tensor, text: Tensor, tail: int) -> Tensor:
        """The raters."""
        return raters(entry, visual, text, tail)

    def merge(self, window: Window) -> Merged:
        """Kept tokens, and cluster centres that stand for the recycled ones."""
        assert window.text is not None
        first = max(0, window.patch.shape[1] - window.tail)
        scores = weighted_column_sum(window.taps[-1], window.text, first=first)
        hidden, into = window.hidden.clone(), torch.full_like(window.patch, -1)
        for tokens, entered, keeps in window.budgets:
            for row, (before, after) in enumerate(zip(entered, keeps, strict=True)):
                if before:
                    self._merge_some(hidden[row], into[row], tokens[row], scores[row], before, after)
        return Merged(hidden, into)

    def _merge_some(
        self, hidden: Tensor, into: Tensor, tokens: Tensor, scores: Tensor, before: int, after: int
    ) -> None:
        """One budget, in place: hidden (T, D), the columns (T,) that the `before` marked of `tokens` (T,) go into."""
        columns = (~tokens).to(torch.uint8).argsort(stable=True)[:before]  # the marked ones, without waiting
        recycled, clusters = recycling(before, after)
        kept = highest(scores[columns].unsqueeze(0), after - clusters)
        into[columns[kept[0]]] = columns[kept[0]]
        if not clusters:
            return
        rest = others(kept, len(columns))
        best = rest.gather(1, highest(scores[columns].unsqueeze(0).gather(1, rest), recycled).sort(dim=1).values)
        chosen = columns[best[0]]
        centres, member = density_peaks(hidden[chosen].unsqueeze(0), clusters, NEIGHBOURS)
        means = cluster_means(hidden[chosen].unsqueeze(0), member, clusters)
        into[chosen] = chosen[centres[0]][member[0]]
        hidden[chosen[centres[0]]] = means[0]


def raters(entry: Tensor, visual: Tensor, text: Tensor, tail: int) -> Tensor:
    """Weights (B, T) of the text tokens that rate: 1 / their number each, 0 elsewhere.

    `entry` (B, T, D) embeddings that enter the decoder; `visual` and `text` (B, T) bool, the text within the last
    `tail` columns. A token rates when its relevance, softmax(V T^T) averaged over the visual tokens, is above the
    average; all do where all are equal.
    """
    asked = text[:, -tail:]
    logits = entry.float() @ entry[:, -tail:].float().transpose(1, 2)  # (B, T, tail)
    relevance = logits.masked_fill(~asked.unsqueeze(1), float("-inf")).softmax(dim=2).nan_to_num()
    share = visual.float() / visual.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (share.unsqueeze(1) @ relevance).squeeze(1)  # (B, tail)
    count = asked.sum(dim=1, keepdim=True).clamp_min(1)
    chosen = asked & (mean > mean.sum(dim=1, keepdim=True) / count)
    chosen = torch.where(chosen.any(dim=1, keepdim=True), chosen, asked)
    weights = chosen.float() / chosen.sum(dim=1, keepdim=True).clamp_min(1)
    return nn.functional.pad(weights, (entry.shape[1] - weights.shape[1], 0))


def recycling(before: int, after: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters, so that `after` of `before` remain.

    At least as many are recycled as there are clusters; where `after` is so small that clusters alone fill it, nothing
    else is kept.
    """
    if after == before:
        return 0, 0
    for kept in range(after - 1, -1, -1):
        recycled = int(RECYCLED * (before - kept))
        clusters = recycled // PER_CLUSTER + 1
        if kept + clusters == after:
            return max(recycled, clusters), clusters
    return max(int(RECYCLED * before), after), after  # so few that all are clusters


METHOD = SparseVlm
