"""What the prefill of an answer cost, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Visual tokens of the prompt and those that are left, FLOPs of the full and of the pruned prefill."""

    patches: int
    kept: int
    full: float
    pruned: float

    @classmethod
    def of(cls, model: Any, answer: Any) -> Cost:
        """What the prefill of an `ivtp.Answer` of this model cost."""
        from ivtp.cost.prefill import count_prompt  # loads torch, which a command line that asks nothing waits not for
        from ivtp.cost.sizes import sizes

        images = [(sum(visible), visible, own) for visible, own in zip(answer.tiles, answer.windowed, strict=True)]
        patches = sum(count for count, *_ in images)
        text = answer.prompt_columns - patches
        full = count_prompt(sizes(model).geometry, None, images, text_tokens=text).total
        if answer.trace is None:
            return cls(patches, patches, full, full)
        return cls(patches, int((answer.trace.kept()[0] >= 0).sum()), full, answer.trace.flops)

    def tokens(self) -> str:
        """For example "64 of 576"."""
        return f"{self.kept} of {self.patches}"

    def flops(self) -> str:
        """For example "3.2 GFLOPs (-48.6%)"."""
        size, unit = unit_of(self.full)
        saved = "" if self.pruned == self.full else f" ({100 * (self.pruned / self.full - 1):+.1f}%)"
        return f"{self.pruned / size:.1f} {unit}{saved}"


def unit_of(flops: float) -> tuple[float, str]:
    """The unit in which so many FLOPs are said, and how many it is."""
    scale = ((1e12, "TFLOPs"), (1e9, "GFLOPs"))
    return next(((size, unit) for size, unit in scale if flops >= size), (1e6, "MFLOPs"))
