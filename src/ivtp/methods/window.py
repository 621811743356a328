"""What a method sees at a cut, and what it answers where it merges."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ivtp.core.tap import AttentionTap
from ivtp.plan import Cut


@dataclass(frozen=True)
class Window:
    """What a method sees at a cut.

    `taps` as `Cut.taps` names them. `hidden` (B, T, D) is cut. `patch` (B, T) is the original patch index of every
    token, -1 for CLS, text, padding and the guide. `reference` is the index in T of the row whose attention counts, or
    one for each sample (B,): 0, the CLS token, in the encoder, and in the decoder the pseudo CLS token or else the last
    prompt token. In an encoder without CLS it is None: the mean of all rows counts.
    """

    cut: Cut
    taps: tuple[AttentionTap, ...]
    hidden: Tensor
    patch: Tensor
    reference: int | Tensor | None
    images: tuple[int, ...] = ()
    """Images in each row, in the decoder; a row of the encoder is one image."""
    entered: tuple[tuple[int, ...], ...] = ()
    """Tokens of each image of each row that came to the cut, in the decoder."""
    keeps: tuple[tuple[int, ...], ...] = ()
    """Tokens of each image of each row that stay behind it, in the decoder."""
    segment: Tensor | None = None
    """(B, T) the number within its row of the image that a visual token is of, -1 for others, in the decoder where
    every image has a budget of its own; None where the images of a row share one, or there are no two."""
    sources: Tensor | None = None
    """(B, N) the patch that stands for every original patch so far, -1 where it was dropped."""
    text: Tensor | None = None
    """(B, T) what `Method.read_text` made of the question, for methods with `Method.reads_text`."""
    normed: Tensor | None = None
    """(B, T, D) what the decoder's last norm makes of `hidden`, for methods with `Method.reads_states`."""
    keys: Tensor | None = None
    """(B, H_kv, T, d) keys of the last tap, turned as if the first token of each row stood at position 0 (likewise)."""
    tail: int = 0
    """At most so many columns at the end hold the question."""
    relevance: Tensor | None = None
    """(B, N) cosine of every patch with the instruction, both as CLIP sees them (`Method.reads_clip`)."""
    features: Tensor | None = None
    """(B, N, D_vision) what the projector read, at a cut behind it."""
    words: Tensor | None = None
    """(B, W, D_text) the question's tokens as they enter the decoder, then zeros, for methods with
    `Method.reads_words`."""

    padding: Tensor | None = None
    """(B, T) bool: visual tokens of the encoder that show a tile's padding, which no prompt sees; None without any."""

    @property
    def visual(self) -> Tensor:
        """(B, T) bool: the tokens that may be cut."""
        return self.patch >= 0

    @property
    def budgets(self) -> list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
        """The visual tokens (B, T) bool that share a budget, how many of them came in each row, and how many stay.

        In the decoder, where `merge`, or a choice that is no ranking, has to keep to them.
        """
        if self.segment is None:
            return [(self.visual, tuple(map(sum, self.entered)), tuple(map(sum, self.keeps)))]

        def of_image(counts: tuple[tuple[int, ...], ...], m: int) -> tuple[int, ...]:
            return tuple(row[m] if m < len(row) else 0 for row in counts)

        most = max(map(len, self.keeps))
        return [(self.segment == m, of_image(self.entered, m), of_image(self.keeps, m)) for m in range(most)]


@dataclass(frozen=True)
class Merged:
    """Visual tokens that stand for others.

    `hidden` (B, T, D) is the window's, new where a token stands for others; `into` (B, T) is the column that every
    visual column went into: its own where it stays, -1 where it is dropped. `order` (B, k) lists the columns that stay
    in the method's own order; None: as they come. `stand_ins` (B, m) are the columns that stay whose token is made of
    something else than of the columns that went into them: CLS, a sum over what is dropped; None: there are none.
    `scores` (B, T) rank the columns, where the method has a ranking.
    """

    hidden: Tensor
    into: Tensor
    order: Tensor | None = None
    stand_ins: Tensor | None = None
    scores: Tensor | None = None
