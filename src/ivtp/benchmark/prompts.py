"""Prompts of a wanted length: random ids for random weights, noise and words for a model with a processor."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ivtp.benchmark.asked import Point
from ivtp.benchmark.models import Subject
from ivtp.cost.flops import prompt_tokens
from ivtp.errors import ConfigError
from ivtp.generate import prompt_for

_QUESTION = "is there a dog in the picture?"
_FILLER = "the "


@dataclass(frozen=True)
class Prompt:
    """What every run of one configuration reads; no row is padded."""

    inputs: dict[str, Tensor]
    """`input_ids`, `attention_mask` and what else describes columns (B, T), `pixel_values` (B * images, 3, H, W)."""
    text_tokens: int
    """The prompt as `ivtp.flops` counts it: within a word of what was asked, where the text is made of words."""
    columns: int
    """T."""


def make_prompt(subject: Subject, point: Point, seed: int) -> Prompt:
    """The prompts of a configuration, the same for the same seed. Raises `ConfigError` for a text that is too short."""
    inputs = _random(subject, point, seed) if subject.processor is None else _worded(subject, point, seed)
    columns = inputs["input_ids"].shape[1]
    text_tokens = prompt_tokens(columns, subject.host.size, point.images)
    return Prompt({k: v.to(subject.device) for k, v in inputs.items()}, text_tokens, columns)


def text_ids(subject: Subject, rows: int, columns: int, seed: int) -> Tensor:
    """Random ids (rows, columns) that are no image slots."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, subject.host.size.vocab_size, (rows, columns), generator=draw)
    return ids.masked_fill(ids == subject.host.image_token, 1)


def _random(subject: Subject, point: Point, seed: int) -> dict[str, Tensor]:
    """One token, the images, the rest of the text."""
    ids = text_ids(subject, point.batch, point.text - point.images, seed)
    slots = ids.new_full((point.batch, point.images * subject.host.size.num_patches), subject.host.image_token)
    ids = torch.cat([ids[:, :1], slots, ids[:, 1:]], dim=1)
    side = _side(subject)
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(point.batch * point.images, 3, side, side, generator=draw).to(subject.model.dtype)
    columns = {"attention_mask": torch.ones_like(ids), **subject.host.columns(ids)}
    return {"input_ids": ids, "pixel_values": pixels, **columns}


def _worded(subject: Subject, point: Point, seed: int) -> dict[str, Tensor]:
    processor, side = subject.processor, _side(subject)
    text = _text(processor, point)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (point.batch * point.images, side, side, 3), generator=draw, dtype=torch.uint8)
    pictures = [Image.fromarray(picture.numpy()) for picture in noise]
    rows = [pictures[first : first + point.images] for first in range(0, len(pictures), point.images)]
    made = subject.host.process(processor, [text] * point.batch, rows)
    columns = {name: made[name] for name in ("input_ids", "attention_mask", *subject.host.of_columns)}
    return {**columns, "pixel_values": made["pixel_values"].to(subject.model.dtype)}


def _side(subject: Subject) -> int:
    """Pixels along the square that the encoder sees at once; some configs name both sides of it."""
    size: Any = subject.model.config.vision_config.image_size
    return int(size if isinstance(size, int) else size[0])


def _text(processor: Any, point: Point) -> str:
    """A turn whose question is led by as many filler words as fit the wanted length."""

    def worded(words: int) -> str:
        return prompt_for(processor, _FILLER * words + _QUESTION, images=point.images)

    def tokens(words: int) -> int:
        return len(processor.tokenizer(worded(words))["input_ids"])

    if tokens(0) > point.text:
        raise ConfigError(
            f"--text {point.text} is shorter than the chat template with a short question; use {tokens(0)} or more"
        )
    return worded(bisect_right(range(point.text), point.text, key=tokens) - 1)
