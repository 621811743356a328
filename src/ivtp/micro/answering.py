"""Greedy answers to many questions about one photo: the image is encoded and prefilled once, the questions share it.

The answers are those of stock ``generate`` (a test compares), at a fraction of the cost. With ``patches``, each
question sees only the given patches, at their original positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from ivtp.generate import prompt_for
from ivtp.stock import cache_name

LONGEST = 64  # tokens of an answer


@torch.inference_mode()
def answer_about(
    model: Any,
    processor: Any,
    image: Image.Image | None,
    questions: Sequence[str],
    *,
    patches: Sequence[Sequence[int]] | None = None,
    longest: int = LONGEST,
) -> list[str]:
    """Answers to questions about one image (None: the questions alone)."""
    prompts = [prompt_for(processor, question, images=int(image is not None)) for question in questions]
    if image is None:
        texts = [processor.tokenizer(prompt).input_ids for prompt in prompts]
        return _continue(model, processor, texts, 0, DynamicCache(config=model.config.text_config), longest)
    head, visual = _image_prefix(model, processor, image, prompts[0])
    texts = [
        processor.tokenizer(prompt.split("<image>", 1)[1], add_special_tokens=False).input_ids for prompt in prompts
    ]
    rows = [list(range(visual.shape[1]))] if patches is None else [list(row) for row in patches]
    chosen = torch.tensor(rows, device=visual.device)  # (1 or Q, k)
    embeds = torch.cat([head.expand(len(rows), -1, -1), visual[0, chosen]], dim=1)
    places = torch.arange(head.shape[1], device=visual.device).expand(len(rows), -1)
    places = torch.cat([places, head.shape[1] + chosen], dim=1)
    cache = DynamicCache(config=model.config.text_config)
    decoder = model.model.language_model
    decoder(inputs_embeds=embeds, position_ids=places, **{cache_name(decoder.forward): cache})
    if len(rows) == 1:
        cache.batch_repeat_interleave(len(texts))
    start = head.shape[1] + visual.shape[1]
    return _continue(model, processor, texts, start, cache, longest)


def _image_prefix(model: Any, processor: Any, image: Image.Image, prompt: str) -> tuple[Tensor, Tensor]:
    """Embeddings before the image (1, n, C) and of the image's patches (1, 576, C)."""
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    visual = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    ids = processor.tokenizer(prompt.split("<image>", 1)[0], return_tensors="pt").input_ids.to(model.device)
    head: Tensor = model.get_input_embeddings()(ids)
    return head, visual.to(head.dtype)


def _continue(
    model: Any, processor: Any, texts: list[list[int]], start: int, cache: DynamicCache, longest: int
) -> list[str]:
    """Answers each text (token ids), which begins at position ``start`` behind what the cache holds."""
    ends, device = model.generation_config.eos_token_id, model.device
    width, count = max(map(len, texts)), len(texts)
    ids = torch.full((count, width), ends, device=device)
    mask = torch.zeros(count, width, dtype=torch.long, device=device)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text, device=device)
        mask[row, width - len(text) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) + start
    mask = torch.cat([mask.new_ones(count, cache.get_seq_length()), mask], dim=1)
    return _greedy(model, processor, ids, mask, positions, cache, longest)


def _greedy(
    model: Any, processor: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, longest: int
) -> list[str]:
    """Decodes greedily from the token ids (Q, L) behind what the cache holds."""
    ends, decoder = model.generation_config.eos_token_id, model.model.language_model
    name = cache_name(decoder.forward)
    answers: list[list[int]] = [[] for _ in mask]
    rows = torch.arange(len(mask), device=mask.device)  # the questions whose answers have not ended
    for _ in range(longest):
        states = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **{name: cache}).last_hidden_state
        new = model.lm_head(states[:, -1]).argmax(-1)
        for row, token in zip(rows.tolist(), new.tolist(), strict=True):
            answers[row].append(token)
        left = (new != ends).nonzero().squeeze(1)
        if not len(left):
            break
        positions, mask = positions[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(left) < len(rows):  # one long answer does not make the short ones wait
            cache.batch_select_indices(left)
            rows, new, positions, mask = rows[left], new[left], positions[left], mask[left]
        ids = new[:, None]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]
