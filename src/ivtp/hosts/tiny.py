"""What the random models of all families are made of: weights, a tokenizer, pictures."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, SiglipVisionConfig

IMAGE = "<image>"
PROMPTS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (("What is left of the dog?", ((50, 40),)),)
"""One question about one image of 50 x 40 pixels."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's turns: the images first, then the text."""

_WORDS = "USER: ASSISTANT: What is left of the dog? How many bananas are there near the blue house? Is it a cat?"


def tiny_tokenizer(image_token: str = IMAGE, **marks: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that reads any text, trained on a sentence on the spot; pads on the left.

    `marks` are more special tokens, by the names that a family's processor asks the tokenizer for.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=list(dict.fromkeys(["<pad>", "<s>", "</s>", image_token, *marks.values()])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    raw.train_from_iterator([_WORDS], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": image_token, **marks},
    )


def tiny_clip(**changes: int) -> CLIPVisionConfig:
    """Of a CLIP tower of width 32, with the sizes that a family asks for."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 16}
    return CLIPVisionConfig(**{**sizes, **changes})


def tiny_siglip(**changes: int) -> SiglipVisionConfig:
    """Of a SigLIP tower of width 32 without a head, with the sizes that a family asks for."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vision_use_head": False}
    return SiglipVisionConfig(**{**sizes, **changes})


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Of a decoder of 8 layers with grouped-query attention."""
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_mistral(tokenizer: PreTrainedTokenizerFast) -> MistralConfig:
    """Of a decoder like `tiny_llama`'s, but its heads are wider together than a token."""
    sizes = tiny_llama(tokenizer).to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    ids = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return MistralConfig(**{name: sizes[name] for name in (*names, *ids)}, head_dim=16, sliding_window=None)


def tiny_images(question: str, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """A picture of coloured squares and noise for each (width, height).

    It depends on the seed, its question and its place alone: a prompt has the same pictures by itself and in a batch.
    """
    pictures = []
    for place, (width, height) in enumerate(sizes):
        draw = np.random.default_rng([seed, zlib.crc32(question.encode()), place])
        squares = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        noise = draw.integers(-40, 40, (height, width, 3))
        coarse = np.asarray(squares.resize((width, height), Image.Resampling.NEAREST))
        pictures.append(Image.fromarray((coarse + noise).clip(0, 255).astype(np.uint8)))
    return pictures


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Matrices with gain 1.3, norms around 1, small biases, embeddings of unit size.

    Far larger than an initialisation, so that attention is uneven, scores differ and decoding has clear winners.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if "embed" in name and weight.dim() < 4:
            weight.copy_(noise)
        elif weight.dim() >= 2:
            weight.copy_(noise * 1.3 / weight[0].numel() ** 0.5)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif weight.dim() == 1:
            weight.copy_(1 + 0.1 * noise)


def settle(model: nn.Module, tokenizer: PreTrainedTokenizerFast, seed: int) -> nn.Module:
    """`model` in evaluation mode with random weights, which hardly ever says an image, the padding or the end."""
    inner: Any = model
    randomise(inner, seed)
    ids = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, tokenizer.pad_token, tokenizer.image_token])
    with torch.no_grad():
        inner.get_output_embeddings().weight[ids] = 0
    inner.generation_config.eos_token_id = tokenizer.eos_token_id
    inner.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def settle_gemma(model: Any, *parts: nn.Module) -> None:
    """The same of Gemma, whose norms, in these `parts`, add 1 to their weights, and which multiplies its embeddings."""
    embedding: Tensor = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding /= embedding.shape[1] ** 0.5
        for part in parts:
            for name, weight in part.named_parameters():
                if "norm" in name:
                    weight.sub_(1)


def for_images(processor: Any) -> Any:
    """A stock processor class without its part for videos, which torchvision alone can make."""

    class ForImages(processor):  # type: ignore[misc]  # transformers is untyped here
        """It takes an image processor and a tokenizer."""

        def __init__(self, image_processor: Any, tokenizer: Any, **settings: Any) -> None:
            super().__init__(image_processor, tokenizer, None, **settings)

    return ForImages
