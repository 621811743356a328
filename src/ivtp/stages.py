"""The two stages of a prefill: cuts inside the vision encoder and cuts inside the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivtp.core.rollout import AttentionTap
from ivtp.core.select import keep_highest, right_aligned, take
from ivtp.core.sequence import Seen, TokenSequence
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Merged, Method, Window
from ivtp.prompt import PromptBatch


@dataclass(frozen=True)
class CutResult:
    """What one cut decided: the patches that entered it, their scores, and those that stayed; -1 pads."""

    cut: Cut
    candidates: Tensor  # (B, T) patch of every token, -1 for others
    scores: Tensor  # (B, T)
    kept: Tensor  # (B, T') patch of every token that stayed, -1 for others
    sources: Tensor | None = None


class Stage:
    """What both stages share: taps that wait for their cut, and the record of the cuts."""

    def __init__(self, host: Host, method: Method) -> None:
        self.host = host
        self.method = method
        self.results: list[CutResult] = []
        self._taps: dict[int, AttentionTap] = {}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed, until the cut that reads it."""
        self._taps[layer] = self._tap(query.detach(), key.detach(), value.detach(), scale)

    def _tap(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        raise NotImplementedError

    def _window(self, cut: Cut, hidden: Tensor, patch: Tensor, reference: int) -> Window:
        return Window(cut, tuple(self._taps.pop(layer) for layer in cut.taps), hidden, patch, reference)

    def release(self) -> None:
        """Let go of the layers' tensors; the results stay."""
        self._taps.clear()

    @torch.no_grad()
    def _score(self, window: Window) -> Tensor:
        """The choice of tokens is not differentiated; gradients flow through the tokens that stay."""
        with torch.autocast(window.hidden.device.type, enabled=False):  # scores are float32 whatever the model is
            return self.method.score(window)


@dataclass(frozen=True)
class Encoded:
    """What the encoder gives for I images."""

    patches: Tensor  # (I, k): which patches the features stand for
    features: Tensor  # (I, k, D): projected
    cls: Tensor  # (I, D_vision): CLS of the layer that the projector reads
    pooled: Tensor  # (I, D_vision): post-normalised CLS of the last layer

    def __getitem__(self, images: Tensor) -> Encoded:
        return Encoded(*(part[images] for part in (self.patches, self.features, self.cls, self.pooled)))


class EncoderStage(Stage):
    """Stage 1: each image by itself; every row has the same number of tokens."""

    def __init__(self, host: Host, method: Method) -> None:
        super().__init__(host, method)
        self._patch = torch.empty(0)
        self._feature: Tensor | None = None
        self._after = next((c for c in method.plan.cuts if c.where == "vision" and c.after), None)

    def run(self, pixels: Tensor) -> Encoded:
        """Run the encoder on (I, 3, H, W); hooks on its layers call the other methods meanwhile."""
        size = self.host.size
        indices = torch.arange(-size.vision_cls, size.num_patches, device=pixels.device).clamp_min(-1)
        self._patch = indices.expand(pixels.shape[0], -1)  # (I, 1 + N)
        pooled = self.host.run_vision(pixels)
        assert self._feature is not None
        cls, tokens = self._feature[:, 0], self._feature[:, size.vision_cls :]
        return Encoded(self._patch[:, size.vision_cls :], self.host.project(tokens), cls, pooled)

    def release(self) -> None:
        """Let go of the images' features."""
        super().release()
        self._feature = None

    def feature_layer_done(self, hidden: Tensor) -> None:
        """Take the output (I, T, D) of the layer that the projector reads, cut where the method cuts behind it.

        The layers behind it, which only make the pooled CLS, go on with all tokens.
        """
        if self._after is None:
            self._feature = hidden
            return
        window = self._window(self._after, hidden, self._patch, reference=0)
        merged = self.method.merge(window)
        if merged is None:
            self._feature, self._patch = self._select(window)
        else:
            self._feature, self._patch = self._take_merged(window, merged)

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (I, T, D) between attention and MLP."""
        hidden, self._patch = self._select(self._window(cut, hidden, self._patch, reference=0))
        return hidden

    def _tap(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        return AttentionTap(query, key, value, scale, causal=False)

    def _select(self, window: Window) -> tuple[Tensor, Tensor]:
        scores = self._score(window)
        keep = keep_highest(scores, window.visual, window.cut.keep) | ~window.visual  # CLS stays
        index = right_aligned(keep, window.cut.keep + self.host.size.vision_cls)
        patch = window.patch.gather(1, index)
        self.results.append(CutResult(window.cut, window.patch, scores, patch))
        return take(window.hidden, index), patch

    def _take_merged(self, window: Window, merged: Merged) -> tuple[Tensor, Tensor]:
        first = self.host.size.vision_cls
        patch = torch.cat([window.patch[:, :first], merged.patch], dim=1)
        unranked = torch.zeros_like(window.patch, dtype=torch.float32)
        self.results.append(CutResult(window.cut, window.patch, unranked, patch, merged.sources))
        return torch.cat([window.hidden[:, :first], merged.hidden], dim=1), patch


class DecoderStage(Stage):
    """Stage 2: all visual tokens of a prompt together; text stays, the guide leaves with the last cut."""

    def __init__(self, host: Host, method: Method, prompts: PromptBatch, sequence: TokenSequence) -> None:
        super().__init__(host, method)
        self.prompts = prompts
        self.seen = [Seen(0, sequence, guide=method.plan.guide_layers > 0)]
        self._inputs: dict[str, Any] | None = None

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
        """Cut (B, T, D) between attention and MLP; later layers get `layer_inputs`."""
        part, sequence = self.seen[-1], self.sequence
        scores = self._score(self._window(cut, hidden, sequence.patch, reference=-1))
        budget = torch.tensor([n * cut.keep for n in self.prompts.images], device=hidden.device)
        gone = sequence.visual & ~keep_highest(scores, sequence.visual, budget)
        drops_guide = part.guide and cut.layer == self.method.plan.guide_layers - 1
        if drops_guide:
            gone, sequence = gone[:, :-1], sequence.without_guide()
        removed = self._tokens_before(cut) - cut.keep
        after, index = sequence.drop(gone, [n * removed for n in self.prompts.images])
        self.results.append(CutResult(cut, part.sequence.patch, scores, after.patch))
        self.seen[-1] = Seen(part.first_layer, part.sequence, part.guide, index)
        self.seen.append(Seen(cut.layer + 1, after, part.guide and not drops_guide))
        self._inputs = None
        return take(hidden, index)

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

    def _tokens_before(self, cut: Cut) -> int:
        cuts = self.method.plan.cuts
        place = next(i for i, other in enumerate(cuts) if other is cut)
        return cuts[place - 1].keep if place else self.host.size.num_patches
