"""A tiny random LLaVA with its processor and CLIP model: stock classes, 36 patches, seeded, fast.

The weights are far larger than an initialisation would make them, so that attention is uneven, scores differ
clearly and greedy decoding has clear winners.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import ivtp
from ivtp.hosts.tiny import randomise
from ivtp.stock import cache_name

PATCH, SIDE = 4, 6
NUM_PATCHES = SIDE * SIDE
IMAGE_SIZE = PATCH * SIDE
VISION_LAYERS, VISION_WIDTH = 7, 32
"""The feature layer is -2, so 6 encoder layers run before the projector."""
TEXT_LAYERS, TEXT_WIDTH, LLM_LAYERS = 8, 48, 6
"""LLM_LAYERS: the W that the tests use."""
CONTEXT = 77
QUESTIONS = (
    "What is left of the small red dog?",
    "How many bananas are there, near the blue house?!",
    "Is it a cat",
    "Read the sign: which word (in 2 letters) is 左边 of the dog's house?",
)
FOLLOW_UP = "And which colour is the other one?"

# The template of the llava-1.5 checkpoints: images first, then the text of the turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Two cuts of the same words: the LLM's pieces are long and start with a space, CLIP's are short and end words.
_LLM_PIECES = """
    ĠWhat ĠHow Ġmany Ġis Ġthe Ġleft Ġof Ġsmall Ġre Ġdog Ġban anas Ġare Ġthere Ġnear Ġblue Ġhou se Ġit Ġca
    Ġsig n: Ġwhich Ġwo rd Ġin Ġlett ers Ġ2 's ?! US ER ASS ISTANT And Ġcol our Ġot her Ġone Is Rea
"""
_CLIP_PIECES = """
    wh at</w> ho w</w> ma ny</w> is</w> the</w> le ft</w> of</w> sm all</w> red</w> do g</w> b an as</w> ar e</w>
    th ere</w> ne ar</w> blu e</w> house</w> it</w> cat</w> si gn</w> whi ch</w> word</w> i n</w> let ters</w>
    's</w> an d</w> co lo ur</w> oth er</w> one</w>
"""


@dataclass(frozen=True)
class Sample:
    """One prompt: its chat text, the user's last question and its images."""

    prompt: str
    question: str
    images: tuple[Image.Image, ...]


class Tiny:
    """The factory. Everything that it hands out is a fresh copy, except for the processor and the CLIP side."""

    def __init__(self) -> None:
        self.processor = _processor()
        self.clip = clip_side(_vision_config())
        self._stock = _llava(self.processor, self.clip[0])

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
        """A stock model, in eval mode, without any hook."""
        model = copy.deepcopy(self._stock).to(dtype)
        model.set_attn_implementation(attention)
        return model

    def config(self, **changes: Any) -> ivtp.PruneConfig:
        """The tests' default: 8 of 36 patches, 6 decoder layers, a threshold that some words pass and some do not."""
        method = changes.get("method", "ivtp")
        own = {"llm_layers": LLM_LAYERS, "threshold": 0.06} if method == "ivtp" else {}
        return ivtp.PruneConfig.of(**{"keep": 8, **own, **changes})

    def attach(self, model: nn.Module, **changes: Any) -> ivtp.Pruner:
        """Attach with the tests' defaults and the tiny CLIP side."""
        return ivtp.attach(model, self.processor, self.config(**changes), clip=self.clip)

    def sample(self, question: str = QUESTIONS[0], images: int = 1, seed: int = 0) -> Sample:
        """A user turn with `images` random images."""
        content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        prompt = self.chat([{"role": "user", "content": content}])
        return Sample(prompt, question, tuple(image(seed + m) for m in range(images)))

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """The chat template, rendered."""
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def inputs(self, *samples: Sample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What `generate` takes: ids and mask (padded on the left), and `pixel_values` if there are any."""
        images = [list(s.images) for s in samples]
        batch = self.processor(
            images=images if any(images) else None,
            text=[s.prompt for s in samples],
            padding=True,
            return_tensors="pt",
        )
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if k != "token_type_ids"}


def samples(tiny: Tiny, name: str) -> list[Sample]:
    """The batches that the contract is about, by name."""
    one = [tiny.sample(q, seed=10 * (i + 1)) for i, q in enumerate(QUESTIONS)]
    two = tiny.sample(QUESTIONS[1], images=2, seed=50)
    none = tiny.sample("Say something about dogs.", images=0)
    batches = {
        "one": one[:1],
        "long": one[3:4],
        "batch": [one[0], one[1], one[2]],
        "two images": [two],
        "no image": [none],
        "mixed": [one[2], two, none, one[3]],
    }
    return batches[name]


def image(seed: int) -> Image.Image:
    """A picture of random colours, already in the size of the vision tower."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    coarse = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
    noise = np.random.default_rng(seed + 1000).integers(-40, 40, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that hands `cache` to the model, as this release of transformers calls it."""
    return {cache_name(model.forward): cache}


def generated(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The new tokens of `generate`."""
    return output[:, inputs["input_ids"].shape[1] :]


def _byte_pair(pieces: str, specials: Sequence[str], suffix: str) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges that build each piece from left to right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *alphabet, *([c + suffix for c in alphabet] if suffix else [])]
    merges: list[tuple[str, str]] = []
    for piece in pieces.split():
        symbols = list(piece.removesuffix(suffix)) if suffix else list(piece)
        if suffix and piece.endswith(suffix):
            symbols[-1] += suffix
        done = symbols[0]
        for symbol in symbols[1:]:
            if (done, symbol) not in merges:
                merges.append((done, symbol))
            done += symbol
            tokens.append(done)
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _processor() -> LlavaProcessor:
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    vocab, merges = _byte_pair(_LLM_PIECES, specials, suffix="")
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    vocab, merges = _byte_pair(_CLIP_PIECES, ["<|startoftext|>", "<|endoftext|>"], suffix="</w>")
    # The end token has the highest id, as in the original vocabulary.
    names = [t for t in vocab if not t.startswith("<|")] + ["<|startoftext|>", "<|endoftext|>"]
    ids = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT)


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=64,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=24,
    )


def clip_side(vision: CLIPVisionConfig) -> tuple[CLIPModel, CLIPTokenizer]:
    """A random CLIP whose vision side is as `vision` says, and its tokenizer."""
    tokenizer = _clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    model = CLIPModel(config).eval()
    randomise(model, seed=2)
    return model, tokenizer


def _llava(processor: LlavaProcessor, clip: CLIPModel) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=80,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=_vision_config(),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed=1)
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.eos_token_id, processor.image_token_id, tokenizer.pad_token_id]] = 0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model
