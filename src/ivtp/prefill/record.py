"""What one prefill decided, and the trace of it that users read."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivtp.core.select import on_device
from ivtp.core.sequence import TokenSequence, image_offsets, join_images, offset_images
from ivtp.core.untraced import untraced
from ivtp.cost.prefill import count_prompt
from ivtp.cost.sizes import Relevance
from ivtp.guide.clip import ClipText
from ivtp.guide.pseudo_cls import Guide
from ivtp.hosts.base import Host
from ivtp.methods.base import Method
from ivtp.prefill.stage import CutResult
from ivtp.prompt.batch import PromptBatch
from ivtp.trace import Grids, PruneTrace, StageTrace


class Stopwatch:
    """Seconds between its creation and `stop`, measured on the device; reading them waits for it."""

    @untraced
    def __init__(self, device: torch.device) -> None:
        event: Any = torch.cuda.Event
        self._events = [event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        self._seconds = 0.0

    @untraced
    def stop(self) -> None:
        """Take the time."""
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """Between its creation and `stop`."""
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._seconds


@dataclass(frozen=True)
class Record:
    """What one prefill decided: small tensors without a graph, which nobody has waited for yet."""

    host: Host
    method: Method
    clip: ClipText | None
    prompts: PromptBatch
    results: tuple[CutResult, ...]
    """The cuts, in order."""
    guides: tuple[Guide, ...]
    """Of each row; empty where no guide leads."""
    clip_tokens: tuple[int, ...]
    """Tokens that CLIP read of each row."""
    sequence: TokenSequence
    """What is left behind the last cut."""
    watch: Stopwatch
    read_before: tuple[bool, ...]
    """Which of the prompts' images were read in an earlier turn."""
    before: tuple[Record, ...]
    """Of the earlier turns of the conversation that pruned."""
    past: tuple[int, ...] = ()
    """Tokens that each decoder layer had cached before."""

    @functools.cached_property
    def trace(self) -> PruneTrace:
        """The trace that users read; making it waits for the device."""
        return build_trace(self)

    def shorten_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, T) of the prompt for the columns (B, T') that the logits have; visual tokens have none."""
        sequence = self.sequence
        shortened = labels.to(sequence.source.device).gather(1, sequence.source.clamp_min(0))
        return shortened.masked_fill(sequence.visual | ~sequence.valid | (sequence.source < 0), -100)

    def columns(self) -> Tensor:
        """(B, T): for every column of the prompt the last one that is left at or before it.

        Logits that are gathered by it stand where those of the stock model do, and a column behind a pruned token is
        predicted by what the pruned model saw before it.
        """
        sequence = self.sequence
        left = torch.arange(sequence.length, device=sequence.source.device)
        filled = left >= on_device(sequence.slack, left.device).unsqueeze(1)
        source = sequence.source.masked_fill(~filled, -1)
        wanted = torch.arange(self.prompts.length, device=left.device).expand(source.shape[0], -1)
        return (torch.searchsorted(source, wanted.contiguous(), right=True) - 1).clamp_min(0)


def build_trace(record: Record) -> PruneTrace:
    """Copy everything to the CPU and count a row for each sample."""
    slots = record.prompts.slots
    largest = record.method.sized(max(n for row in slots.patches for n in row))
    total, each = _flops(record)
    return PruneTrace(
        num_patches=largest.geometry.num_patches,
        images=slots.images,
        patches=slots.patches,
        grids=_grids(record.prompts),
        stages=_stages(record),
        words=[guide.words() for guide in record.guides] or [[] for _ in slots.images],
        fallback=[bool(guide.fallback) for guide in record.guides] or [False] * len(slots.images),
        tokens_per_layer=largest.plan.tokens_per_layer(largest.geometry),
        flops=total,
        flops_each=each,
        seconds=record.watch.seconds,
        notes=record.method.notes,
        before=tuple(earlier.trace for earlier in record.before),
    )


def _grids(prompts: PromptBatch) -> tuple[tuple[Grids, ...], ...]:
    """The grids of each image of each row."""
    of_all = iter(prompts.visuals[m].grids for m in prompts.image_of_slot)
    return tuple(tuple(next(of_all) for _ in range(count)) for count in prompts.images)


def _flops(record: Record) -> tuple[float, tuple[float, ...]]:
    """Cost of the whole batch, padding counted as it was computed, and of every row by itself, without.

    In the batch rows that repeat a prompt (beams) share its encoder and its guide.
    """
    prompts = record.prompts
    count = functools.partial(_flops_of_row, record, _relevance(record))
    lengths = prompts.tokens.valid.sum(dim=1).tolist()
    each = tuple(count(row, length) for row, length in enumerate(lengths))
    total = 0.0
    for row, length in enumerate(lengths):
        again = row % prompts.repeats > 0
        as_it_is = length == prompts.length and not again
        total += each[row] if as_it_is else count(row, prompts.length, again=again)
    return total, each


def _flops_of_row(record: Record, relevance: Relevance | None, row: int, length: int, again: bool = False) -> float:
    """Cost of a row of `length` columns; of one that comes `again` the decoder's alone."""
    prompts, images = record.prompts, record.prompts.images
    first = sum(images[:row])
    own = prompts.image_of_slot[first : first + images[row]]
    text = length - sum(prompts.visuals[m].patches for m in own)  # separators stay, as text does
    marks = 0 if prompts.framing is None else int(prompts.framing[row].sum())
    words = record.clip_tokens[row] if record.clip_tokens and not again else 0

    def count(chosen: list[int], relevance: Relevance | None, encoded: bool) -> float:
        shown = [prompts.visuals[m].counted for m in chosen]
        return count_prompt(
            record.host.size,
            record.method,
            shown,
            text_tokens=text,
            marks=marks,
            relevance=relevance,
            instruction_tokens=words,
            encoded=encoded,
            past=record.past,
        ).total

    if again:
        return count(own, None, True)
    new = [m for m in own if not record.read_before[m]]
    if len(new) == len(own):
        return count(own, relevance, False)
    read = None if relevance is None else dataclasses.replace(relevance, vision_layers=0)
    return count(own, read, True) + count(new, relevance, False) - count(new, read, True)


def _relevance(record: Record) -> Relevance | None:
    clip = record.clip
    if clip is None:
        return None
    text: Any = clip.text_model.config
    return Relevance(
        text_layers=text.num_hidden_layers,
        text_hidden=text.hidden_size,
        text_mlp=text.intermediate_size,
        projection=clip.visual_projection.out_features,
        context=clip.context,
        vision_layers=len(record.host.vision.layers) - record.host.size.vision_layers,
        compared=record.host.size.num_patches if record.method.reads_clip else 1,
    )


def _stages(record: Record) -> list[StageTrace]:
    """The cuts; what stands at a patch's place is marked as long as it stays."""
    stages: list[StageTrace] = []
    standing: Tensor | None = None  # (B, m)
    for result in record.results:
        result = _by_sample(result, record.prompts)
        if result.stand_ins is not None:
            standing = result.stand_ins if standing is None else torch.cat([standing, result.stand_ins], dim=1)
        stages.append(_stage(result, standing))
    return stages


def _by_sample(result: CutResult, prompts: PromptBatch) -> CutResult:
    """A result on the CPU with a row for each sample, also of a stage that has one for each image."""
    tensors = {name: getattr(result, name) for name in ("candidates", "scores", "kept", "sources", "stand_ins")}
    found = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
    if result.cut.where == "vision":
        images, offsets = prompts.images, image_offsets(prompts.slots.patches)
        for name, tensor in found.items():
            own = tensor[prompts.image_of_slot]
            if name == "scores":
                found[name] = join_images(list(own), images, float("-inf"))
                continue
            own = offset_images(own, offsets)
            # sources have a place for every patch of an image, and a smaller one has fewer than its row is wide
            sizes = (
                [n for row in prompts.slots.patches for n in row] if name == "sources" else [own.shape[1]] * len(own)
            )
            found[name] = join_images([row[:n] for row, n in zip(own, sizes, strict=True)], images, -1)
    return dataclasses.replace(result, **found)


def _stage(result: CutResult, standing: Tensor | None) -> StageTrace:
    """`standing` (B, m) are patches whose places other tokens took, at this cut or before."""
    order = _visual_first(result.candidates)
    candidates = result.candidates.gather(1, order)
    scores = result.scores
    if scores is not None:
        scores = scores.float().gather(1, order).masked_fill(candidates < 0, float("-inf"))
    kept = result.kept.gather(1, _visual_first(result.kept))
    kept = _trim(kept, kept)
    stand_ins = None
    if standing is not None:
        stand_ins = (kept >= 0) & (kept.unsqueeze(2) == standing.unsqueeze(1)).any(dim=2)
    return StageTrace(
        where=result.cut.where,
        layer=result.cut.layer,
        kept=kept,
        scores=None if scores is None else _trim(scores, candidates),
        candidates=_trim(candidates, candidates),
        sources=result.sources,
        stand_ins=stand_ins,
    )


def _visual_first(patch: Tensor) -> Tensor:
    """Order that puts visual tokens in front, each kind in its own order."""
    return (patch < 0).to(torch.uint8).argsort(dim=1, stable=True)


def _trim(tensor: Tensor, patch: Tensor) -> Tensor:
    width = int((patch >= 0).sum(dim=1).max()) if patch.numel() else 0
    return tensor[:, :width]
