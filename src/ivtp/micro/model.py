"""The micro model's shape, and its assembly into a stock LLaVA checkpoint with processor and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from ivtp.micro import world
from ivtp.micro.tokenizer import IMAGE
from ivtp.micro.world.chinese import COLOURS_ZH, NAMES_ZH, POSITIONS_ZH
from ivtp.micro.world.vocabulary import plural

WIDTH = 192
ROPE_THETA = 1e6
"""Slow enough that half of a head's dimensions can match content across an image's 576 positions."""
LLM_LAYERS_PRUNED = 6
"""W: the paper prunes in 12 of 32 decoder layers, so 6 of 16 here."""
GROUP_LAYERS = 3

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""LLaVA-1.5's system prompt. Every other batch is trained with it, so that the model answers with and without."""

# LLaVA-1.5's prompt: the images of a turn first, then its text, "USER: <image>\nQUESTION ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def decoder_config(tokenizer: PreTrainedTokenizerBase, *, layers: int = 16, width: int = WIDTH) -> LlamaConfig:
    """A small Llama: heads of 64, gated feed-forward of twice the width, untied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def build_decoder(tokenizer: PreTrainedTokenizerBase, *, layers: int = 16, width: int = WIDTH) -> LlamaForCausalLM:
    """A freshly initialised decoder; what a layer adds to the residual stream starts small."""
    decoder = LlamaForCausalLM(decoder_config(tokenizer, layers=layers, width=width))
    words = decoder.model.embed_tokens.weight
    nn.init.normal_(words, std=0.6)
    with torch.no_grad():
        start_alike(words, tokenizer, set(range(len(words))))
        decoder.lm_head.weight.copy_(0.1 * words)
    for layer in decoder.model.layers:
        _init_layer(layer, width, layers)
    return decoder


@torch.no_grad()
def start_alike(words: Tensor, tokenizer: PreTrainedTokenizerBase, fresh: set[int]) -> None:
    """Lets the embeddings of fresh tokens begin near a word of the same meaning: plurals, and Chinese words."""
    pairs = [(" " + name, " " + plural(name)) for name in world.NAMES]
    for table in (NAMES_ZH, COLOURS_ZH, POSITIONS_ZH):
        pairs += [(" " + english, chinese) for english, chinese in table.items()]
    for known, new in pairs:
        one, many = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (known, new))
        if many in fresh:
            words[many] = words[one] + 0.5 * words[many]


@torch.no_grad()
def carry_over(
    rows: Tensor, old: PreTrainedTokenizerBase, fresh: Tensor, new: PreTrainedTokenizerBase
) -> tuple[Tensor, set[int]]:
    """Rows (V, C) of one vocabulary for another: ``fresh`` (V', C) where a token is new, and which tokens are."""
    known, carried = old.get_vocab(), fresh.clone()
    unknown = set()
    for token, place in new.get_vocab().items():
        if token in known:
            carried[place] = rows[known[token]]
        else:
            unknown.add(place)
    return carried, unknown


def _init_layer(layer: Any, width: int, layers: int) -> None:
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=width**-0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                with torch.no_grad():
                    parameter.mul_((2 * layers) ** -0.5)
    _match_alike(layer.self_attn)


@torch.no_grad()
def _match_alike(attention: Any) -> None:
    """Lets the first head begin by attending to tokens like its own: its keys start equal to its queries.

    Only dimensions that rotate by less than a radian over an image's width in positions can match at that distance;
    the others start small. Finding the patch that a word names is then a matter of tuning, not of discovery.
    """
    d = attention.head_dim
    turn = ROPE_THETA ** (-(torch.arange(d) % (d // 2)) / (d // 2))  # radians a position, half-split layout
    query = attention.q_proj.weight[:d]
    query[turn * 600 > 1] *= 0.3
    attention.k_proj.weight[:d] = query


def assemble(
    decoder: LlamaForCausalLM, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, projector: Mapping[str, Tensor]
) -> LlavaForConditionalGeneration:
    """A stock LLaVA-1.5 of the decoder, CLIP's vision tower, whose second-to-last layer is read, and a projector."""
    vision = clip.config.vision_config
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector)
    _load_tower(model.model.vision_tower, clip)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model.eval()


def _load_tower(tower: nn.Module, clip: CLIPModel) -> None:
    """Copies CLIP's vision weights; the prefix ``vision_model.`` came and went between transformers releases."""
    state = {k.removeprefix("vision_model."): v for k, v in clip.vision_model.state_dict().items()}
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in tower.state_dict()) else ""
    tower.load_state_dict({prefix + k: v for k, v in state.items()})


def build_processor(tokenizer: PreTrainedTokenizerBase, image_processor: CLIPImageProcessor) -> LlavaProcessor:
    """LLaVA's processor: image and prompt in, model inputs out; it carries the chat template."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def save_asset(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    clip: CLIPModel,
    clip_tokenizer: PreTrainedTokenizerBase,
    *,
    threshold: float,
) -> None:
    """Writes the embedded model: bfloat16 shards under 16 MB, processor, CLIP side, recommended pruning options."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.safetensors*"), *folder.glob("clip/*.safetensors*")):
        old.unlink()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="15MB")
    processor.save_pretrained(folder)
    clip.to(torch.bfloat16).save_pretrained(folder / "clip", max_shard_size="15MB")
    clip_tokenizer.save_pretrained(folder / "clip")
    options = {
        "llm_layers": LLM_LAYERS_PRUNED,
        "group_layers": GROUP_LAYERS,
        "threshold": round(threshold, 4),
        "clip": "clip",
    }
    (folder / "ivtp.json").write_text(json.dumps(options, indent=2) + "\n")
    for file in folder.rglob("tokenizer.json"):  # more than half of it is indentation, and the asset is to stay small
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))
