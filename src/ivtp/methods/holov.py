"""HoloV: a share of the budget for every crop of the image (Zou et al., NeurIPS 2025, arXiv 2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivtp.core.rollout import attention_row
from ivtp.core.select import on_device
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, one_cut


@dataclass(frozen=True)
class Options:
    """`crops`: how many, or None for 1024 / keep; `tau`: how sharply the budget goes to the best crops."""

    crops: int | None = None
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.crops is not None and (not isinstance(self.crops, int) or self.crops < 1):
            raise ConfigError(f"crops={self.crops!r} is not a count; use a whole number from 1 up")
        if not self.tau >= 0:
            raise ConfigError(f"tau={self.tau!r} is negative; use a number from 0 up")


class HoloV(Method):
    """Divides the budget between crops of the image by their mean score, and keeps the best tokens of each.

    A projected token's score is its CLS attention plus the variance of its cosines with the others of its crop, scaled
    to the attention's mean over the crop (Eq. 1-3). A crop gets the whole part of its share of the budget, which is
    its mean score to the power `tau` (Eq. 4), and at most its size: what overflows goes to the others in proportion to
    share times room, and what is then short to the crop with the highest share. 1024 / keep crops. Raster order. The
    refetching of dropped tokens in the decoder (Appendix D) is not here. Our reading: crops are runs of consecutive
    patches, whose sizes differ by one at most, as the paper's numbers of crops fit no grid; 1024 / keep is rounded,
    and a crop has two patches or more; `tau`, of which the paper gives no value, is 1; tokens are compared behind the
    projector, and one's cosine with itself, which Eq. 1 masks, counts in neither mean nor variance; parts of an
    overflow are rounded down; the crop with the highest share is filled up before the next; CLS attention is that of
    the last layer whose output the projector reads.
    """

    info = MethodInfo(
        title="HoloV",
        year=2025,
        stage="vision",
        paper="https://arxiv.org/abs/2510.02912",
    )
    Options = Options

    def make_plan(self) -> Plan:
        """One cut behind the projector that reads CLS attention."""
        return one_cut(self.geometry, self.keep, "projected", tapped=True)

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """The cosines of all pairs of a crop, and an attention row."""
        crops = self.crops(entering, cut.keep)
        largest = -(-entering // crops)
        return ChoiceCost(2.0 * crops * largest**2 * self.geometry.text_hidden)

    def crops(self, patches: int, keep: int) -> int:
        """How many crops so many patches have."""
        return max(1, min(self.options.crops or round(1024 / keep), patches // 2))

    def score(self, window: Window) -> Tensor:
        """The score within a crop, and above all others where the crop's quota holds the token."""
        attention = attention_row(window.taps[-1], window.reference)[:, self.geometry.vision_cls :]
        keep, patches = window.cut.keep, window.hidden.shape[1]
        crop = crops_of(patches, self.crops(patches, keep))
        rating = holistic_scores(window.hidden, attention, crop)
        kept = within_quotas(rating, crop, keep, self.options.tau)
        place = on_device((crop >= 0).flatten().nonzero().flatten(), rating.device)  # of each patch among the crops
        return (rating + kept * (rating.amax(dim=(1, 2), keepdim=True) + 1)).flatten(1)[:, place]


def crops_of(patches: int, crops: int) -> Tensor:
    """The patches of each crop (crops, M), -1 behind a smaller one's last; on the host."""
    return nn.utils.rnn.pad_sequence(
        list(torch.arange(patches).tensor_split(crops)), batch_first=True, padding_value=-1
    )


def holistic_scores(features: Tensor, attention: Tensor, crop: Tensor) -> Tensor:
    """HoloV's scores (B, crops, M) of `features` (B, N, D) by `attention` (B, N), 0 where `crop` (crops, M) is -1.

    A crop whose tokens are all alike is scored by attention alone (Eq. 1-3).
    """
    there = on_device(crop >= 0, features.device)
    index = on_device(crop.clamp_min(0), features.device)
    own = nn.functional.normalize(features.float(), dim=-1)[:, index]  # (B, crops, M, D)
    similarity = own @ own.transpose(2, 3)
    itself = torch.eye(crop.shape[1], dtype=torch.bool, device=features.device)
    pairs = there.unsqueeze(1) & there.unsqueeze(2) & ~itself  # (crops, M, M)
    count = pairs.sum(dim=2).clamp_min(1)
    mean = (similarity * pairs).sum(dim=3) / count
    variance = ((similarity - mean.unsqueeze(3)).square() * pairs).sum(dim=3) / count
    salient = attention.float()[:, index] * there
    spread = variance.sum(dim=2, keepdim=True)
    scale = salient.sum(dim=2, keepdim=True) / torch.where(spread > 0, spread, float("inf"))
    return scale * variance + salient


def within_quotas(rating: Tensor, crop: Tensor, keep: int, tau: float) -> Tensor:
    """Marks (B, crops, M) the best of each crop by `rating` (B, crops, M), `keep` in all (Eq. 4 and 5)."""
    there = on_device(crop >= 0, rating.device)
    size = there.sum(dim=1)  # (crops,)
    worth = (rating.sum(dim=2) / size) ** tau
    quota = quotas(worth / worth.sum(dim=1, keepdim=True), size, keep)
    order = rating.masked_fill(~there, float("-inf")).argsort(dim=2, descending=True, stable=True)
    return order.argsort(dim=2) < quota.unsqueeze(2)


def quotas(share: Tensor, size: Tensor, keep: int) -> Tensor:
    """How many tokens (B, C) each crop keeps, `keep` in all, by its `share` (B, C) of them; at most its `size` (C,)."""
    wanted = (share * keep + 1e-4).floor()  # equal shares of a whole number are whole in spite of rounding
    quota = torch.minimum(wanted, size)
    pull = share * (size - quota)
    over = (wanted - quota).sum(dim=1, keepdim=True)
    more = (over * pull / pull.sum(dim=1, keepdim=True).clamp_min(1e-12)).floor()
    quota = torch.minimum(quota + more, size)
    best = share.argsort(dim=1, descending=True, stable=True)
    room = (size - quota).gather(1, best)
    left = keep - quota.sum(dim=1, keepdim=True) - (room.cumsum(dim=1) - room)  # when it is a crop's turn
    return (quota + torch.zeros_like(quota).scatter(1, best, left.clamp_min(0).minimum(room))).long()


METHOD = HoloV
