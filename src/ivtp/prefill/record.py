"""What one prefill decided, and the trace of it that users read."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ivtp.core.select import on_device
from ivtp.core.sequence import TokenSequence, join_images, offset_images
from ivtp.cost.flops import count_flops
from ivtp.cost.sizes import Relevance
from ivtp.guide.clip import ClipText
from ivtp.guide.pseudo_cls import Guide
from ivtp.hosts.base import Host
from ivtp.methods.base import Method
from ivtp.prefill.stage import CutResult
from ivtp.prompt.batch import PromptBatch
from ivtp.trace import PruneTrace, StageTrace


class Stopwatch:
    """Seconds between its creation and `stop`, measured on the device; reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        event: Any = torch.cuda.Event
        self._events = [event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        self._seconds = 0.0

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

    @cached_property
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
    patches = record.host.size.num_patches
    images = record.prompts.images
    tokens = record.method.plan.tokens_per_layer(record.host.size)
    return PruneTrace(
        num_patches=patches,
        images=images,
        stages=_stages(record),
        words=[guide.words() for guide in record.guides] or [[] for _ in images],
        fallback=[bool(guide.fallback) for guide in record.guides] or [False] * len(images),
        tokens_per_layer=tokens,
        flops=_flops(record),
        seconds=record.watch.seconds,
        notes=record.method.notes,
    )


def _flops(record: Record) -> float:
    """Cost of the whole batch: every row with its own number of images, padding counted as it was computed.

    Rows that repeat a prompt (beams) share its encoder and its guide.
    """
    prompts, size, method = record.prompts, record.host.size, record.method
    relevance = _relevance(record)
    total = 0.0
    for row, count in enumerate(prompts.images):
        text = prompts.length - count * size.num_patches
        if row % prompts.repeats:
            total += count_flops(size, method, text_tokens=text, images=count, encoded=True).total
        else:
            words = record.clip_tokens[row] if record.clip_tokens else 0
            total += count_flops(
                size, method, text_tokens=text, images=count, relevance=relevance, instruction_tokens=words
            ).total
    return total


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
        vision_layers=len(record.host.vision_layers) - record.host.size.vision_layers,
        compared=record.host.size.num_patches if record.method.reads_clip else 1,
    )


def _stages(record: Record) -> list[StageTrace]:
    """The cuts; what stands at a patch's place is marked as long as it stays."""
    stages: list[StageTrace] = []
    standing: Tensor | None = None  # (B, m)
    for result in record.results:
        result = _by_sample(result, record.prompts, record.host.size.num_patches)
        if result.stand_ins is not None:
            standing = result.stand_ins if standing is None else torch.cat([standing, result.stand_ins], dim=1)
        stages.append(_stage(result, standing))
    return stages


def _by_sample(result: CutResult, prompts: PromptBatch, patches: int) -> CutResult:
    """A result on the CPU with a row for each sample, also of a stage that has one for each image."""
    tensors = {name: getattr(result, name) for name in ("candidates", "scores", "kept", "sources", "stand_ins")}
    found = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
    if result.cut.where == "vision":
        images = prompts.images
        for name, tensor in found.items():
            own = tensor[prompts.image_of_slot]
            patch = own if name == "scores" else offset_images(own, images, patches)
            found[name] = join_images(patch, images, float("-inf") if name == "scores" else -1)
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
