"""Does the decoder need the right patches? Patches of the asked objects against random ones, and their coverage."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from ivtp.generate import prompt_for
from ivtp.micro import world
from ivtp.micro.answering import greedy
from ivtp.micro.scoring import Item, Table, accuracy_row, mean_interval
from ivtp.plug import attach

Report = Callable[[int], None]


def covering_patches(item: Item, keep: int, rng: random.Random) -> list[int]:
    """``keep`` patches: those of the asked objects first, then random ones."""
    asked = world.patches_of(item.scene, item.question.objects)
    asked = rng.sample(asked, min(keep, len(asked)))
    others = [patch for patch in range(world.GRID**2) if patch not in set(asked)]
    return sorted(asked + rng.sample(others, keep - len(asked)))


@torch.inference_mode()
def answer_with_patches(
    model: Any, processor: Any, items: list[Item], patches: list[list[int]], *, longest: int = 48
) -> list[str]:
    """Greedy answers from the given patches only, at their original position ids, as one left-padded batch."""
    prompts = [prompt_for(processor, item.question.text) for item in items]
    images = [world.render(item.scene) for item in items]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    slots = inputs["input_ids"] == model.config.image_token_id
    mask = inputs["attention_mask"].clone()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = torch.ones_like(slots)
    for row, chosen in enumerate(patches):
        embeds[row, slots[row]] = image[row].to(embeds.dtype)
        dropped = torch.ones(int(slots[row].sum()), dtype=torch.bool)
        dropped[chosen] = False
        keep[row, slots[row].nonzero().squeeze(1)[dropped]] = 0
    kept = keep.bool()
    shape = (len(items), -1)  # every row drops the same number, so the rest is rectangular again
    embeds = embeds[kept].view(*shape, embeds.shape[-1])
    inputs, places = {"inputs_embeds": embeds}, positions[kept].view(shape)
    return greedy(model, processor, inputs, mask[kept].view(shape), places, DynamicCache(), longest)


def compare_oracle(
    model: Any, processor: Any, items: list[Item], keep: int, *, seed: int, batch: int, report: Report
) -> Table:
    """The gate for every ranking of methods: patches of the asked objects must beat random ones at equal count."""
    rng = random.Random(seed)
    rows = []
    for name in ("asked objects, then random", "random"):
        answers: list[str] = []
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            everything = range(world.GRID**2)
            chosen = [
                sorted(rng.sample(everything, keep)) if name == "random" else covering_patches(item, keep, rng)
                for item in part
            ]
            answers += answer_with_patches(model, processor, part, chosen)
            report(len(part))
        rows.append({"patches": name} | accuracy_row(items, answers, "mean", "accuracy"))
    return Table(f"{keep} patches at their original positions", rows)


def compare_coverage(
    model: Any,
    processor: Any,
    items: list[Item],
    keep: int,
    *,
    ask: Callable[..., list[str]],
    batch: int,
    report: Report,
) -> Table:
    """How much of the asked objects survives: IVTP against TopK, question by question."""
    shares: dict[str, list[float]] = {}
    for method in ("topk", "ivtp"):
        shares[method] = []
        with attach(model, processor, method=method, keep=keep) as pruner:

            def record(part: list[Item], pruner: Any = pruner, found: list[float] = shares[method]) -> None:
                for item, kept in zip(part, pruner.trace.kept().tolist(), strict=True):
                    asked = set(world.patches_of(item.scene, item.question.objects))
                    found.append(len(asked & set(kept)) / len(asked))

            ask(model, processor, items, batch=batch, report=report, after=record)
    pairs = list(zip(shares["ivtp"], shares["topk"], strict=True))
    rows = []
    for label, hits in (
        ("IVTP covers more", [a > b for a, b in pairs]),
        ("equal", [a == b for a, b in pairs]),
        ("TopK covers more", [a < b for a, b in pairs]),
    ):
        value, low, high = mean_interval([hits])
        rows.append({"outcome": label, "share": value, "share low": low, "share high": high})
    means = ", ".join(f"{name} {100 * sum(values) / len(values):.1f}%" for name, values in shares.items())
    title = f"Asked objects' patches among the {keep} kept, {len(items)} test scenes (mean coverage: {means})"
    return Table(title, rows)
