"""From symbols to images: projector alignment, then LLaVA's two stages, all on features of the frozen tower."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from recipes.micro.blocks import forward_blocks
from recipes.micro.decoder import BACKGROUND, SymbolicImage, symbol_map
from recipes.micro.features import FeatureStore, photo_of
from recipes.micro.instruct import PATCHES, Template, answer_loss
from recipes.micro.loop import BatchResult, KindTracker, LoopOptions, rank, rng_for, train_loop
from recipes.micro.optim import Optimisers, compute_dtype, split_parameters
from recipes.micro.projector import Projector
from recipes.micro.tasks import LONG, ask_many, ask_task


def align_projector(
    projector: Projector,
    symbolic: SymbolicImage,
    store: FeatureStore,
    *,
    images: int = 600,
    steps: int = 2000,
    seed: int = 0,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> float:
    """Regresses projected patch features onto the symbolic embeddings of the same patches.

    All object patches and as many background patches take part. Returns the relative squared error on the last
    tenth of the images.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    images = min(images, store.count)
    held = max(1, images // 10)
    parts = [_pairs(store, list(rows), symbolic, rng) for rows in (range(images - held), range(images - held, images))]
    (x, y), (test_x, test_y) = parts
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    projector.mean.copy_(x.mean(0))
    projector.scale.copy_(x.std(0) + 1e-4)
    projector.linear_2.bias.data.copy_(y.mean(0))
    optimiser = torch.optim.AdamW(projector.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(x), (2048,))
        loss = nn.functional.mse_loss(projector(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        report((step + 1) / steps, f"loss {float(loss.detach()):.3f}")
    with torch.no_grad():
        error = (projector(test_x) - test_y).square().mean() / (test_y - y.mean(0)).square().mean()
    return float(error)


def _pairs(store: FeatureStore, rows: list[int], symbolic: SymbolicImage, rng: random.Random) -> tuple[Tensor, Tensor]:
    """(features, symbolic embeddings) of all object patches and as many background patches, float32."""
    features, symbols = [], []
    for row in rows:
        photo = photo_of(row)
        grid = symbol_map(photo.scene)
        if not photo.readable:
            continue
        shown = np.flatnonzero(grid[:, 0] != BACKGROUND).tolist()
        hidden = np.flatnonzero(grid[:, 0] == BACKGROUND).tolist()
        chosen = shown + rng.sample(hidden, min(len(hidden), len(shown)))
        features.append(store[[row]][0, chosen].float())
        symbols.append(grid[chosen])
    with torch.no_grad():
        return torch.cat(features), symbolic(torch.from_numpy(np.concatenate(symbols)))


@dataclass(frozen=True)
class StageOptions:
    """Options of LLaVA's stages beside those of the loop."""

    scenes: int = 8
    questions: int = 20
    captions_only: bool = False


def train_stage(
    projector: Projector,
    decoder: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    options: StageOptions,
    loop: LoopOptions,
    checkpoint: Path,
    *,
    resume: bool = False,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> KindTracker:
    """One stage on all visual tokens; what is trained is what requires a gradient.

    Stage 1: freeze the decoder (``decoder.requires_grad_(False)``) and ask for captions. Stage 2: train both on
    every kind of question. Returns the running exact match by kind.
    """
    decoder.train()
    projector.standardise(*(part.to(projector.mean.device) for part in store.statistics()))
    matrices, others = split_parameters(decoder)
    others += list(projector.parameters())
    optimisers = Optimisers(matrices, others, muon_lr=loop.muon_lr, adam_lr=loop.adam_lr)
    templates, tracker = [Template(tokenizer, system) for system in (False, True)], KindTracker()

    def batch(step: int) -> BatchResult:
        rng = rng_for(loop.seed, step, rank())
        return _batch(projector, decoder, templates[step % 2], store, options, tracker, rng)

    modules = {"projector": projector, "decoder": decoder}
    train_loop(batch, modules, optimisers, tracker, loop, checkpoint, resume=resume, report=report)
    return tracker


def _batch(
    projector: Projector,
    decoder: LlamaForCausalLM,
    template: Template,
    store: FeatureStore,
    options: StageOptions,
    tracker: KindTracker,
    rng: random.Random,
) -> BatchResult:
    """Forward and backward of one batch of stored scenes with fresh questions."""
    device = decoder.lm_head.weight.device
    rows, asked = [], []
    for row in rng.sample(range(store.count), store.count):
        photo = photo_of(row)
        if options.captions_only:
            found = [question for task in LONG for question in ask_task(photo, rng, task)]
        else:
            found = ask_many(photo, rng, options.questions, tracker.weights(0.15))
        if found:
            rows.append(row)
            asked.append(found)
        if len(rows) == options.scenes:
            break
    dtype = compute_dtype(device)
    image = projector(store[rows].to(device, dtype))
    text = template.blocks(asked).to(device)
    head = torch.tensor(template.head, device=device)
    start = decoder.model.embed_tokens(head).to(dtype).expand(len(rows), -1, -1)
    positions = torch.arange(len(head) + PATCHES, device=device).expand(len(rows), -1)
    hidden = forward_blocks(decoder.model, torch.cat((start, image), dim=1), positions, text, template.text_start)
    loss, right, total = answer_loss(decoder.lm_head, hidden, text)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), right, total
