"""The two stages of a prefill: cuts inside the vision encoder and cuts inside the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivtp.core.merge import follow, sizes
from ivtp.core.rollout import AttentionTap
from ivtp.core.select import keep_highest, on_device, right_aligned, take
from ivtp.core.sequence import Seen, TokenSequence, join_images, offset_images
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Merged, Method, Window
from ivtp.prompt import PromptBatch
from ivtp.trace import Where


@dataclass(frozen=True)
class CutResult:
    """What one cut decided: the patches that entered it, their scores, and those that stayed; -1 pads."""

    cut: Cut
    candidates: Tensor  # (B, T) patch of every token, -1 for others
    scores: Tensor  # (B, T)
    kept: Tensor  # (B, T') patch of every token that stayed, -1 for others
    sources: Tensor | None = None  # (B, N) the patch that stands for each, -1: none; None where nothing merges


class Stage:
    """What both stages share: taps that wait for their cut, and the record of the cuts."""

    where: Where

    def __init__(self, host: Host, method: Method) -> None:
        self.host = host
        self.method = method
        self.results: list[CutResult] = []
        self._taps: dict[int, AttentionTap] = {}
        self._sources: Tensor | None = None
        self._awaited = {tap for cut in method.plan.cuts if cut.where == self.where for tap in cut.taps}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed, until the cut that reads it."""
        if layer in self._awaited:
            self._taps[layer] = self._tap(query.detach(), key.detach(), value.detach(), scale)

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) within or behind a layer."""
        raise NotImplementedError

    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """See what the layer behind a cut computes of (B, T, D)."""
        raise NotImplementedError

    def _tap(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        raise NotImplementedError

    def _take_taps(self, cut: Cut) -> tuple[AttentionTap, ...]:
        self._awaited -= set(cut.taps)
        return tuple(self._taps.pop(layer) for layer in cut.taps)

    def release(self) -> None:
        """Let go of the layers' tensors; the results stay."""
        self._taps.clear()
        self._sources = None

    @torch.no_grad()
    def _score(self, window: Window) -> Tensor:
        """The choice of tokens is not differentiated; gradients flow through the tokens that stay."""
        with torch.autocast(window.hidden.device.type, enabled=False):  # scores are float32 whatever the model is
            return self.method.score(window)

    def _merge(self, window: Window) -> Merged | None:
        with torch.autocast(window.hidden.device.type, enabled=False):
            merged = self.method.merge(window)
        if merged is not None:
            assert window.sources is not None
            self._sources = follow(window.sources, window.patch, merged.into)
        return merged


@dataclass(frozen=True)
class Encoded:
    """What the encoder gives for I images."""

    patches: Tensor  # (I, k): which patches the features stand for
    features: Tensor  # (I, k, D): projected
    cls: Tensor  # (I, D_vision): CLS of the layer that the projector reads
    pooled: Tensor  # (I, D_vision): post-normalised CLS of the last layer
    sources: Tensor  # (I, N): the patch that stands for each one, -1 where it was dropped

    def __getitem__(self, images: Tensor) -> Encoded:
        return Encoded(*(part[images] for part in (self.patches, self.features, self.cls, self.pooled, self.sources)))


class EncoderStage(Stage):
    """Stage 1: each image by itself; every row has the same number of tokens."""

    where = "vision"

    def __init__(self, host: Host, method: Method) -> None:
        super().__init__(host, method)
        self._patch = torch.empty(0)
        self._feature: Tensor | None = None
        self._relevance: Tensor | None = None
        self._reordered = False

    def run(self, pixels: Tensor, relevance: Callable[[Tensor], Tensor] | None = None) -> Encoded:
        """Run the encoder on (I, 3, H, W); hooks on its layers call the other methods meanwhile.

        `relevance` rates the patches (I, N) by the last layer's output (I, 1 + N, D), for methods that ask for it.
        """
        size = self.host.size
        indices = torch.arange(-size.vision_cls, size.num_patches, device=pixels.device).clamp_min(-1)
        self._patch = indices.expand(pixels.shape[0], -1)  # (I, 1 + N)
        self._sources = self._patch[:, size.vision_cls :]
        pooled, last = self.host.run_vision(pixels)
        if relevance is not None:
            self._relevance = relevance(last)
        assert self._feature is not None
        hidden = self._feature
        cls = hidden[:, 0]
        behind, projected = (
            [c for c in self.method.plan.cuts if c.is_after_encoder(size) and c.place == place]
            for place in ("behind", "projected")
        )
        for cut in behind:
            hidden = self.cut(cut, hidden)
        features = self.host.project(hidden[:, size.vision_cls :])
        self._patch = self._patch[:, size.vision_cls :]
        for cut in projected:
            features = self.cut(cut, features)
        patches = self._patch
        if self._reordered and self.method.config.positions == "original":  # position ids only grow
            patches, order = patches.sort(dim=1)
            features = take(features, order)
        return Encoded(patches, features, cls, pooled, self._sources)

    def release(self) -> None:
        """Let go of the images' features."""
        super().release()
        self._feature = self._relevance = None

    def feature_layer_done(self, hidden: Tensor) -> None:
        """Take the output (I, T, D) of the layer that the projector reads."""
        self._feature = hidden

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (I, T, D), of the encoder or of projected features."""
        window = Window(
            cut,
            self._take_taps(cut),
            hidden,
            self._patch,
            reference=0,
            sources=self._sources,
            relevance=self._relevance,
        )
        others = hidden.shape[1] - self.method.plan.entering(cut, self.host.size)
        merged = self._merge(window)
        if merged is None:
            scores = self._score(window)
            keep = keep_highest(scores, window.visual, cut.keep) | ~window.visual  # CLS stays
            index = right_aligned(keep, cut.keep + others)
        else:
            hidden, scores = merged.hidden, torch.zeros_like(window.patch, dtype=torch.float32)
            columns = torch.arange(hidden.shape[1], device=hidden.device)
            index = right_aligned((merged.into == columns) | ~window.visual, cut.keep + others)
            if merged.order is not None:
                self._reordered = True
                index = torch.cat([index[:, :others], merged.order], dim=1)
        self._patch = window.patch.gather(1, index)
        sources = self._sources if merged is not None else None
        kept = self._patch if merged is None else self._patch.sort(dim=1).values
        self.results.append(CutResult(cut, window.patch, scores, kept, sources))
        return take(hidden, index)

    def bias(self, cut: Cut) -> Tensor | None:
        """What to add to the attention logits of a layer whose attention counts merged tokens by their size."""
        if not cut.sized:
            return None
        assert self._sources is not None
        return sizes(self._sources, self._patch).log()[:, None, None]  # (I, 1, 1, T)

    def _tap(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        return AttentionTap(query, key, value, scale, causal=False)


class Peeked(Exception):  # noqa: N818  # no error: it ends a look ahead
    """Raised once the queries and keys of a layer that is only looked at are there."""


class DecoderStage(Stage):
    """Stage 2: all visual tokens of a prompt together; text stays, the guide leaves with the last cut."""

    where = "llm"

    def __init__(
        self,
        host: Host,
        method: Method,
        prompts: PromptBatch,
        sequence: TokenSequence,
        sources: Tensor,
        embeddings: Tensor,
    ) -> None:
        """`sources` (slots, N) is `Encoded.sources` for every image of the rows; `embeddings` (B, T, D) enter."""
        super().__init__(host, method)
        self.prompts = prompts
        self.seen = [Seen(0, sequence, guide=method.plan.guide_layers > 0)]
        self._inputs: dict[str, Any] | None = None
        self._peeking = False
        self._text: Tensor | None = None
        if method.reads_text:
            question, tail = prompts.question_in(sequence), prompts.slots.tail + (method.plan.guide_layers > 0)
            with torch.no_grad():
                self._text = method.read_text(embeddings, sequence.visual, question, tail)
        if method.info.merges:
            patches = host.size.num_patches
            self._sources = join_images(offset_images(sources, prompts.images, patches), prompts.images, -1)

    @property
    def sequence(self) -> TokenSequence:
        """What the layer that runs now sees."""
        return self.seen[-1].sequence

    def entry_mask(self, hidden: Tensor) -> Tensor:
        """The mask that the decoder is handed: of padding, or whole where the guide must not see the answer."""
        valid = self.sequence.valid.long()
        visible = self._visible()
        if visible is not None:
            whole: Tensor = self.host.causal_mask(hidden, valid, visible)
            return whole
        # also given without padding: gaps in the positions must not be taken for packed sequences
        return valid

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) within or behind a layer; later layers get `layer_inputs`."""
        part, sequence = self.seen[-1], self.sequence
        window = self._window(cut, hidden)
        merged = self._merge(window)
        if merged is None:
            scores = self._score(window)
            budget = on_device([n * cut.keep for n in self.prompts.images], hidden.device)
            gone = sequence.visual & ~keep_highest(scores, sequence.visual, budget)
        else:
            hidden, scores = merged.hidden, torch.zeros_like(sequence.patch, dtype=torch.float32)
            gone = sequence.visual & (merged.into != torch.arange(sequence.length, device=hidden.device))
        drops_guide = part.guide and cut.layer == self.method.plan.guide_layers - 1
        if drops_guide:
            gone, sequence = gone[:, :-1], sequence.without_guide()
        removed = self.method.plan.entering(cut, self.host.size) - cut.keep
        after, index = sequence.drop(gone, [n * removed for n in self.prompts.images])
        sources = self._sources if merged is not None else None
        self.results.append(CutResult(cut, part.sequence.patch, scores, after.patch, sources))
        self.seen[-1] = Seen(part.first_layer, part.sequence, part.guide, index)
        self.seen.append(Seen(cut.layer + 1, after, part.guide and not drops_guide))
        self._inputs = None
        return take(hidden, index)

    @torch.no_grad()
    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """See what the layer behind a cut would compute of all tokens (B, T, D); nothing is written to the cache."""
        layer = self.host.text_layers[cut.taps[-1]]
        arguments = {k: v for k, v in arguments.items() if k not in ("past_key_values", "past_key_value", "use_cache")}
        self._peeking = True
        try:
            self.host.attend("llm", layer, hidden, past_key_values=None, **arguments)
        except Peeked:
            pass
        finally:
            self._peeking = False

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed; ends a look ahead."""
        super().see(layer, query, key, value, scale)
        if self._peeking:
            raise Peeked

    def layer_inputs(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a decoder layer: mask and rotary embeddings cut as the tokens are."""
        # rotary embeddings are made; FlashAttention would take gaps in position ids for packed sequences
        kwargs = {**kwargs, "position_ids": None}
        if len(self.seen) == 1:
            return kwargs
        if self._inputs is None:  # once for all layers up to the next cut
            self._inputs = {
                "attention_mask": self._mask(hidden),
                "position_embeddings": tuple(take(t, self._index()) for t in kwargs["position_embeddings"]),
            }
        return {**kwargs, **self._inputs}

    def release(self) -> None:
        """Let go of the masks and rotary embeddings."""
        super().release()
        self._inputs = None

    def _window(self, cut: Cut, hidden: Tensor) -> Window:
        sequence, text = self.sequence, self._text
        if text is not None and len(self.seen) > 1:
            text = text.gather(1, self._index())
        return Window(
            cut,
            self._take_taps(cut),
            hidden,
            sequence.patch,
            self._reference(),
            images=self.prompts.images,
            sources=self._sources,
            text=text,
            tail=self.prompts.slots.tail,
        )

    def _reference(self) -> int | Tensor:
        """The guide or else the last token of the prompt, which an answer or padding may follow."""
        sequence = self.sequence
        answer = self.prompts.answer_in(sequence)
        if self.seen[-1].guide or (answer is None and not sequence.holes):
            return -1
        prompt = sequence.valid if answer is None else sequence.valid & ~answer
        columns = torch.arange(sequence.length, device=prompt.device)
        return torch.where(prompt, columns, 0).amax(dim=1)

    def _tap(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        sequence = self.sequence
        return AttentionTap(
            query,
            key,
            value,
            scale,
            causal=True,
            valid=sequence.valid if sequence.padded else None,
            hidden_from_last=self.prompts.answer_in(sequence) if self.seen[-1].guide else None,
        )

    def _index(self) -> Tensor:
        """Columns (B, T') of the first layer's sequence that are left."""
        index: Tensor | None = None
        for part in self.seen[:-1]:
            assert part.index is not None
            index = part.index if index is None else index.gather(1, part.index)
        assert index is not None
        return index

    def _mask(self, hidden: Tensor) -> Any:
        visible = self._visible()
        needed = self.sequence.padded or visible is not None
        return self.host.causal_mask(hidden, self.sequence.valid.long() if needed else None, visible)

    def _visible(self) -> Callable[..., Tensor] | None:
        """Hides the answer from the guide, the last column; None where there is nothing to hide."""
        answer = self.prompts.answer_in(self.sequence) if self.seen[-1].guide else None
        if answer is None:
            return None
        hidden, last = answer, self.sequence.length - 1

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query != last) | ~hidden[batch, key]

        return visible
