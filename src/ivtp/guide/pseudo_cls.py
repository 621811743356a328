"""The pseudo CLS token of a prompt: which words it is made of, and what stands in where none passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core import relevance as rel
from ivtp.core.characters import widened
from ivtp.core.select import on_device
from ivtp.core.untraced import untraced
from ivtp.guide.clip import ClipText
from ivtp.hosts.base import Host
from ivtp.methods.base import GuideOptions, Method
from ivtp.prompt.batch import TextTokens
from ivtp.prompt.instruction import Instruction, InstructionReader
from ivtp.trace import Word


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


def reads_question(method: Method) -> bool:
    """Whether the method, or its guide, reads what the user asks."""
    options = method.guide_options
    by_guide = options is not None and options.guide != "visual"
    return by_guide or method.reads_clip or method.reads_words or method.reads_text


@dataclass(frozen=True)
class GuideMaker:
    """Makes the pseudo CLS token of a prompt (Eq. 5-7 and the ablations of the paper's guide)."""

    options: GuideOptions | None
    """None for a method without a pseudo CLS token."""
    host: Host
    reader: InstructionReader | None
    clip: ClipText | None

    def read(self, text: TextTokens) -> Instruction:
        """What one prompt asks; without a processor, all text behind its last image, of which only tokens are known."""
        if self.reader is None:
            return Instruction("", text.behind_image, [(0, 0)] * len(text.behind_image))
        return self.reader.read(text.ids, text.columns)

    @untraced
    def make(self, instruction: Instruction, embeddings: Tensor, cls: Tensor, pooled: Tensor) -> Guide:
        """The guide of one prompt; without an image one that nothing will look at.

        `embeddings` (T, D) of all columns of the prompt; of its m images the CLS of the layer that the projector
        reads, `cls` (m, D_vision), and the post-normalised CLS of the encoder's last layer, `pooled` (m, D_vision).
        """
        no = torch.tensor(False)
        if cls.shape[0] == 0:
            return Guide(torch.zeros_like(embeddings[0]), no)
        visual = self.host.project_summary(cls).mean(dim=0).to(embeddings.dtype)
        assert self.options is not None
        kind = self.options.guide
        if kind == "visual":
            return Guide(visual, no)
        if kind == "text":
            weights = torch.ones(len(instruction.columns), device=visual.device, dtype=torch.float32)
            chosen = embeddings[on_device(instruction.columns, embeddings.device)]
            return Guide(*rel.pseudo_cls(chosen, weights, visual))
        assert self.clip is not None
        tokens, sentence, spans = self.clip.encode(instruction.text)
        if kind == "clip":
            return Guide(self._sentence(sentence, cls).to(embeddings.dtype), no, clip_tokens=len(spans))
        words = rel.words(instruction.text)
        spans = widened(spans, instruction.text)  # CLIP composes letters and points to their first character
        clip_words, own_words = rel.overlapping(words, spans), rel.overlapping(words, instruction.spans)
        with torch.autocast(tokens.device.type, enabled=False):
            by_token = self.rate(tokens, pooled).to(embeddings.device)
        weights = _weights(rel.spread(by_token, clip_words, own_words, len(instruction.columns)), self.options)
        token, empty = rel.pseudo_cls(embeddings[on_device(instruction.columns, embeddings.device)], weights, visual)
        scores = rel.spread(by_token, clip_words, [(i, i) for i in range(len(words))], len(words)).nan_to_num()
        joined = _joined(own_words, weights, len(words))
        return Guide(token, empty, tuple(instruction.text[a:b] for a, b in words), scores, joined, len(spans))

    def rate(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Relevance (n, m), float32, of CLIP's text tokens (n, P) to each image, of `pooled` (m, D_vision) (Eq. 5)."""
        assert self.clip is not None
        return rel.relevance(tokens, self.clip.image(pooled))

    def sentence(self, instruction: Instruction) -> tuple[Tensor, int]:
        """CLIP's embedding (P,) of what a prompt asks, and how many tokens CLIP read."""
        assert self.clip is not None
        _, sentence, spans = self.clip.encode(instruction.text)
        return sentence, len(spans)

    def cosines(self, patches: Tensor, sentences: Tensor) -> Tensor:
        """Cosine (I, N) of post-normalised patches (I, N, D_vision) with one sentence (I, P) for each image."""
        assert self.clip is not None
        projected = self.clip.image(patches).float()
        return torch.cosine_similarity(projected, sentences[:, None].float(), dim=-1).to(patches.device)

    def _sentence(self, sentence: Tensor, cls: Tensor) -> Tensor:
        """CLIP's sentence embedding on the path that a visual CLS takes, at a visual CLS's length."""
        assert self.clip is not None
        feature = self.clip.to_vision(sentence).to(cls.device)
        length = torch.linalg.vector_norm(cls.float(), dim=-1).mean()
        scaled = feature * length / torch.linalg.vector_norm(feature).clamp_min(1e-12)
        return self.host.project_summary(scaled.to(cls.dtype)[None])[0]


def _weights(scores: Tensor, options: GuideOptions) -> Tensor:
    """Weights of Eq. 7: 0/1 by the threshold, or the relevance itself where it is positive."""
    if options.guide == "weighted":
        return scores.nan_to_num().clamp_min(0)
    return (scores > options.threshold).float()


def _joined(own_words: list[tuple[int, int]], weights: Tensor, words: int) -> Tensor:
    """(words,) bool: whether a token of the word is in the pseudo CLS token."""
    word, token = (on_device([p[i] for p in own_words], weights.device) for i in (0, 1))
    return torch.zeros(words, device=weights.device, dtype=weights.dtype).index_add(0, word, weights[token]) > 0
