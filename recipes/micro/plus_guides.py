"""Guides that were tried for IVTP+: words weighed by entropy, and a pseudo CLS token for each relevant word.

They read prompts of one image each, at original positions, as `generate` counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ivtp.config import PruneConfig
from ivtp.core import relevance as rel
from ivtp.core.rollout import importance, weighted_column_sum
from ivtp.core.select import on_device
from ivtp.cost.layers import text_layer
from ivtp.guide.pseudo_cls import Guide, GuideMaker
from ivtp.hosts.base import Host
from ivtp.methods.base import ChoiceCost, Cut, Window
from ivtp.methods.groups import GroupWise
from ivtp.methods.ivtp_plus import IvtpPlus
from ivtp.plug.calls import Equipment
from ivtp.plug.entry import equip, find_host
from ivtp.plug.pruner import Pruner
from ivtp.prompt.instruction import Instruction

TEMPERATURE = 0.01
"""Of the softmax over the patches: the lowest that CLIP's training allows (Radford et al., ICML 2021)."""
WORDS = 3
"""Pseudo CLS tokens that a question is counted with: 2.2 of its words are relevant in the mean, on validation."""


@dataclass(frozen=True)
class Peaked(GuideMaker):
    """Weighs words by how peaked their similarity to the patches is: 1 - its entropy, of at most 1."""

    patches: list[Tensor] = field(default_factory=list)
    """Of the prompts whose guides are still to be made: (N, D_vision) each, post-normalised."""

    def cosines(self, patches: Tensor, sentences: Tensor) -> Tensor:
        """Also remembers the patches, which the guides are made from next."""
        self.patches[:] = patches
        return super().cosines(patches, sentences)

    def rate(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Weights (n, 1) of CLIP's text tokens (n, P); 0 of those that are not relevant to the image (Eq. 5)."""
        assert self.clip is not None
        assert self.options is not None
        patches = self.clip.image(self.patches.pop(0))
        share = (rel.relevance(tokens, patches) / TEMPERATURE).log_softmax(dim=1)  # (n, N)
        entropy = -(share.exp() * share).sum(dim=1, keepdim=True) / math.log(len(patches))
        return torch.where(super().rate(tokens, pooled) > self.options.threshold, 1 - entropy, 0.0)


@dataclass(frozen=True)
class EachWord(GuideMaker):
    """Also makes a token of each relevant word alone, or of the whole guide where no word is relevant."""

    words: list[Tensor] = field(default_factory=list)
    """Of the prompts that the decoder reads next: (W, D) each."""

    def make(self, instruction: Instruction, embeddings: Tensor, cls: Tensor, pooled: Tensor) -> Guide:
        """The guide as it is, while its words are remembered."""
        guide = super().make(instruction, embeddings, cls, pooled)
        own = rel.overlapping(rel.words(instruction.text), instruction.spans)
        used = guide.used.nonzero().flatten().tolist() if guide.used is not None else []
        columns = [[instruction.columns[token] for word, token in own if word == wanted] for wanted in used]
        tokens = [embeddings[on_device(places, embeddings.device)].mean(dim=0) for places in columns]
        self.words.append(torch.stack(tokens or [guide.token]))
        return guide


class WordTokens:
    """Tokens behind a prompt that see it and themselves, not one another, and that nothing sees, on their way down."""

    def __init__(self, host: Host, words: list[Tensor], window: Window) -> None:
        """`words` (W, D) of each row of the first window."""
        self.host = host
        self.hidden = nn.utils.rnn.pad_sequence(words, batch_first=True)  # (B, W, D)
        self.there = torch.arange(self.hidden.shape[1]) < torch.tensor([[len(own)] for own in words])  # (B, W)
        valid, decoder = window.taps[0].valid, cast(Any, host.text.module)
        text = window.patch < 0 if valid is None else valid & (window.patch < 0)
        place = text.sum(dim=1, keepdim=True) - 1 + host.size.num_patches  # the pseudo CLS token's
        self.turn = decoder.rotary_emb(self.hidden, place)

    def rollout(self, window: Window) -> Tensor:
        """Their rows of the rollout (Eq. 3): (B, W, T), each at its own column in the place of the pseudo CLS token."""
        maps = [self._attend(window, place) for place in range(len(window.taps))]
        row = maps[-1] / 2
        row[..., -1] += 0.5
        for tap, attention in zip(window.taps[-2::-1], maps[-2::-1], strict=True):
            prompt = row.clone()
            prompt[..., -1] = 0
            stepped = [weighted_column_sum(tap, prompt[:, word].contiguous()) for word in range(row.shape[1])]
            row = (torch.stack(stepped, dim=1) + row[..., -1:] * attention + row) / 2
        return row

    def _attend(self, window: Window, place: int) -> Tensor:
        """Go on to behind the attention of a tap's layer; its weights (B, W, T), averaged over the heads."""
        layer, tap = window.cut.taps[place], window.taps[place]
        block: Any = self.host.text.layers[layer]
        if layer:
            self.hidden = self.host.text.feed_forward(layer - 1, self.hidden)
        normed, attention = block.input_layernorm(self.hidden), block.self_attn
        project = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (p(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for p in project)
        query, key = apply_rotary_pos_emb(query, key, *self.turn)  # (B, H, W, d)
        logits = query @ tap.key.transpose(2, 3)  # (B, H, W, T)
        if tap.valid is not None:
            logits = logits.masked_fill(~tap.valid[:, None, None], torch.finfo(logits.dtype).min)
        logits[..., -1] = (query * key).sum(dim=3)
        weights = (logits * tap.scale).softmax(dim=3)
        attended = weights[..., :-1] @ tap.value[:, :, :-1] + weights[..., -1:] * value
        self.hidden = self.hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
        averaged: Tensor = weights.mean(dim=1)
        return averaged


class Guided(IvtpPlus):
    """IVTP+ with a maker of guides of its own, see `attach`."""

    Maker: type[GuideMaker]
    maker: Any


class PeakedWords(Guided):
    """The pseudo CLS token is the mean of words weighed by entropy; with `guide="weighted"`."""

    reads_clip = True
    Maker = Peaked


class WordRollouts(GroupWise):
    """Importance by the rollouts of several tokens, one for each relevant word: the highest of them."""

    maker: EachWord

    def score(self, window: Window) -> Tensor:
        """Eq. 3 and 4 for every word."""
        if window.cut.taps[0] == 0:
            self.tokens = WordTokens(self.maker.host, list(self.maker.words), window)
            self.maker.words.clear()
        rows = self.tokens.rollout(window).unbind(dim=1)
        worth = torch.stack([importance(row, window.taps[-1].value, window.visual) for row in rows], dim=1)
        return self.joined(worth, self.tokens.there.unsqueeze(2))

    def joined(self, worth: Tensor, there: Tensor) -> Tensor:
        """(B, T) of the words' importances (B, W, T) where they are `there` (B, W, 1)."""
        return (worth * there).amax(dim=1)


class HighestOfWords(Guided, WordRollouts):
    """A pseudo CLS token for each relevant word: the one that a visual token matters most to counts."""

    Maker = EachWord

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """As with one word, and the other words' tokens in the layers of the group."""
        choice, length, g = super().cost(cut, entering, text_tokens), entering + text_tokens, self.geometry
        if cut.where == "vision":
            return choice
        layer = text_layer(g, length + 1, length + 1) - text_layer(g, length, length)
        sums = 2.0 * length**2 * g.text_heads * (len(cut.taps) - 1)
        return replace(choice, flops=choice.flops + (WORDS - 1) * (len(cut.taps) * layer + sums))


class MeanOfWords(HighestOfWords):
    """A pseudo CLS token for each relevant word: the mean over them counts."""

    def joined(self, worth: Tensor, there: Tensor) -> Tensor:
        """(B, T)."""
        return (worth * there).sum(dim=1) / there.sum(dim=1)


def attach(model: nn.Module, processor: Any, kind: type[Guided], keep: int, **options: Any) -> Pruner:
    """As `ivtp.attach`, with the guides that `kind` makes."""
    host = find_host(model)

    def own(config: PruneConfig) -> Equipment:
        plain = equip(host, processor, None, config)
        made = plain.guide_maker
        maker = kind.Maker(made.options, made.host, made.reader, made.clip)
        plain.method.maker = maker  # type: ignore[attr-defined]  # it is one of `kind`
        return Equipment(plain.method, maker)

    pruner = Pruner(host, own, PruneConfig.of(method=kind, keep=keep, **options))
    pruner.install()
    return pruner
