"""What the micro CLIP has learnt, measured on whole validation images."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from ivtp.micro.world import GRID, NAMES, SIZE, canonical_caption, questions
from ivtp.micro.world.photo import Photo, take_photo
from recipes.micro.optim import autocast
from recipes.micro.vision_data import IGNORE, make_batch
from recipes.micro.vision_model import WORD_THRESHOLD, Heads, encode_texts, encode_windows


@torch.no_grad()
def evaluate(
    clip: CLIPModel,
    heads: Heads,
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    *,
    count: int = 64,
    split: str = "validation",
) -> dict[str, float]:
    """Accuracies of the dense read-outs at layer -2, retrieval among ``count``, word relevance.

    ``object_accuracy`` and the attributes are over patches that an object covers. ``word_auc`` is the chance
    that a word naming a present object scores above one naming an absent object, in questions (Eq. 5);
    ``word_recall`` and ``word_false_rate`` are the shares of both that pass the default threshold.
    """
    device = clip.device
    photos = [take_photo(split, i) for i in range(count)]
    hits: dict[str, list[Tensor]] = {}
    images, present = [], []
    for start in range(0, count, 8):
        batch = make_batch(photos[start : start + 8], GRID, tokenizer, table).to(device)
        with autocast(device):
            states, image = encode_windows(clip, batch.patches, batch.positions)
            logits, box = heads(states)
        images.append(image)
        present.append(batch.present)
        inside = batch.labels["object"] > 0
        for key, values in logits.items():
            known = inside & (batch.labels[key] != IGNORE)
            if key == "text":
                known = known & (batch.labels["text"] > 0)
            right = values.argmax(-1) == batch.labels[key]
            hits.setdefault(f"{key}_accuracy", []).append(right[known].float())
            if key == "object":
                hits.setdefault("background_accuracy", []).append(right[batch.labels[key] == 0].float())
        hits.setdefault("box_error_px", []).append((box.float() - batch.box)[inside].abs().flatten() * SIZE)
    scores = {key: torch.cat(values).mean().item() for key, values in hits.items()}
    return scores | clip_scores(clip, tokenizer, table, torch.cat(images), torch.cat(present), photos)


@torch.no_grad()
def clip_scores(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    image: Tensor,
    present: Tensor,
    photos: list[Photo],
) -> dict[str, float]:
    """Retrieval and word relevance from unit image embeddings (n, 128) and the keywords that are true (n, K)."""
    hits = retrieved(clip, tokenizer, image, photos)
    return {"retrieval": sum(hits) / len(hits)} | _words(clip, tokenizer, table, image, present, photos)


def _encode(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(clip.device)
    with autocast(clip.device):
        tokens, whole = encode_texts(clip, encoded["input_ids"], encoded["attention_mask"])
    return encoded["input_ids"], tokens, whole


def retrieved(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, image: Tensor, photos: list[Photo]) -> list[bool]:
    """For each photo whether its own canonical caption scores highest among all."""
    captions = [canonical_caption(photo.scene) for photo in photos]
    _, _, texts = _encode(clip, tokenizer, captions)
    target = torch.arange(len(photos), device=image.device)
    hits: list[bool] = ((image @ texts.T).argmax(1) == target).tolist()
    return hits


def word_scores(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    image: Tensor,
    present: Tensor,
    photos: list[Photo],
) -> list[tuple[Tensor, Tensor]]:
    """For each photo the relevances of object names that it shows, and of others, in its questions and the next's."""
    found = []
    for index in range(len(photos)):
        texts = []
        for photo in (photos[index], photos[(index + 1) % len(photos)]):
            texts += [question.text for question in questions(photo.scene, seed=0, count=6)]
        ids, tokens, _ = _encode(clip, tokenizer, texts)
        keywords = table.to(ids.device)[ids]
        named = (keywords >= 0) & (keywords < len(NAMES))
        scores = tokens[named] @ image[index]
        truth = present[index][keywords[named]]
        found.append((scores[truth], scores[~truth]))
    return found


def roc_auc(high: Tensor, low: Tensor) -> float:
    """The chance that one of ``high`` is above one of ``low``; equals count half."""
    ordered = low.sort().values
    below, upto = (torch.searchsorted(ordered, high, right=right) for right in (False, True))
    return float((below + upto).double().mean() / (2 * len(low)))


def _words(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    image: Tensor,
    present: Tensor,
    photos: list[Photo],
) -> dict[str, float]:
    found = word_scores(clip, tokenizer, table, image, present, photos)
    high, low = (torch.cat(scores) for scores in zip(*found, strict=True))
    return {
        "word_auc": roc_auc(high, low),
        "word_recall": (high > WORD_THRESHOLD).float().mean().item(),
        "word_false_rate": (low > WORD_THRESHOLD).float().mean().item(),
    }
