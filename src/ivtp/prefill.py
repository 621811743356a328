"""One prefill with pruning: from the prompt and its images to shortened layers, a shortened cache and a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ivtp.config import PruneConfig
from ivtp.core.rollout import AttentionTap
from ivtp.core.select import keep_highest, right_aligned, take
from ivtp.core.sequence import Placeholders, Seen, TokenSequence, enter_decoder, prune_cache
from ivtp.errors import InputError
from ivtp.guide import Guide, GuideMaker, Prompt
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Merged, Method, Window


@dataclass(frozen=True)
class CutResult:
    """What one cut decided: the patches that entered it, their scores, and those that stayed; -1 pads."""

    cut: Cut
    candidates: Tensor  # (B, T) patch of every token, -1 for others
    scores: Tensor  # (B, T)
    kept: Tensor  # (B, T') patch of every token that stayed, -1 for others
    sources: Tensor | None = None


@dataclass
class Prefill:
    """The state of one prefill, from `start` (encoder, guide, decoder inputs) over the cuts to `finish`."""

    host: Host
    method: Method
    guide_maker: GuideMaker
    repeats: int = 1
    """Rows in a row that are copies of one prompt (beams); its images are given, and encoded, once."""
    images: tuple[int, ...] = ()
    """Images in each row."""
    image_of_slot: list[int] = field(default_factory=list)
    """For every image slot of the batch, row by row, which of the given images is there."""
    cuts: list[CutResult] = field(default_factory=list)
    guides: list[Guide] = field(default_factory=list)
    prompt_length: int = 0
    """Tokens of the unpruned prompt, padding included."""
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    stage: str = ""
    """Which tower is running: "vision", "llm" or "" for none."""
    seen: list[Seen] = field(default_factory=list)
    image_features: Tensor | None = None

    _taps: dict[int, AttentionTap] = field(default_factory=dict)
    _patch: Tensor | None = None
    _feature: Tensor | None = None
    _layer_inputs: dict[str, Any] | None = None
    _answer: Tensor | None = None
    _shift: Tensor | None = None

    @property
    def config(self) -> PruneConfig:
        """What was asked."""
        return self.method.config

    # ---- the prompt -------------------------------------------------------------------------------------------

    def start(self, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """Replace `input_ids` and `pixel_values` among the model's inputs by a shortened `inputs_embeds`.

        Raises `InputError` for prompts that cannot be pruned; nothing has run by then.
        """
        ids, pixels = _checked_inputs(inputs)
        _check_cache(inputs.get("past_key_values"))
        self.prompt_length = ids.shape[1]
        slots = self._find_slots(ids, pixels.shape[0])
        prompt, rows_valid = _describe_prompt(ids, inputs.get("attention_mask"), inputs.get("position_ids"))
        self._answer = _answer_columns(labels, ids, prompt.valid & ~slots.mask)
        rows = torch.tensor(self.image_of_slot, device=pixels.device)
        patches, features, cls, pooled = (part[rows] for part in self._run_vision(pixels))
        compact = self.config.positions == "compact"
        sequence, index = enter_decoder(slots, prompt, patches, compact)
        embeddings = self._embed(ids.gather(1, index), sequence, features)
        if compact:
            gone = slots.num_patches - patches.shape[1]
            self._shift = torch.tensor(self.images, device=ids.device).unsqueeze(1) * gone
        if self.method.plan.guide_layers:
            guides = self._make_guides(ids, slots, rows_valid, cls, pooled)
            embeddings = torch.cat([embeddings, guides.to(embeddings.dtype)], dim=1)
            sequence = sequence.with_guide(None if self._answer is None else self._answer_in(sequence))
        self.seen.append(Seen(0, sequence, guide=self.method.plan.guide_layers > 0))
        self.stage = "llm"
        return {
            **inputs,
            "input_ids": None,
            "pixel_values": None,
            "inputs_embeds": embeddings,
            "attention_mask": self._entry_mask(embeddings, sequence),
            "position_ids": sequence.position,
        }

    def _find_slots(self, ids: Tensor, images: int) -> Placeholders:
        patches = self.host.size.num_patches
        mask = ids == self.host.image_token
        counts = mask.sum(dim=1).tolist()
        if sum(counts) != images * patches * self.repeats or any(c % patches for c in counts):
            raise InputError(
                f"the prompt has {sum(counts)} image slots for {images} image(s) of {patches} patches each; "
                "build it with the model's processor, one <image> for each picture"
            )
        self.images = tuple(c // patches for c in counts)
        first = 0
        for start in range(0, len(counts), self.repeats):
            own = range(first, first + self.images[start])
            self.image_of_slot.extend([*own] * self.repeats)
            first = own.stop
        return Placeholders(mask, self.images, patches)

    def _embed(self, ids: Tensor, sequence: TokenSequence, features: Tensor) -> Tensor:
        """Token embeddings (B, T', D) with the image features in their slots."""
        embeddings: Tensor = self.host.embedding(ids)
        features = features.to(embeddings.device, embeddings.dtype)
        self.image_features = features.flatten(0, 1)
        return embeddings.masked_scatter(sequence.visual.unsqueeze(-1), features)

    # ---- stage 1: the encoder ---------------------------------------------------------------------------------

    def _run_vision(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kept patches (I, k), projected features (I, k, D), feature-layer CLS and pooled CLS (I, D_vision) each."""
        self.stage = "vision"
        size = self.host.size
        indices = torch.arange(-size.vision_cls, size.num_patches, device=pixels.device).clamp_min(-1)
        self._patch = indices.expand(pixels.shape[0], -1)  # (I, 1 + N)
        pooled = self.host.run_vision(pixels)
        assert self._feature is not None
        feature, patch = self._feature, self._patch[:, size.vision_cls :]
        cls, tokens = feature[:, 0], feature[:, size.vision_cls :]
        self.stage, self._feature, self._patch = "", None, None
        return patch, self.host.project(tokens), cls, pooled

    def feature_layer_done(self, hidden: Tensor) -> None:
        """Called with the output (I, T, D) of the layer that feeds the projector."""
        cut = next((c for c in self.method.plan.cuts if c.where == "vision" and c.after), None)
        if cut is None:
            self._feature = hidden
            return
        assert self._patch is not None
        # the encoder's last layer goes on with all tokens; only what the projector reads is cut
        window = self._window(cut, hidden, self._patch, reference=0)
        merged = self.method.merge(window)
        if merged is None:
            self._feature, self._patch = self._select_in_vision(window)
        else:
            self._feature, self._patch = self._take_merged(window, merged)

    def cut_vision(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (I, T, D) between attention and MLP."""
        assert self._patch is not None
        hidden, self._patch = self._select_in_vision(self._window(cut, hidden, self._patch, reference=0))
        return hidden

    def _select_in_vision(self, window: Window) -> tuple[Tensor, Tensor]:
        scores = self._score(window)
        keep = keep_highest(scores, window.visual, window.cut.keep) | ~window.visual  # CLS stays
        index = right_aligned(keep, window.cut.keep + self.host.size.vision_cls)
        patch = window.patch.gather(1, index)
        self.cuts.append(CutResult(window.cut, window.patch, scores, patch))
        return take(window.hidden, index), patch

    def _take_merged(self, window: Window, merged: Merged) -> tuple[Tensor, Tensor]:
        scores = self._score(window)
        first = self.host.size.vision_cls
        patch = torch.cat([window.patch[:, :first], merged.patch], dim=1)
        self.cuts.append(CutResult(window.cut, window.patch, scores, patch, merged.sources))
        return torch.cat([window.hidden[:, :first], merged.hidden], dim=1), patch

    # ---- stage 2: the decoder ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _make_guides(
        self, ids: Tensor, slots: Placeholders, rows_valid: list[list[bool]], cls: Tensor, pooled: Tensor
    ) -> Tensor:
        """The pseudo CLS token of each row: (B, 1, D)."""
        text = self.host.embedding(ids)  # (B, T, D)
        rows, is_slot = ids.tolist(), slots.mask.tolist()
        ends = [ids.shape[1]] * len(rows) if self._answer is None else _first_true(self._answer)
        first = 0
        for row, count in enumerate(self.images):
            columns = [c for c in range(ends[row]) if rows_valid[row][c] and not is_slot[row][c]]
            prompt = Prompt(
                ids=[rows[row][c] for c in columns],
                columns=columns,
                last_image_column=max((c for c in range(ids.shape[1]) if is_slot[row][c]), default=-1),
                embeddings=text[row],
                cls=cls[first : first + count],
                pooled=pooled[first : first + count],
            )
            self.guides.append(self.guide_maker.make(prompt))
            first += count
        return torch.stack([guide.token for guide in self.guides]).unsqueeze(1)

    def _entry_mask(self, hidden: Tensor, sequence: TokenSequence) -> Tensor | None:
        """The mask that the decoder is handed: of padding, or whole where the guide must not see the answer."""
        visible = self._visible_to_guide(sequence)
        if visible is not None:
            return self.host.causal_mask(hidden, sequence.valid.long(), visible)  # type: ignore[no-any-return]
        # always given: gaps in the positions must not be taken for packed sequences
        return sequence.valid.long()

    def _visible_to_guide(self, sequence: TokenSequence) -> Callable[..., Tensor] | None:
        if self._answer is None or not self.seen[-1].guide:
            return None
        hidden = self._answer_in(sequence)
        last = sequence.length - 1

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query != last) | ~hidden[batch, key]

        return visible

    def _answer_in(self, sequence: TokenSequence) -> Tensor:
        assert self._answer is not None
        return self._answer.gather(1, sequence.source.clamp_min(0)) & (sequence.source >= 0) & ~sequence.visual

    def cut_llm(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) between attention and MLP; later layers get `layer_inputs`."""
        part = self.seen[-1]
        sequence = part.sequence
        window = self._window(cut, hidden, sequence.patch, reference=-1)
        scores = self._score(window)
        removed = self._tokens_before(cut) - cut.keep
        budget = torch.tensor([n * cut.keep for n in self.images], device=hidden.device)
        gone = sequence.visual & ~keep_highest(scores, sequence.visual, budget)
        drops_guide = part.guide and cut.layer == self.method.plan.guide_layers - 1
        if drops_guide:
            gone, sequence = gone[:, :-1], sequence.without_guide()
        after, index = sequence.drop(gone, [n * removed for n in self.images])
        self.cuts.append(CutResult(cut, part.sequence.patch, scores, after.patch))
        self.seen[-1] = Seen(part.first_layer, part.sequence, part.guide, index)
        self.seen.append(Seen(cut.layer + 1, after, part.guide and not drops_guide))
        self._layer_inputs = None
        return take(hidden, index)

    def layer_inputs(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a decoder layer: mask and rotary embeddings cut as the tokens are."""
        part = self.seen[-1]
        # rotary embeddings are made; FlashAttention would take gaps in position ids for packed sequences
        kwargs = {**kwargs, "position_ids": None}
        if len(self.seen) == 1:
            return kwargs
        if self._layer_inputs is None:
            index = self.seen[0].index
            assert index is not None
            for earlier in self.seen[1:-1]:
                assert earlier.index is not None
                index = index.gather(1, earlier.index)
            valid = part.sequence.valid.long() if part.sequence.padded else None
            self._layer_inputs = {
                "attention_mask": self._mask(hidden, part.sequence, valid),
                "position_embeddings": tuple(take(t, index) for t in kwargs["position_embeddings"]),
            }
        return {**kwargs, **self._layer_inputs}

    def _mask(self, hidden: Tensor, sequence: TokenSequence, valid: Tensor | None) -> Any:
        visible = self._visible_to_guide(sequence)
        if visible is not None:
            valid = sequence.valid.long()
        return self.host.causal_mask(hidden, valid, visible)

    def _tokens_before(self, cut: Cut) -> int:
        plan = self.method.plan.cuts
        place = plan.index(cut)
        return plan[place - 1].keep if place else self.host.size.num_patches

    # ---- taps -------------------------------------------------------------------------------------------------

    def see(self, where: str, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed, until the cut that reads it."""
        if where != self.stage:
            return
        valid, blind, causal = None, None, where == "llm"
        if causal:
            sequence = self.seen[-1].sequence
            valid = sequence.valid if sequence.padded else None
            if self._answer is not None and self.seen[-1].guide:
                blind = self._answer_in(sequence)
        self._taps[layer] = AttentionTap(query.detach(), key.detach(), value.detach(), scale, causal, valid, blind)

    def _window(self, cut: Cut, hidden: Tensor, patch: Tensor, reference: int) -> Window:
        taps = tuple(self._taps.pop(layer) for layer in cut.taps)
        return Window(cut, taps, hidden, patch, reference)

    @torch.no_grad()
    def _score(self, window: Window) -> Tensor:
        """The choice of tokens is not differentiated; gradients flow through the tokens that stay."""
        return self.method.score(window)

    # ---- the end ----------------------------------------------------------------------------------------------

    def finish(self, cache: Cache | None) -> None:
        """Shorten the cache that the decoder filled, if there is one."""
        self.stage = ""
        if cache is not None:
            prune_cache(
                cache,
                self.seen,
                prompt_length=self.prompt_length,
                shift=self._shift,
                evict=self.config.cache == "evict",
            )
        self._layer_inputs = None
        self._taps.clear()
        self.seconds = time.perf_counter() - self.began

    def shorten_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, T) of the prompt for the columns (B, T') that the logits have; visual tokens have none."""
        sequence = self.seen[-1].sequence
        shortened = labels.to(sequence.source.device).gather(1, sequence.source.clamp_min(0))
        return shortened.masked_fill(sequence.visual | ~sequence.valid | (sequence.source < 0), -100)


def _checked_inputs(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise InputError("pruning reads the prompt's input_ids; pass them instead of inputs_embeds")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != ids.shape):
        raise InputError(
            "pruning needs the two-dimensional attention_mask (batch, tokens) that the processor makes; pass that one"
        )
    return ids, inputs["pixel_values"]


def _check_cache(cache: Any) -> None:
    if cache is None:
        return
    if not isinstance(cache, Cache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise InputError(
            f"a {type(cache).__name__} with fixed or transformed layers cannot shrink; "
            'use the default dynamic cache (no cache_implementation="static")'
        )
    if cache.get_seq_length() > 0:
        raise InputError(
            "an image can only be pruned in the first prompt of a cache; start a new cache with the whole conversation"
        )


def _first_true(mask: Tensor) -> list[int]:
    """The first True column of each row of (B, T), T where there is none."""
    return [row.index(True) if True in row else len(row) for row in mask.tolist()]


def _describe_prompt(
    ids: Tensor, mask: Tensor | None, position: Tensor | None
) -> tuple[TokenSequence, list[list[bool]]]:
    """The prompt as the user gave it, and which of its columns are no padding, on the host."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().to(ids.device)
    rows: list[list[bool]] = valid.tolist()
    slack = tuple(row.index(True) if True in row else len(row) for row in rows)
    holes = any(not all(row[first:]) for row, first in zip(rows, slack, strict=True))
    position = columns if position is None else position.expand_as(ids)
    return TokenSequence(torch.full_like(ids, -1), valid, position, columns, slack, holes), rows


def _answer_columns(labels: Tensor | None, ids: Tensor, text: Tensor) -> Tensor | None:
    """(B, T) bool: the first answer and all behind it, which must not lead the pruning, as at inference.

    None without labels. A row whose whole text is labelled tells no question from an answer; nothing is hidden there.
    """
    if labels is None or labels.shape != ids.shape:
        return None
    labelled = (labels.to(ids.device) != -100) & text
    everything = (labelled == text).all(dim=1, keepdim=True)
    return (labelled.cumsum(dim=1) > 0) & ~everything
