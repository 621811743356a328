"""The shortened cache behind a prefill, and what makes `generate`'s beliefs about the prompt fit it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ivtp.core.select import take
from ivtp.core.sequence import TokenSequence
from ivtp.errors import InputError
from ivtp.hosts.base import Host
from ivtp.stock import contents, fill, is_filled, is_offloading, keep_whole

if TYPE_CHECKING:
    from ivtp.prefill.past import Past
    from ivtp.prefill.turns import Conversation


def is_prefill(inputs: dict[str, Any]) -> bool:
    """Whether these are the first tokens of a prompt: nothing is cached yet."""
    cache = inputs.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def conversation_in(cache: Cache) -> Conversation | None:
    """What a cache remembers of its prompts; None where nothing of it was pruned, or its rows have changed."""
    first = cache.layers[0]
    return first.conversation if isinstance(first, PrunedLayer) else None


def check_cache(cache: Any) -> None:
    """Let empty layers keep whatever they are given. Raises `InputError` for a cache that cannot be shortened."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer)
    fixed = not isinstance(cache, Cache) or any(type(layer) not in kinds for layer in cache.layers)
    if fixed or is_offloading(cache):
        kind = "offloaded" if is_offloading(cache) else type(cache).__name__
        raise InputError(
            f"a cache of this kind ({kind}) cannot be shortened after pruning; leave cache_implementation out, or pass "
            "a DynamicCache that is not offloaded"
        )
    keep_whole(cache)


def continue_inputs(host: Host, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Any]]:
    """Inputs of a step on a pruned cache, and masks of their own for the decoder layers that need one.

    Without padding, with evicted layers and original positions both come back as nothing to do: the cache layers
    themselves report the right lengths and offsets.
    """
    cache = inputs.get("past_key_values")
    layers = getattr(cache, "layers", [])
    if not layers or not isinstance(layers[0], PrunedLayer):
        return inputs, {}
    first: PrunedLayer = layers[0]
    for layer in layers:
        layer.expected = True
    tokens: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    check_rows(first, len(tokens))
    window, total = host.text.window, first.get_seq_length() + tokens.shape[1]
    if window is not None and total > window:
        raise InputError(
            f"prompt and answer have {total} tokens, and layers of {host.name} see {window} at once; "
            "a pruned prompt goes on within this window: ask for fewer new tokens"
        )
    changed = dict(inputs)
    given = inputs.get("attention_mask")
    position = host.positions(inputs, tokens, given, first.get_seq_length())
    if first.shift is not None:
        position = counted(position, tokens, first.get_seq_length()) - first.shift
    changed["position_ids"] = position
    if first.prompt_valid is not None:
        changed["attention_mask"] = logical_mask(given, first, total)
    return changed, _masks_of_layers(host, layers, given, tokens)


def counted(position: Tensor | None, tokens: Tensor, past: int) -> Tensor:
    """Position ids of `tokens` (B, T) behind `past` others: the given ones, or one more a column (1, T)."""
    if position is not None:
        return position
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


def check_rows(layer: Any, rows: int) -> None:
    """Raise `InputError` for a cache layer of other than so many rows."""
    held = len(contents(layer)[0])
    if held != rows:
        raise InputError(
            f"the cache holds {held} prompts and the call has {rows} rows; for n beams or returned sequences a prompt "
            "call cache.batch_repeat_interleave(n) first"
        )


def logical_mask(given: Tensor | None, layer: PrunedLayer, total: int) -> Tensor:
    """(B, total): the padding of the kept prompt tokens, right-aligned where the prompt ends, and what is `given`."""
    assert layer.prompt_valid is not None
    valid = layer.prompt_valid
    if given is None:
        given = valid.new_ones((valid.shape[0], total))
    head = valid.new_zeros((valid.shape[0], layer.prompt_length - valid.shape[1]))
    return torch.cat([head, valid, given[:, layer.prompt_length :].bool()], dim=1).long()


def _masks_of_layers(host: Host, layers: list[Any], given: Tensor | None, tokens: Tensor) -> dict[int, Any]:
    """Masks for layers whose cache is shorter than the first layer's (`cache="layered"`)."""
    if len({layer.part for layer in layers}) == 1:
        return {}
    masks: dict[int, Any] = {}
    made: dict[int, Any] = {}
    keys, _ = contents(layers[0])
    hidden = torch.empty(*tokens.shape[:2], 0, dtype=keys.dtype, device=tokens.device)
    for number, layer in enumerate(layers):
        if layer.part not in made:
            total = layer.get_seq_length() + tokens.shape[1]
            valid = logical_mask(given, layer, total) if layer.prompt_valid is not None else given
            alone = DynamicCache()
            alone.layers = [layer]
            made[layer.part] = host.text.causal_mask(hidden, valid, cache=alone)
        masks[number] = made[layer.part]
    # most kernels need none for one new token without padding, which sees every key
    return masks if any(mask is not None for mask in made.values()) else {}


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache layer that holds fewer tokens than the prompt had and still reports the prompt's length.

    `generate` and multi-turn code slice new input by `get_seq_length()`, so that stays the logical length, while
    masks are made for the tokens that are there. `removed` is their difference, `prompt_valid` (B, kept) marks
    padding among the kept prompt tokens (None: no padding), `prompt_length` is the unpruned length of what the prefill
    read, `fixed_length` that of its prompt without drafted tokens,
    `shift` (B, 1) what compact positions lie behind, and `part` is the same for layers that hold the same tokens.
    `conversation` is what the next turn may need to know; None where the rows are not its prompts any more.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        prompt_length: int,
        fixed_length: int,
        prompt_valid: Tensor | None,
        shift: Tensor | None,
        part: int,
        conversation: Conversation | None = None,
    ) -> None:
        super().__init__()
        fill(self, keys, values)
        self.prompt_length = prompt_length
        self.fixed_length = fixed_length
        self.removed = prompt_length - keys.shape[-2]
        self.prompt_valid = prompt_valid
        self.shift = shift
        self.part = part
        self.conversation = conversation
        self.expected = False
        """Whether the attached pruner has prepared the step that comes next."""

    def get_seq_length(self) -> int:
        """The logical length: the whole prompt and everything after it."""
        return int(super().get_seq_length()) + self.removed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that are there, and the offset that makes column j of them the logical token j + removed.

        Raises `InputError` where only an attached pruner could make the right mask and none is at work.
        """
        if (self.prompt_valid is not None or self.shift is not None) and not self.expected:
            raise InputError(
                "this cache holds a pruned prompt; go on with it while the pruner is attached, or start a new cache"
            )
        return int(super().get_seq_length()) + query_length, self.removed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a step's keys and values."""
        self.expected = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def crop(self, max_length: int) -> None:
        """Remove -`max_length` tokens from the end, or (older transformers) all behind that logical length.

        Raises `InputError` where that reaches into the prompt: which of its tokens are there is not known by number.
        """
        surplus = -max_length if max_length <= 0 else self.get_seq_length() - max_length
        if surplus <= 0:
            return
        left = self.get_seq_length() - surplus
        if left < self.fixed_length:
            raise InputError("a pruned prompt cannot be cropped; start a new cache with the shorter prompt")
        keys, values = contents(self)
        fill(self, keys[..., :-surplus, :], values[..., :-surplus, :])
        drafted = self.prompt_length - left  # tokens of the prefill that were no prompt
        if drafted > 0:
            self.prompt_length = left
            self.prompt_valid = None if self.prompt_valid is None else self.prompt_valid[:, :-drafted]

    def reset(self) -> None:
        """Empty the layer; what was pruned is forgotten with it."""
        super().reset()
        self.removed, self.prompt_length, self.fixed_length = 0, 0, 0
        self.prompt_valid = self.shift = self.conversation = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the batch for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.conversation = None
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.conversation = None
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.prompt_valid = None if self.prompt_valid is None else change(self.prompt_valid)
        self.shift = None if self.shift is None else change(self.shift)


@dataclass(frozen=True)
class Seen:
    """What the decoder layers from `first_layer` on saw, until the next cut.

    `guide` says that the last column is the pseudo CLS token; `index` (B, T') gathers this sequence into the next one
    (None for the last). The guide is in no `index` that leads out of the layers that carry it.
    """

    first_layer: int
    sequence: TokenSequence
    guide: bool
    index: Tensor | None = None


def prune_cache(
    cache: Cache,
    seen: Many[Seen],
    *,
    prompt_length: int,
    fixed_length: int,
    shift: Tensor | None,
    evict: bool,
    conversation: Conversation,
    past: Past | None = None,
) -> None:
    """Shorten every layer of `cache` in place, to the final tokens (`evict`) or to what that layer saw.

    What was cached before, the `past`, stays; the guide token never does. The lengths, `shift` and `conversation` are
    what `PrunedLayer` needs to know.
    """
    parts: dict[tuple[int, int], int] = {}
    for number, layer in enumerate(cache.layers):
        if not is_filled(layer):
            continue
        place = max(i for i, part in enumerate(seen) if part.first_layer <= number)
        sequence, index = _final_tokens(seen[place:]) if evict else _own_tokens(seen[place])
        keys, values = contents(layer)
        valid = sequence.valid if sequence.padded else None
        kept = 0 if past is None else past.keys[number]
        if index is not None:
            index = index.to(keys.device) + kept
            if kept:
                index = torch.cat([torch.arange(kept, device=index.device).expand(len(index), -1), index], dim=1)
            keys, values = take(keys, index, dim=2), take(values, index, dim=2)
        if past is not None:
            valid = _joined(past.valid(number), valid, kept, sequence)
        own = (0 if evict else place, 0 if past is None else past.part(number))
        part = parts.setdefault(own, len(parts))
        cache.layers[number] = PrunedLayer(keys, values, prompt_length, fixed_length, valid, shift, part, conversation)


def _joined(before: Tensor | None, own: Tensor | None, kept: int, sequence: TokenSequence) -> Tensor | None:
    """(B, kept + T) bool: what is no padding of the `kept` tokens before a prompt and of its own; None: all."""
    if before is None and own is None:
        return None
    if before is None:
        before = sequence.valid.new_ones(len(sequence.valid), kept)
    return torch.cat([before.to(sequence.valid.device), sequence.valid if own is None else own], dim=1)


def _final_tokens(parts: Many[Seen]) -> tuple[TokenSequence, Tensor | None]:
    index: Tensor | None = None
    for part in reversed(parts[:-1]):
        assert part.index is not None
        index = part.index if index is None else part.index.gather(1, index)
    return parts[-1].sequence, index


def _own_tokens(part: Seen) -> tuple[TokenSequence, Tensor | None]:
    if not part.guide:
        return part.sequence, None
    sequence = part.sequence.without_guide()
    return sequence, torch.arange(sequence.length, device=sequence.patch.device).expand_as(sequence.patch)
