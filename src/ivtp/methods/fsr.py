"""FSR: focus on the evidence, scan the context, refine it (Tong et al., 2026, arXiv 2602.05809)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core.diversity import cosine, farthest
from ivtp.core.rollout import attention_row
from ivtp.core.select import highest, keep_highest, put, take
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Merged, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`alpha` and `beta`: exponents of relevance and saliency; `rho`: share of their product that focus holds;
    `kappa`: dropped tokens that are merged, for each scanned one."""

    alpha: float = 3.0
    beta: float = 1.0
    rho: float = 0.9
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise ConfigError(f"rho={self.rho!r} is no share; use a number from 0 to 1")
        for name in ("alpha", "beta", "kappa"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is negative; use a number from 0 up")


class Fsr(Method):
    """Keeps patches that are salient and relevant, then those least like them, which take up what they resemble.

    Saliency is CLS attention (Eq. 1), relevance the cosine of a patch with CLIP's embedding of the instruction (Eq. 2);
    from 0 to 1 over the image, their powers make the priority (Eq. 3). Focus: the fewest patches that hold `rho`
    of the sum of all priorities (Eq. 4). Scan: one by one, the patch farthest from its most similar kept one (Eq. 5).
    Refine: of the dropped patches those most similar to a scanned one, `kappa` for each of these, go into it, a mean
    weighted by priority (Eq. 8 and 9); the focused ones stay as they are. Features and attention are those of the last
    layer whose output the projector reads; raster order. Our reading: ratings are min-max normalised; patches are
    compared with the instruction as CDPruner's are, which the paper names for it, but by their plain cosine; focus
    never takes more than is kept.
    """

    info = MethodInfo(
        title="FSR",
        year=2026,
        stage="vision",
        guided=True,
        merges=True,
        paper="https://arxiv.org/abs/2602.05809",
    )
    Options = Options
    needs = frozenset({"text_side"})
    reads_clip = True

    def make_plan(self) -> Plan:
        """One cut behind the encoder."""
        return one_cut(self.geometry, self.keep, "behind", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosine of all pairs, an attention row, and the weighted means."""
        return ChoiceCost(2.0 * entering * (entering + cut.keep) * self.geometry.vision_hidden)

    def merge(self, window: Window) -> Merged:
        """Focused patches, and scanned ones that stand for others."""
        assert window.relevance is not None
        first, options = self.geometry.vision_cls, self.options
        saliency = attention_row(window.taps[-1], window.reference)[:, first:]
        score = priority(saliency, window.relevance, options.alpha, options.beta)
        patches = window.hidden[:, first:]
        chosen, into = focus_and_scan(patches.detach(), score, window.cut.keep, options.rho, options.kappa)
        hidden = put(window.hidden, chosen + first, refined(patches, score, chosen, into))
        nothing = torch.full_like(window.patch[:, :first], -1)
        return Merged(hidden, torch.cat([nothing, torch.where(into >= 0, into + first, -1)], dim=1))


def priority(saliency: Tensor, relevance: Tensor, alpha: float, beta: float) -> Tensor:
    """FSR's rating (B, N) of patches by two ratings (B, N), each from 0 to 1 in every row (Eq. 3)."""
    salient, relevant = (_min_max(rating.float()) for rating in (saliency, relevance))
    return relevant**alpha * salient**beta


def _min_max(rating: Tensor) -> Tensor:
    low, high = rating.amin(dim=1, keepdim=True), rating.amax(dim=1, keepdim=True)
    return (rating - low) / (high - low).clamp_min(1e-12)


def focus_and_scan(features: Tensor, rating: Tensor, keep: int, rho: float, kappa: float) -> tuple[Tensor, Tensor]:
    """FSR's choice (B, keep) of `features` (B, N, D) by their `rating` (B, N), the focused first, and where all go.

    The second (B, N): a chosen patch stays where it is, some go into a scanned one, -1 is dropped (Eq. 4, 5 and 8).
    """
    similarity = cosine(features)
    ranked = highest(rating, rating.shape[1])
    mass = rating.gather(1, ranked).cumsum(dim=1)
    focused = ((mass < rho * mass[:, -1:]).sum(dim=1) + 1).clamp_max(keep)  # (B,)
    chosen = farthest(1 - similarity, ranked, focused, keep)
    scanned = torch.arange(keep, device=chosen.device) >= focused.unsqueeze(1)  # (B, keep)
    near = take(similarity, chosen).masked_fill(~scanned.unsqueeze(2), float("-inf"))  # (B, keep, N)
    dropped = torch.ones_like(rating, dtype=torch.bool).scatter(1, chosen, False)
    merged = keep_highest(near.amax(dim=1), dropped, (kappa * (keep - focused)).long())
    into = torch.where(merged, chosen.gather(1, near.argmax(dim=1)), -1)
    return chosen, into.scatter(1, chosen, chosen)


def refined(features: Tensor, rating: Tensor, chosen: Tensor, into: Tensor) -> Tensor:
    """The `chosen` (B, k) of `features` (B, N, D), each the mean, weighted by `rating` (B, N), of what went `into` it.

    One that nothing with a rating above 0 went into stays as it is to the bit (Eq. 9).
    """
    goes = (into.unsqueeze(1) == chosen.unsqueeze(2)) * rating.unsqueeze(1)  # (B, k, N)
    total = goes.sum(dim=2, keepdim=True)
    own = take(rating, chosen).unsqueeze(2)
    means = goes @ features.float() / torch.where(total > 0, total, 1.0)
    kept = take(features, chosen)
    return torch.where(total > own, means.to(features.dtype), kept)


METHOD = Fsr
