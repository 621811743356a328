"""Which words of the instruction speak of the image, and the token made of them (Eq. 5-7)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ivtp.core.characters import Span, letters
from ivtp.core.select import on_device


def words(text: str) -> list[Span]:
    """Character spans of the words: runs of letters and digits, every CJK character and every other sign by itself.

    White space belongs to no word; a combining mark belongs to the character that it is written on. Letters are those
    of the composed text (NFC): one that is written as several characters, such as a Hangul syllable, is one word.
    """
    spans: list[Span] = []
    in_run = False
    for start, stop in letters(text):
        character = unicodedata.normalize("NFC", text[start:stop])[0]
        kind = unicodedata.category(character)[0]
        touches = bool(spans) and spans[-1][1] == start
        runs = kind in "LN" and not _is_cjk(character)
        if character.isspace():
            continue
        if touches and (kind == "M" or (runs and in_run)):
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
            in_run = runs
    return spans


def _is_cjk(character: str) -> bool:
    """Whether the script of `character` writes without spaces: Chinese, kana, Hangul."""
    return unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))


def overlapping(spans: Sequence[Span], tokens: Sequence[Span]) -> list[tuple[int, int]]:
    """Pairs (word, token) whose character spans overlap. Both sequences are ordered, so one walk finds them all."""
    pairs = []
    first = 0
    for word, (start, stop) in enumerate(spans):
        while first < len(tokens) and tokens[first][1] <= start:
            first += 1
        token = first
        while token < len(tokens) and tokens[token][0] < stop:
            if tokens[token][1] > start:
                pairs.append((word, token))
            token += 1
    return pairs


def relevance(text: Tensor, image: Tensor) -> Tensor:
    """Cosine of every CLIP text token (n, P) with every image (m, P) of a prompt (Eq. 5): (n, m), float32."""
    return nn.functional.normalize(text.float(), dim=-1) @ nn.functional.normalize(image.float(), dim=-1).T


def spread(
    token_relevance: Tensor,
    clip_words: Sequence[tuple[int, int]],
    own_words: Sequence[tuple[int, int]],
    tokens: int,
) -> Tensor:
    """Relevance of each of `tokens` LLM tokens: the mean over the CLIP tokens of its word or words (Eq. 6).

    `token_relevance` (n, m) of the CLIP tokens; `clip_words` and `own_words` are (word, token) pairs of the two
    tokenizations. Of several images the one that suits the token best counts. Returns (tokens,); NaN for tokens that
    belong to no word that CLIP read.
    """
    by_word: dict[int, list[int]] = {}
    for word, token in clip_words:
        by_word.setdefault(word, []).append(token)
    own: dict[int, set[int]] = {}
    for word, token in own_words:
        own.setdefault(token, set()).update(by_word.get(word, ()))
    pairs = [(token, clip) for token, clips in own.items() for clip in sorted(clips)]
    device = token_relevance.device
    target, source = (on_device([p[i] for p in pairs], device) for i in (0, 1))
    taken = token_relevance[source]  # (pairs, m)
    total = torch.zeros(tokens, taken.shape[1], device=device, dtype=torch.float32).index_add(0, target, taken)
    count = torch.zeros_like(total).index_add(0, target, torch.ones_like(taken))
    return (total / count).amax(dim=1)  # 0 / 0 = NaN: never above a threshold


def pseudo_cls(embeddings: Tensor, weights: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of token embeddings, or `fallback` where all weights are 0 (Eq. 7 with 0/1 weights).

    `embeddings` (n, D), `weights` (n,) non-negative, `fallback` (D,). Returns the token (D,) and a bool scalar,
    True where the fallback was taken; no value of either is read on the host.
    """
    total = weights.sum()
    mean = (weights.to(embeddings.dtype) @ embeddings) / total.clamp_min(1e-12).to(embeddings.dtype)
    empty = total <= 0
    return torch.where(empty, fallback, mean), empty
