"""The pseudo CLS token of a prompt: which words it is made of, and what stands in where none passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.config import PruneConfig
from ivtp.core import relevance as rel
from ivtp.hosts.base import Host
from ivtp.instruction import ClipText, InstructionReader
from ivtp.trace import Word

NEEDS_CLIP = ("instruction", "weighted", "clip")
"""Guides that read the instruction with CLIP."""


@dataclass(frozen=True)
class Guide:
    """One prompt's pseudo CLS token and the tensors that explain it; nothing here was read on the host yet."""

    token: Tensor  # (D,)
    fallback: Tensor  # bool scalar
    texts: tuple[str, ...] = ()
    scores: Tensor | None = None  # (words,)
    used: Tensor | None = None  # (words,) bool
    clip_tokens: int = 0
    """Tokens that CLIP read."""

    def words(self) -> list[Word]:
        """The instruction's words with their relevances (this waits for the device)."""
        if self.scores is None or self.used is None:
            return []
        return [
            Word(text, score, used)
            for text, score, used in zip(self.texts, self.scores.tolist(), self.used.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Prompt:
    """One row of a batch as the guide sees it: text tokens (no image slot, no padding, no answer) and its images."""

    ids: list[int]
    columns: list[int]
    last_image_column: int
    embeddings: Tensor  # (T, D), of every column
    cls: Tensor  # (m, D_vision): feature-layer CLS of its images
    pooled: Tensor  # (m, D_vision): post-normalised CLS of the encoder's last layer


@dataclass(frozen=True)
class GuideMaker:
    """Makes the pseudo CLS token of a prompt (Eq. 5-7 and the ablations of the paper's guide)."""

    config: PruneConfig
    host: Host
    reader: InstructionReader | None
    clip: ClipText | None

    def make(self, prompt: Prompt) -> Guide:
        """The guide of one prompt. A prompt without an image gets one that nothing will look at."""
        if prompt.cls.shape[0] == 0:
            return Guide(torch.zeros_like(prompt.embeddings[0]), torch.tensor(False))
        visual = self.host.project(prompt.cls).mean(dim=0).to(prompt.embeddings.dtype)
        kind = self.config.guide
        if kind == "visual":
            return Guide(visual, torch.tensor(False))
        if kind == "text":
            return self._mean_of_text(prompt, visual)
        assert self.reader is not None
        assert self.clip is not None
        instruction = self.reader.read(prompt.ids, prompt.columns)
        tokens, sentence, spans = self.clip.encode(instruction.text)
        if kind == "clip":
            return Guide(self._sentence(sentence, prompt), torch.tensor(False), clip_tokens=len(spans))
        words = rel.words(instruction.text)
        clip_words, own_words = rel.overlapping(words, spans), rel.overlapping(words, instruction.spans)
        by_token = rel.relevance(tokens, self.clip.image(prompt.pooled))
        weights = self._weigh(rel.spread(by_token, clip_words, own_words, len(instruction.columns)))
        token, empty = rel.pseudo_cls(prompt.embeddings[instruction.columns], weights, visual)
        itself = [(i, i) for i in range(len(words))]
        scores = rel.spread(by_token, clip_words, itself, len(words))
        texts = tuple(instruction.text[a:b] for a, b in words)
        return Guide(token, empty, texts, scores.nan_to_num(), _joined(own_words, weights, len(words)), len(spans))

    def _weigh(self, scores: Tensor) -> Tensor:
        """Weights of Eq. 7: 0/1 by the threshold, or the relevance itself where it is positive."""
        if self.config.guide == "weighted":
            return scores.nan_to_num().clamp_min(0)
        return (scores > self.config.threshold).float()

    def _mean_of_text(self, prompt: Prompt, visual: Tensor) -> Guide:
        """The mean of all instruction embeddings; without a processor, of all text behind the last image."""
        columns: Sequence[int]
        if self.reader is None:
            columns = [c for c in prompt.columns if c > prompt.last_image_column]
        else:
            columns = self.reader.read(prompt.ids, prompt.columns).columns
        weights = torch.ones(len(columns), device=visual.device)
        return Guide(*rel.pseudo_cls(prompt.embeddings[list(columns)], weights, visual))

    def _sentence(self, sentence: Tensor, prompt: Prompt) -> Tensor:
        """CLIP's sentence embedding on the path that a visual CLS takes, at a visual CLS's length."""
        assert self.clip is not None
        feature = self.clip.to_vision(sentence)
        length = torch.linalg.vector_norm(prompt.cls.float(), dim=-1).mean()
        scaled = feature * length / torch.linalg.vector_norm(feature).clamp_min(1e-12)
        return self.host.project(scaled.to(prompt.cls.dtype)).to(prompt.embeddings.dtype)


def _joined(own_words: list[tuple[int, int]], weights: Tensor, words: int) -> Tensor:
    """(words,) bool: whether a token of the word is in the pseudo CLS token."""
    word, token = (torch.tensor([p[i] for p in own_words], dtype=torch.long, device=weights.device) for i in (0, 1))
    return torch.zeros(words, device=weights.device).index_add(0, word, weights[token]) > 0
