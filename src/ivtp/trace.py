"""What happened in one prefill. Cost, pictures and reports read this and nothing else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ivtp.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Where = Literal["vision", "llm"]
Grids = tuple[tuple[int, ...], ...]
"""(rows, columns) of the patches of an image: one grid; where it is read in tiles that of the whole, then theirs;
or one for each tile, in raster order, then that of the whole."""


@dataclass(frozen=True, repr=False)
class StageTrace:
    """One cut: which patches stayed.

    `layer` is the 0-based layer in which the cut happens (for a cut after the encoder: the last layer that ran).
    `kept` (B, k) holds original patch indices, 0..N-1 in raster order; image m of a prompt counts from m*N; rows
    with fewer tokens end in -1. `candidates` (B, n) are the patches that entered the cut, likewise. `scores` (B, n)
    ranks them, -inf where a row has fewer; None where the cut merges and does not rank. `sources` (B, N*images), of
    merging methods only, names for every original patch the kept patch that stands for it, -1 where it was dropped.
    `stand_ins` (B, k) bool marks among `kept` the patches that are there by their place alone: the token at it is CLS
    (VisionZip) or the sum of all dropped patches (PruMerge); None where there are none.
    """

    where: Where
    layer: int
    kept: Tensor
    scores: Tensor | None
    candidates: Tensor
    sources: Tensor | None = None
    stand_ins: Tensor | None = None

    def __repr__(self) -> str:
        return f"StageTrace({self.where} layer {self.layer}: kept {_span(_counts(self.kept))})"

    def to_dict(self) -> dict[str, Any]:
        """The fields with lists in place of tensors; what is no number (-inf behind the end of a row) is None."""
        return {
            "where": self.where,
            "layer": self.layer,
            **{name: _listed(getattr(self, name)) for name in ("kept", "scores", "candidates", "sources", "stand_ins")},
        }


@dataclass(frozen=True)
class Word:
    """One word of the instruction: its relevance to the image (Eq. 6) and whether it joined the pseudo CLS token."""

    text: str
    score: float
    used: bool


@dataclass(frozen=True)
class TokensPerLayer:
    """Visual tokens of one image in each layer: those that its attention sees and those that its MLP sees."""

    vision_attention: tuple[int, ...]
    vision_mlp: tuple[int, ...]
    llm_attention: tuple[int, ...]
    llm_mlp: tuple[int, ...]
    projector: int
    """Those that the projector sees."""

    @property
    def final(self) -> int:
        """Visual tokens that leave the last layer."""
        return self.llm_mlp[-1]

    @property
    def equivalent(self) -> tuple[float, float]:
        """Mean over the decoder layers of the tokens that enter them, and of those that leave them.

        Papers count the layer of a cut one way or the other, and call either the equivalent number of tokens.
        """
        entering = self.llm_attention
        leaving = (*entering[1:], self.final)
        return sum(entering) / len(entering), sum(leaving) / len(leaving)


@dataclass(repr=False)
class PruneTrace:
    """The record of one prefill, with a row (in tensors and lists) for each row of the batch that the model ran.

    `generate` with beams or several returned sequences repeats every prompt, so that prompt p's record is in the rows
    p*n to p*n + n-1 of n beams or sequences.
    """

    num_patches: int
    """Patches of an image, of the largest one where they differ."""
    images: tuple[int, ...]
    """Images in each row."""
    stages: list[StageTrace] = field(default_factory=list)
    words: list[list[Word]] = field(default_factory=list)
    """The instruction's words, a list for each row; empty where the guide reads no text."""
    fallback: list[bool] = field(default_factory=list)
    """True where no word passed the threshold, so the projected visual CLS was the guide."""
    tokens_per_layer: TokensPerLayer | None = None
    flops: float = 0.0
    """Prefill cost of the whole batch in FLOPs (multiply-accumulate = 2), pruning included."""
    flops_each: tuple[float, ...] = ()
    """What each row would cost by itself: without padding, and with an encoder of its own where beams share one."""
    seconds: float = 0.0
    """Wall-clock of the prefill (vision encoder, pruning and decoder)."""
    notes: tuple[str, ...] = ()
    """What must be known before the answer is trusted, such as that a part of the method is untrained."""
    patches: tuple[tuple[int, ...], ...] = ()
    """Patches of each image of each row; empty: `num_patches` everywhere."""
    grids: tuple[tuple[Grids, ...], ...] = ()
    """What the patches of each image of each row form; empty: one square."""
    pictures: tuple[Any, ...] = ()
    """The images of the only row, where they were known as such: `ivtp.ask` puts them there; a model sees pixels."""

    def __repr__(self) -> str:
        total = self.num_patches * max(self.images, default=0)
        rows = f"{len(self.images)} prompts, " if len(self.images) != 1 else ""
        return (
            f"PruneTrace({rows}kept {_span(_counts(self.kept()))} of {total} visual tokens in {len(self.stages)} cuts)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, of numbers, texts, lists and dictionaries alone: `json.dumps` takes it."""
        return {
            "num_patches": self.num_patches,
            "images": list(self.images),
            "patches": [list(row) for row in self.patches],
            "grids": _plain(self.grids),
            "stages": [stage.to_dict() for stage in self.stages],
            "words": [[asdict(word) for word in row] for row in self.words],
            "fallback": list(self.fallback),
            "tokens_per_layer": None if self.tokens_per_layer is None else _plain(asdict(self.tokens_per_layer)),
            "flops": self.flops,
            "flops_each": list(self.flops_each),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def draw(self, file: str | Path | None = None, *, image: Any = None, **options: Any) -> Image.Image:
        """The picture of sample `row` with what was kept of it, also written to `file` where one is named.

        `image` is the picture, or a list of the sample's pictures; an answer's trace knows them. `options` are those of
        `ivtp.draw`, which this calls: `row`, `question`, `answer`, `note`, `threshold`, `square`.
        """
        from ivtp.visualize import draw

        if image is None and not self.pictures:
            raise ConfigError("a model sees pixels alone; pass the picture: trace.draw('kept.png', image='photo.png')")
        return draw(self.pictures if image is None else image, self, file, **options)

    def kept(self, where: Where | None = None) -> Tensor:
        """Original patch indices (B, k) that survived: at the end, or at the end of stage `where`.

        An untouched stage answers with all patches.
        """
        chosen = [s for s in self.stages if where is None or s.where == where]
        if chosen:
            return chosen[-1].kept
        patches = self.patches or tuple((self.num_patches,) * count for count in self.images)
        everything = torch.arange(max(map(sum, patches), default=0)).repeat(len(self.images), 1)  # (B, all patches)
        limits = torch.tensor([sum(row) for row in patches]).unsqueeze(1)
        return torch.where(everything < limits, everything, -1)


def _counts(kept: Tensor) -> list[int]:
    """Tokens in each row (B, k)."""
    return [int(count) for count in (kept >= 0).sum(dim=1)]


def _span(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low}..{high}"


def _listed(tensor: Tensor | None) -> Any:
    """Nested lists of a tensor's numbers."""
    return None if tensor is None else _plain(tensor.tolist())


def _plain(value: Any) -> Any:
    """Lists for tuples, None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
