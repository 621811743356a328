"""A batch of prompts as the user gave it: text, image slots, padding, and what is an answer to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivtp.core.select import on_device
from ivtp.core.sequence import Placeholders, TokenSequence
from ivtp.core.untraced import untraced
from ivtp.errors import InputError
from ivtp.hosts.base import Host, Visual
from ivtp.prompt.instruction import Instruction


@dataclass(frozen=True)
class TextTokens:
    """The text of one prompt, without image slots, padding and answer: ids and their columns."""

    ids: list[int]
    columns: list[int]
    last_image_column: int

    @property
    def behind_image(self) -> list[int]:
        """The columns of the text behind the last image."""
        return [column for column in self.columns if column > self.last_image_column]


@dataclass(frozen=True)
class PromptBatch:
    """What one prefill is asked to read: B rows of T columns, N slots for each image.

    It is made on the host, from one copy of the ids before anything runs, and then sent to the device: nothing waits
    for the device afterwards.
    """

    ids: Tensor  # (B, T)
    tokens: TokenSequence
    slots: Placeholders
    repeats: int
    """Rows in a row that are copies of one prompt (beams); their images are given, and encoded, once."""
    visuals: tuple[Visual, ...]
    """The I images that are given."""
    image_of_slot: list[int]
    """For every image of the rows, row by row, which of the I given images it is."""
    fixed_length: int
    """Columns of the prompt without what was generated or drafted behind it."""
    answer: Tensor | None
    """(B, T) bool: the answer and all behind it (labelled, generated or drafted), which must not lead the pruning."""
    blocks: Tensor | None = None
    """(B, T) the block of each column, -1: of none. Those of a block see each other in the decoder, whatever their
    order; None: none sees a later one."""
    framing: Tensor | None = None
    """(B, T) bool, on the host: columns that the processor wrote around image slots; None: it is not known."""
    instructions: tuple[Instruction, ...] = ()
    """What each row asks; empty where nothing reads it."""
    question: Tensor | None = None
    """(B, T) bool: the tokens of the instructions, or else the text behind the last image."""

    @property
    def images(self) -> tuple[int, ...]:
        """Images in each row."""
        return self.slots.images

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> PromptBatch:
        """The same, from the host to `device`."""
        return replace(
            self,
            ids=on_device(self.ids, device),
            tokens=self.tokens.to(device),
            slots=self.slots.to(device),
            answer=None if self.answer is None else on_device(self.answer, device),
            blocks=None if self.blocks is None else on_device(self.blocks, device),
            question=None if self.question is None else on_device(self.question, device),
        )

    @property
    def tail(self) -> int:
        """At most so many columns at the end hold the questions."""
        columns = [i.columns[0] for i in self.instructions if i.columns]
        return max([self.slots.tail, *(self.length - column for column in columns)])

    @untraced
    def with_instructions(self, read: Callable[[TextTokens], Instruction]) -> PromptBatch:
        """The same, on the host, with what every row that has an image asks; each prompt is read once."""
        found: list[Instruction] = []
        question = torch.zeros(self.ids.shape, dtype=torch.bool)
        for row, text in enumerate(self.texts()):
            if row % self.repeats:
                found.append(found[-1])
            else:
                found.append(read(text) if self.images[row] else Instruction("", [], []))
            question[row, found[-1].columns or text.behind_image] = True
        return replace(self, instructions=tuple(found), question=question)

    def texts(self) -> list[TextTokens]:
        """The text of every row; of a batch on the host."""
        ids, slots = self.ids.tolist(), self.slots.mask.tolist()
        read = self.tokens.valid & ~self.slots.mask
        if self.framing is not None:
            read &= ~self.framing
        typed = read.tolist()
        answer = None if self.answer is None else self.answer.tolist()
        texts = []
        for row in range(len(ids)):
            stop = answer[row].index(True) if answer and True in answer[row] else self.length
            columns = [c for c in range(stop) if typed[row][c]]
            last = max((c for c in range(self.length) if slots[row][c]), default=-1)
            texts.append(TextTokens([ids[row][c] for c in columns], columns, last))
        return texts

    def answer_in(self, sequence: TokenSequence) -> Tensor | None:
        """(B, T') bool: the text columns of `sequence` that belong to the answer; None without one."""
        if self.answer is None:
            return None
        return self.answer.gather(1, sequence.source.clamp_min(0)) & (sequence.source >= 0) & ~sequence.visual

    def blocks_in(self, sequence: TokenSequence) -> Tensor | None:
        """(B, T') the block of each column of `sequence`, -1: of none; None: there are no blocks."""
        if self.blocks is None:
            return None
        return torch.where(sequence.source >= 0, self.blocks.gather(1, sequence.source.clamp_min(0)), -1)

    def question_in(self, sequence: TokenSequence) -> Tensor:
        """(B, T') bool: the columns of `sequence` that hold the questions."""
        assert self.question is not None
        return self.question.gather(1, sequence.source.clamp_min(0)) & (sequence.source >= 0) & ~sequence.visual


@untraced
def read_prompts(
    inputs: dict[str, Any],
    host: Host,
    *,
    labels: Tensor | None,
    prompt_length: int | None,
    repeats: int,
    images: Sequence[Visual] | None = None,
) -> PromptBatch:
    """Check the model's inputs and find the image slots, on the host. Raises `InputError`; nothing has run by then.

    `labels` (B, T) or `prompt_length` say where the prompt ends and an answer begins; None: nowhere. `images` are those
    of the prompts in their order; None: those that the call hands over.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise InputError("pruning reads the prompt's input_ids; pass them instead of inputs_embeds")
    check_window(host, ids.shape[1])
    pixels = inputs.get("pixel_values")
    finite = True if pixels is None else pixels.isfinite().all()
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise InputError(
            "pruning needs the two-dimensional attention_mask (batch, tokens) that the processor makes; pass that one"
        )
    visuals = host.visuals(inputs) if images is None else list(images)
    ids, mask, labels = (None if t is None else t.cpu() for t in (ids, mask, labels))
    assert ids is not None
    if not finite:  # known by now: the ids were waited for
        raise InputError("pixel_values hold NaN or infinite numbers; check the image and what prepares it")
    slots, image_of_slot = _find_slots(ids, host, visuals, repeats)
    tokens = _describe(ids, mask, host.positions(inputs, ids, mask), slots.mask)
    if prompt_length is not None and ids.shape[1] > prompt_length:
        answer: Tensor | None = tokens.source >= prompt_length
    else:
        answer = _labelled(labels, ids, tokens.valid & ~slots.mask)
    fixed = min(ids.shape[1], prompt_length or ids.shape[1])
    blocks = host.blocks(inputs)
    if blocks is not None:
        blocks = torch.where(tokens.source < fixed, blocks.cpu(), -1)  # a drafted token is of none
    framing = host.framing(ids)
    framing = None if framing is None else framing & ~slots.mask
    return PromptBatch(ids, tokens, slots, repeats, tuple(visuals), image_of_slot, fixed, answer, blocks, framing)


def check_window(host: Host, tokens: int) -> None:
    """Raise `InputError` for a prompt of so many tokens, with the cached ones, that some layers do not see whole."""
    if host.text.window is not None and tokens + 2 > host.text.window:  # the guide is one
        raise InputError(
            f"the prompt has {tokens} tokens, and layers of {host.name} see {host.text.window} at once; "
            "prompts within this window can be pruned: use smaller images or fewer"
        )


def _find_slots(ids: Tensor, host: Host, visuals: list[Visual], repeats: int) -> tuple[Placeholders, list[int]]:
    """Where the images of every row go, and which of the given ones they are."""
    mask = ids == host.image_token
    columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    counts, ends = torch.stack([mask.sum(dim=1), torch.where(mask, columns, 0).amax(dim=1)]).tolist()
    rows = share_out(counts[::repeats], visuals)
    if rows is None or any(counts[row] != counts[row - row % repeats] for row in range(len(counts))):
        raise misfit(counts, visuals)
    own = [row for row in rows for _ in range(repeats)]
    given = [m for row in own for m in row]
    held = torch.cat([visuals[m].token for m in given]) if given else torch.zeros(0, dtype=torch.long)
    number = [place for place, m in enumerate(given) for _ in range(len(visuals[m].token))]
    patch = torch.full_like(ids, -1).masked_scatter(mask, held)
    image = torch.zeros_like(ids).masked_scatter(mask, torch.tensor(number, dtype=torch.long))
    patches = tuple(tuple(visuals[m].patches for m in row) for row in own)
    return Placeholders(mask, patch, image, patches, tail=ids.shape[1] - min(ends)), given


def misfit(counts: Sequence[int], visuals: Sequence[Visual]) -> InputError:
    """The error of rows with so many image slots, which `visuals` do not fill."""
    each = sorted({len(v.token) for v in visuals})
    return InputError(
        f"the prompt has {sum(counts)} image slots for {len(visuals)} image(s) of {' or '.join(map(str, each))} "
        "slots each; build it with the model's processor, one <image> for each picture"
    )


def share_out(counts: Sequence[int], visuals: Sequence[Visual]) -> list[list[int]] | None:
    """The images of each row, which has so many slots; None where they do not fit."""
    rows: list[list[int]] = []
    following = 0
    for count in counts:
        row: list[int] = []
        while count > 0 and following < len(visuals):
            count -= len(visuals[following].token)
            row.append(following)
            following += 1
        if count:
            return None
        rows.append(row)
    return rows if following == len(visuals) else None


def _describe(ids: Tensor, mask: Tensor | None, position: Tensor | None, slots: Tensor) -> TokenSequence:
    """The prompt's columns. Only padding before the first slot may go: a hidden slot still holds its patch's place."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows: list[list[bool]] = valid.tolist()
    needed: list[list[bool]] = (valid | slots).tolist()
    slack = tuple(row.index(True) if True in row else len(row) for row in needed)
    holes = any(not all(row[first:]) for row, first in zip(rows, slack, strict=True))
    return TokenSequence(torch.full_like(ids, -1), valid, _placed(position, columns), columns, slack, holes)


def _placed(position: Tensor | None, columns: Tensor) -> Tensor:
    """Position ids (B, T) or (axes, B, T), on the host, as (B, T) or (B, T, axes); None: the `columns` (B, T)."""
    if position is None:
        return columns
    position = position.cpu()
    if position.dim() == 2:
        return position.expand_as(columns)
    return position.movedim(0, -1).expand(*columns.shape, -1)


def _labelled(labels: Tensor | None, ids: Tensor, text: Tensor) -> Tensor | None:
    """From the first label on. A row whose whole text is labelled tells no question from an answer: nothing."""
    if labels is None or labels.shape != ids.shape:
        return None
    labelled = (labels != -100) & text
    everything = (labelled == text).all(dim=1, keepdim=True)
    return (labelled.cumsum(dim=1) > 0) & ~everything
