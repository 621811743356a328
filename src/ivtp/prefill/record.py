"""Turn the tensors of a finished prefill into the record that users read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ivtp.core.sequence import join_images, offset_images
from ivtp.cost.flops import count_flops
from ivtp.cost.sizes import Relevance
from ivtp.prefill.run import Prefill
from ivtp.prefill.stage import CutResult
from ivtp.prompt.batch import PromptBatch
from ivtp.trace import PruneTrace, StageTrace


def build_trace(prefill: Prefill) -> PruneTrace:
    """Copy everything to the CPU and count a row for each sample."""
    patches = prefill.host.size.num_patches
    images = prefill.prompts.images
    tokens = prefill.method.plan.tokens_per_layer(prefill.host.size)
    return PruneTrace(
        num_patches=patches,
        images=images,
        stages=_stages(prefill),
        words=[guide.words() for guide in prefill.guides] or [[] for _ in images],
        fallback=[bool(guide.fallback) for guide in prefill.guides] or [False] * len(images),
        tokens_per_layer=tokens,
        flops=_flops(prefill),
        seconds=prefill.watch.seconds,
        notes=prefill.method.notes,
    )


def _flops(prefill: Prefill) -> float:
    """Cost of the whole batch: every row with its own number of images, padding counted as it was computed.

    Rows that repeat a prompt (beams) share its encoder and its guide.
    """
    prompts, size, method = prefill.prompts, prefill.host.size, prefill.method
    relevance = _relevance(prefill)
    total = 0.0
    for row, count in enumerate(prompts.images):
        text = prompts.length - count * size.num_patches
        if row % prompts.repeats:
            total += count_flops(size, method, text_tokens=text, images=count, encoded=True).total
        else:
            words = prefill.clip_tokens[row] if prefill.clip_tokens else 0
            total += count_flops(
                size, method, text_tokens=text, images=count, relevance=relevance, instruction_tokens=words
            ).total
    return total


def _relevance(prefill: Prefill) -> Relevance | None:
    clip = prefill.guide_maker.clip
    if clip is None:
        return None
    text: Any = clip.text_model.config
    return Relevance(
        text_layers=text.num_hidden_layers,
        text_hidden=text.hidden_size,
        text_mlp=text.intermediate_size,
        projection=clip.visual_projection.out_features,
        context=clip.context,
        vision_layers=len(prefill.host.vision_layers) - prefill.host.size.vision_layers,
        compared=prefill.host.size.num_patches if prefill.method.reads_clip else 1,
    )


def _stages(prefill: Prefill) -> list[StageTrace]:
    """The cuts; what stands at a patch's place is marked as long as it stays."""
    stages: list[StageTrace] = []
    standing: Tensor | None = None  # (B, m)
    for result in prefill.results:
        result = _by_sample(result, prefill.prompts, prefill.host.size.num_patches)
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
