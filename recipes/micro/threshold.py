"""The recommended relevance threshold: the one that best parts words for visible things from all other words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from ivtp.core.relevance import words
from ivtp.micro import world
from ivtp.micro.world.photo import take_photo
from ivtp.micro.world.vocabulary import plural
from recipes.micro.features import pixels_of


def visible_words(scene: world.Scene) -> set[str]:
    """The words that name something in the scene: objects, colours, and what signs say."""
    words: set[str] = set()
    for item in scene.objects:
        words |= {item.name, plural(item.name)}
        words |= {item.colour} if item.colour else set()
        words |= {item.text} if item.text else set()
    return words


@torch.inference_mode()
def word_relevance(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], image: Tensor
) -> list[list[tuple[str, float]]]:
    """(word, cosine with the image embedding) for each text (Eq. 5, averaged over a word's tokens)."""
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True)
    states = clip.text_model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
    tokens = nn.functional.normalize(clip.text_projection(states), dim=-1)  # (B, T, D)
    scores = tokens @ nn.functional.normalize(image, dim=-1)
    found = []
    for row, text in enumerate(texts):
        pairs = list(zip(encoded.offset_mapping[row].tolist(), scores[row].tolist(), strict=True))
        scored = []
        for first, last in words(text):
            mine = [score for (start, end), score in pairs if start < last and end > first]
            if mine:
                scored.append((text[first:last], sum(mine) / len(mine)))
        found.append(scored)
    return found


@torch.inference_mode()
def choose_threshold(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, images_of: CLIPImageProcessor, *, scenes: int = 100
) -> float:
    """Threshold with the best balanced accuracy over the words of questions about validation scenes."""
    high: list[float] = []
    low: list[float] = []
    for index in range(scenes):
        photo = take_photo("validation", index)
        scene = photo.scene
        pixels = pixels_of([photo], images_of.image_mean, images_of.image_std)
        pooled = clip.vision_model(pixel_values=pixels.to(clip.dtype)).pooler_output
        texts = [question.text for question in world.questions(scene, seed=0, count=8)]
        visible = visible_words(scene)
        for scored in word_relevance(clip, tokenizer, texts, clip.visual_projection(pooled)[0]):
            for word, score in scored:
                (high if word in visible else low).append(score)
    return best_split(torch.tensor(high), torch.tensor(low))


def best_split(high: Tensor, low: Tensor) -> float:
    """The value that maximises the share of ``high`` above it plus the share of ``low`` not above it."""
    candidates = torch.linspace(-0.5, 0.95, 291)
    gain = (high[None] > candidates[:, None]).float().mean(1) + (low[None] <= candidates[:, None]).float().mean(1)
    best = (gain == gain.max()).nonzero().squeeze(1)
    return float(candidates[best].mean())
