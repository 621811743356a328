"""The CLIP that is trained, its tokenizer, the throw-away heads, and the losses."""

from __future__ import annotations

import json

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ivtp.micro.world import PATCH, SIZE
from ivtp.micro.world.chinese import CHINESE_PATTERN
from ivtp.stock import set_kernel
from recipes.micro.corpus import corpus
from recipes.micro.vision_data import CLASSES, IGNORE, Batch

WORD_THRESHOLD = 0.2  # the method's default relevance threshold: trained to be where present and absent words part
WORD_SCALE = 12.0
_SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing byte-pair tokenizer that gives each word of the world one token and takes any text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(
        Regex(CHINESE_PATTERN + r"|\p{Han}|[\p{L}&&[^\p{Han}]]+|\p{N}+|[^\s\p{L}\p{N}]+"),
        behavior="removed",
        invert=True,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[*_SPECIAL, *alphabet, *(letter + "</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    # The letters were special only to be in the vocabulary; in use they are ordinary tokens.
    rebuilt = _without_special_letters(tokenizer)
    rebuilt.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    names = dict(zip(("pad_token", "bos_token", "unk_token", "eos_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=rebuilt, model_max_length=77, **names)


def _without_special_letters(trained: Tokenizer) -> Tokenizer:
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def build_clip(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int = 192,
    heads: int = 3,
    layers: int = 12,
    text_layers: int = 4,
    seed: int = 0,
) -> CLIPModel:
    """A stock CLIPModel with random weights: 336 px, patches of 14, projection to 128."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=128,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        projection_dim=128,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    set_kernel(config, "eager")
    torch.manual_seed(seed)
    return CLIPModel(config)


class Heads(nn.Module):
    """Linear read-outs of the patch tokens that make the dense objectives; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.ModuleDict({key: nn.Linear(width, size) for key, size in CLASSES.items()})
        self.box = nn.Linear(width, 4)

    def forward(self, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Patch states (B, P, C) to class logits (B, P, classes) each and boxes (B, P, 4)."""
        states = self.norm(states)
        return {key: head(states) for key, head in self.classes.items()}, self.box(states)


def encode_windows(clip: CLIPModel, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Second-to-last states of the patches (B, P, C) and the unit image embedding (B, 128).

    The same computation as the stock tower's, but for any subset of the 576 patches, at their true positions.
    """
    return encode_from(clip, encode_to(clip, patches, positions, 0), 0)


def encode_to(clip: CLIPModel, patches: Tensor, positions: Tensor, layer: int) -> Tensor:
    """The states (B, 1 + P, C) of CLS and the patches that enter a layer."""
    tower = clip.vision_model
    embed = tower.embeddings
    kernel = embed.patch_embedding.weight.flatten(1)  # (C, 588)
    table = embed.position_embedding.weight
    x = F.linear(patches, kernel) + table[positions + 1]  # (B, P, C)
    cls = (embed.class_embedding + table[0]).to(x.dtype).expand(x.shape[0], 1, -1)
    states: Tensor = tower.pre_layrnorm(torch.cat([cls, x], dim=1))
    for one in tower.encoder.layers[:layer]:
        states = one(states, None)
    return states


def encode_from(clip: CLIPModel, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What `encode_windows` gives, from the states that enter a layer."""
    tower = clip.vision_model
    before = x
    for one in tower.encoder.layers[layer:]:
        before, x = x, one(x, None)
    image = clip.visual_projection(tower.post_layernorm(x[:, 0]))
    return before[:, 1:], F.normalize(image.float(), dim=-1)


def encode_texts(clip: CLIPModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings of every token (T, L, 128) and of the whole texts (their end tokens, (T, 128))."""
    states = clip.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    tokens = F.normalize(clip.text_projection(states).float(), dim=-1)
    ends = attention_mask.sum(1) - 1
    return tokens, tokens[torch.arange(len(tokens), device=tokens.device), ends]


def losses(clip: CLIPModel, heads: Heads, batch: Batch) -> dict[str, Tensor]:
    """The terms of the training loss, unweighted; see WEIGHTS."""
    states, image = encode_windows(clip, batch.patches, batch.positions)
    logits, box = heads(states)
    terms = {}
    inside = batch.labels["object"] > 0
    for key, values in logits.items():
        target = batch.labels[key]
        if key not in ("object", "row", "column"):  # attributes are read off objects only, and words off signs only
            target = torch.where(inside & ((target > 0) | (key != "text")), target, IGNORE)
        total = F.cross_entropy(values.float().flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")
        terms[key] = total / (target != IGNORE).sum().clamp(min=1)
    terms["box"] = F.smooth_l1_loss(box.float()[inside], batch.box[inside], beta=0.02) * 10
    tokens, texts = encode_texts(clip, batch.input_ids, batch.attention_mask)
    terms["contrast"] = _contrast(clip, image, texts[: len(image)], batch)
    terms["words"] = word_loss(image, tokens, batch)
    return terms


WEIGHTS = {
    "object": 1.0,
    "colour": 0.5,
    "backing": 0.2,
    "text": 0.5,
    "centre_row": 0.4,
    "centre_column": 0.4,
    "row": 0.5,
    "column": 0.5,
    "box": 0.5,
    "contrast": 0.3,
    "words": 0.5,
}


def _contrast(clip: CLIPModel, image: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """CLIP's symmetric loss, but a caption that happens to be true of another image is no negative for it."""
    logits = clip.logit_scale.exp().clamp(max=100) * image @ texts.T  # (B images, B captions)
    count = len(image)
    mentioned = mention(batch.keywords[:count], batch.present.shape[1])
    false = mentioned.float() @ (~batch.present).float().T > 0  # (captions, images)
    allowed = false.T | torch.eye(count, dtype=torch.bool, device=image.device)
    logits = logits.masked_fill(~allowed, -1e4)
    target = torch.arange(count, device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def mention(keywords: Tensor, count: int) -> Tensor:
    """(T, K) which keywords a text contains, from its tokens' keyword indices (T, L)."""
    table = torch.zeros(len(keywords), count + 1, dtype=torch.bool, device=keywords.device)
    table.scatter_(1, torch.where(keywords >= 0, keywords, count), True)
    return table[:, :count]


def word_loss(image: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
    """Every word against every image: above WORD_THRESHOLD if it names something there, below it if not.

    This trains the text outputs before the end token, whose cosines are the relevances of Eq. 5.
    """
    kept = batch.keywords >= -1  # (T, L)
    keywords = batch.keywords[kept]  # (M,)
    logits = WORD_SCALE * (tokens[kept] @ image.T - WORD_THRESHOLD)  # (M, B)
    truth = batch.present.T[keywords.clamp(min=0)] & (keywords >= 0)[:, None]
    positive = F.softplus(-logits[truth]).mean() if truth.any() else logits.sum() * 0
    return positive + F.softplus(logits[~truth]).mean()
