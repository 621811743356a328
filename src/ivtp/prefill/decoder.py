"""Stage 2 of a prefill: cuts inside the decoder, of hidden states, masks, rotary embeddings and the guide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.core.rollout import past_mass
from ivtp.core.select import keep_highest, on_device, take
from ivtp.core.sequence import TokenSequence, image_offsets, join_images
from ivtp.core.tap import AttentionTap
from ivtp.methods.base import Cut, Method, Window
from ivtp.prefill.cache import Seen
from ivtp.prefill.past import Past
from ivtp.prefill.stage import Plug, Seats, Stage
from ivtp.prompt.batch import PromptBatch
from ivtp.stock import CACHE_NAMES
from ivtp.towers.base import TextTower


class Peeked(Exception):  # noqa: N818  # no error: it ends a look ahead
    """Raised once the queries and keys of a layer that is only looked at are there."""


class DecoderStage(Stage):
    """Stage 2: the visual tokens of a prompt beside its text, which stays; the guide leaves with the last cut."""

    where = "llm"
    tower: TextTower

    def __init__(
        self,
        plug: Plug,
        method: Method,
        prompts: PromptBatch,
        sequence: TokenSequence,
        sources: list[Tensor],
        embeddings: Tensor,
        past: Past | None = None,
        deep: Tensor | None = None,
    ) -> None:
        """`sources` are `Encoded.sources` (n,) for every image of the rows; `embeddings` (B, T, D) enter.

        They enter behind `past`, where something is cached. `deep` is `Encoded.deep` (K, L, D) of all visual tokens.
        """
        super().__init__(plug, method)
        self.tower = plug.host.text
        self.prompts = prompts
        self.seen = [Seen(0, sequence, guide=method.plan.guide_layers > 0)]
        self._past = past
        self._deep = deep
        self._added = 0
        """Layers whose part of `deep` is in the hidden states."""
        self._inputs: dict[tuple[int, int], dict[str, Any]] = {}
        """By the part of the past that a layer sees and its `TextTower.rotary`, until the next cut."""
        self._peeking = False
        self._text: Tensor | None = None
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        """By `TextTower.rotary`."""
        if method.reads_text:
            question, tail = prompts.question_in(sequence), prompts.tail + (method.plan.guide_layers > 0)
            with torch.no_grad():
                self._text = method.read_text(embeddings, sequence.visual, question, tail)
        if method.info.merges:
            offsets = image_offsets(prompts.slots.patches)
            counted_on = [torch.where(s >= 0, s + offset, -1) for s, offset in zip(sources, offsets, strict=True)]
            self._sources = join_images(counted_on, prompts.images, -1)

    def install(self, seats: Seats) -> None:
        """Cuts and probes, and masks and rotary embeddings of its own for every layer."""
        super().install(seats)
        for number, layer in enumerate(self.tower.layers):
            hook = functools.partial(self._before_layer, number)
            seats.add(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_mine():
            return None
        hidden = self.behind(number - 1, args[0])
        return (hidden, *args[1:]), self.layer_inputs(number, hidden, kwargs)

    @property
    def sequence(self) -> TokenSequence:
        """What the layer that runs now sees."""
        return self.seen[-1].sequence

    def entry_mask(self) -> Tensor:
        """The mask of padding that the decoder is handed: (B, past + T)."""
        # also given without padding: gaps in the positions must not be taken for packed sequences
        return self._behind_past(0)

    def behind(self, layer: int, hidden: Tensor) -> Tensor:
        """What the next layer reads of a layer's output: visual tokens with their deepstack features, added once.

        A token that stands for several has those of the patch at whose place it is; the guide has none.
        """
        if self._deep is None or not self._added <= layer < self._deep.shape[1]:
            return hidden
        self._added = layer + 1
        visual = self.seen[0].sequence.visual
        number = torch.where(visual, visual.flatten().cumsum(0).view_as(visual) - 1, -1)  # (B, T), as they entered
        if len(self.seen) > 1:
            number = number.gather(1, self._index())
        own = self._deep[:, layer].to(hidden)[number.clamp_min(0)]
        return hidden + own.masked_fill((number < 0).unsqueeze(-1), 0)

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) within or behind a layer; later layers get `layer_inputs`."""
        part, sequence = self.seen[-1], self.sequence
        window = self._window(cut, hidden)
        columns = torch.arange(sequence.length, device=hidden.device)
        merged = self._merge(window)
        scores: Tensor | None = None
        if merged is None:
            scores = self._score(window)
            gone = sequence.visual & ~self._highest(window, scores)
            if self.method.info.merges:
                self._follow(window, columns.masked_fill(gone, -1))
        else:
            hidden = merged.hidden
            gone = sequence.visual & (merged.into != columns)
        drops_guide = part.guide and cut.layer == self.method.plan.guide_layers - 1
        if drops_guide:
            gone, sequence = gone[:, :-1], sequence.without_guide()
        removed = [sum(before) - sum(left) for before, left in zip(window.entered, window.keeps, strict=True)]
        after, index = sequence.drop(gone, removed)
        self.results.append(self._result(window, scores, after.patch, merged))
        self.seen[-1] = Seen(part.first_layer, part.sequence, part.guide, index)
        self.seen.append(Seen(cut.layer + 1, after, part.guide and not drops_guide))
        self._inputs = {}
        return take(hidden, index)

    @torch.no_grad()
    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """See what the layer behind a cut would compute of all tokens (B, T, D); nothing is written to the cache."""
        names = [name for name in CACHE_NAMES if name in arguments]
        arguments = {k: v for k, v in arguments.items() if k not in (*names, "use_cache")}
        layer = cut.taps[-1]
        if self._past is not None:
            arguments |= dict.fromkeys(names, self._past.copied())
            arguments["attention_mask"] = self._mask(layer, hidden)
        if self.tower.rotary(layer) != self.tower.rotary(cut.layer):
            arguments |= self.tower.positions(layer, hidden, self.sequence.position_ids)
        self._peeking = True
        try:
            self.tower.attend(layer, hidden, **arguments)
        except Peeked:
            pass
        finally:
            self._peeking = False

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed; ends a look ahead."""
        super().see(layer, query, key, value, scale)
        if self._peeking:
            raise Peeked

    def layer_inputs(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of decoder layer `number`: mask and rotary embeddings cut as the tokens are."""
        # rotary embeddings are made; FlashAttention would take gaps in position ids for packed sequences
        kwargs = {**kwargs, "position_ids": None}
        rotary = self.tower.rotary(number)
        if self.method.reads_states and rotary not in self._turns:
            self._turns[rotary] = self._first_turn(*kwargs["position_embeddings"])
        own = self._part(number), rotary
        if own not in self._inputs:  # once for all layers that see the same, up to the next cut
            self._inputs[own] = self._own_inputs(number, hidden, kwargs)
        return {**kwargs, **self._inputs[own]}

    def _own_inputs(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those keyword arguments of decoder layer `number` that are not as the decoder makes them."""
        if len(self.seen) == 1 and self._is_stock(number):
            return {}
        mask = {"attention_mask": self._mask(number, hidden)}
        return mask if len(self.seen) == 1 else {**mask, **self.tower.cut_positions(kwargs, self._index())}

    def _is_stock(self, number: int) -> bool:
        """Whether the decoder's mask, made for its first layer, is that of an uncut layer `number`."""
        plain = self._visible() is None and self.prompts.blocks_in(self.sequence) is None
        return plain and self._part(number) == self._part(0)

    def release(self) -> None:
        """Let go of the masks and rotary embeddings."""
        super().release()
        self._inputs, self._turns, self._past, self._deep = {}, {}, None, None

    def _window(self, cut: Cut, hidden: Tensor) -> Window:
        sequence, text = self.sequence, self._text
        place = next(i for i, other in enumerate(self.method.plan.cuts) if other is cut)
        if text is not None and len(self.seen) > 1:
            text = text.gather(1, self._index())
        taps = self._take_taps(cut)
        normed = keys = None
        if self.method.reads_states:
            normed, keys = self._states(hidden, taps[-1].key, self._turns[self.tower.rotary(cut.taps[-1])])
        return Window(
            cut,
            taps,
            hidden,
            sequence.patch,
            self._reference(),
            normed=normed,
            keys=keys,
            images=self.prompts.images,
            entered=self._counts(place - 1),
            keeps=self._counts(place),
            segment=self._segment(),
            sources=self._sources,
            text=text,
            tail=self.prompts.tail,
        )

    def _counts(self, place: int) -> tuple[tuple[int, ...], ...]:
        """Tokens of each image of each row behind the cut at a place of the plan; -1: all patches."""
        if place < 0:
            return self.prompts.slots.patches
        return tuple(
            tuple(self.method.sized(patches).plan.cuts[place].keep for patches in row)
            for row in self.prompts.slots.patches
        )

    @torch.no_grad()
    def _states(self, hidden: Tensor, key: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`Window.normed` and `Window.keys` of the layer that was tapped last, and turns its first token by `turn`."""
        return self.tower.final_norm(hidden), self.tower.turn_back(key, turn)

    def _first_turn(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rotary embeddings (B, T, d) of uncut columns those of each row's first token (B, 1, d).

        Behind a cache the first token is in it, at position 0.
        """
        empty = [min(slack, cos.shape[1] - 1) for slack in self.seen[0].sequence.slack]
        first = on_device(empty, cos.device).unsqueeze(1)
        cos, sin = take(cos, first), take(sin, first)
        return (cos, sin) if self._past is None else (torch.hypot(cos, sin), torch.zeros_like(sin))

    def _segment(self) -> Tensor | None:
        """`Window.segment`."""
        if self.method.config.budget == "prompt" or max(self.prompts.images) <= 1:
            return None
        rows = self.prompts.slots.patches
        numbers = [torch.full((n,), m) for row in rows for m, n in enumerate(row)]
        patch = self.sequence.patch
        of_patch = on_device(join_images(numbers, self.prompts.images, -1), patch.device)
        return torch.where(patch >= 0, of_patch.gather(1, patch.clamp_min(0)), -1)

    def _highest(self, window: Window, scores: Tensor) -> Tensor:
        """(B, T) bool: the visual tokens that stay by their `scores` (B, T), each image's or each row's.

        Those that the prompt's mask hides leave first.
        """
        if self.sequence.holes:
            scores = scores.masked_fill(~self.sequence.valid, torch.finfo(scores.dtype).min)
        if window.segment is None:
            return keep_highest(scores, window.visual, on_device(list(map(sum, window.keeps)), scores.device))
        distinct = {keep for row in window.keeps for keep in row}
        if len(distinct) == 1:
            return keep_highest(scores, window.visual, distinct.pop(), window.segment)
        chosen = torch.zeros_like(window.visual)
        for tokens, _, keeps in window.budgets:
            chosen |= keep_highest(scores, tokens, on_device(list(keeps), scores.device))
        return chosen

    def _reference(self) -> int | Tensor:
        """The guide or else the last token of the prompt, which an answer or padding may follow."""
        sequence = self.sequence
        answer = self.prompts.answer_in(sequence)
        if self.seen[-1].guide or (answer is None and not sequence.holes):
            return -1
        prompt = sequence.valid if answer is None else sequence.valid & ~answer
        columns = torch.arange(sequence.length, device=prompt.device)
        return torch.where(prompt, columns, 0).amax(dim=1)

    def _tap(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        sequence, mass = self.sequence, None
        if self._past is not None:
            kept = self._past.keys[layer]
            mass = past_mass(query, key[:, :, :kept], scale, self._past.valid(layer), self.tower.softcap)
            key, value = key[:, :, kept:], value[:, :, kept:]
        return AttentionTap(
            query,
            key,
            value,
            scale,
            causal=True,
            valid=sequence.valid if sequence.padded else None,
            hidden_from_last=self.prompts.answer_in(sequence) if self.seen[-1].guide else None,
            blocks=self.prompts.blocks_in(sequence),
            softcap=self.tower.softcap,
            past=mass,
        )

    def _index(self) -> Tensor:
        """Columns (B, T') of the first layer's sequence that are left."""
        index: Tensor | None = None
        for part in self.seen[:-1]:
            assert part.index is not None
            index = part.index if index is None else index.gather(1, part.index)
        assert index is not None
        return index

    def _part(self, number: int) -> int:
        """The same for layers that have the same tokens cached."""
        return 0 if self._past is None else self._past.part(number)

    def _mask(self, number: int, hidden: Tensor) -> Any:
        """The mask of decoder layer `number`, for its input (B, T, D)."""
        visible, blocks = self._visible(), self.prompts.blocks_in(self.sequence)
        needed = self.sequence.padded or any(own is not None for own in (self._past, visible, blocks))
        valid = self._behind_past(number) if needed else None
        before = None if self._past is None else self._past.before(number)
        if self._past is not None and blocks is not None:
            blocks = nn.functional.pad(blocks, (self._past.length, 0), value=-1)
        return self.tower.causal_mask(hidden, valid, visible, before, blocks)

    def _behind_past(self, number: int) -> Tensor:
        """(B, past + T) long: what is no padding, behind what decoder layer `number` has cached."""
        valid = self.sequence.valid.long()
        if self._past is None:
            return valid
        mask = self._past.mask(number)
        before = valid.new_ones(len(valid), self._past.length) if mask is None else mask.to(valid)
        return torch.cat([before, valid], dim=1)

    def _visible(self) -> Callable[..., Tensor] | None:
        """Hides the answer from the guide, the last column; None where there is nothing to hide."""
        answer = self.prompts.answer_in(self.sequence) if self.seen[-1].guide else None
        if answer is None:
            return None
        before = 0 if self._past is None else self._past.length
        hidden, last = answer, before + self.sequence.length - 1

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if not before:
                return (query != last) | ~hidden[batch, key]
            return (query != last) | (key < before) | ~hidden[batch, (key - before).clamp_min(0)]

        return visible
