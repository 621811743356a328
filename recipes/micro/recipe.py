"""What the stages of the recipe hand on: tokenizers and weights from checkpoints, and a run begun from an asset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ivtp.errors import ConfigError
from ivtp.micro.model import build_decoder, carry_over, start_alike
from ivtp.micro.tokenizer import build_tokenizer
from ivtp.micro.world.chinese import CHINESE_WORDS
from recipes.micro.corpus import corpus
from recipes.micro.decoder import SymbolicImage
from recipes.micro.loop import is_distributed, load_checkpoint, rank, save_checkpoint
from recipes.micro.projector import Projector
from recipes.micro.vision_model import build_tokenizer as build_clip_tokenizer


@dataclass(frozen=True)
class Size:
    """Depth and width of the tower and of the decoder; the tower's heads (the decoder's are 64 wide)."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    layers: int
    width: int


SIZES = {
    "micro": Size(vision_layers=12, vision_width=192, vision_heads=3, layers=16, width=192),
    "tiny": Size(vision_layers=3, vision_width=48, vision_heads=3, layers=6, width=64),
}
"""``micro`` is what the library ships; ``tiny`` is for trying the recipe out."""


def tokenizer_in(out: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer of a run; it is trained once and then kept."""
    folder = out / "tokenizer"
    if not folder.is_dir() and rank() == 0:
        build_tokenizer(corpus()).save_pretrained(folder)
    if is_distributed():
        distributed.barrier()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if any(len(tokenizer(word, add_special_tokens=False).input_ids) > 1 for word in CHINESE_WORDS):
        raise ConfigError(f"the tokenizer in {folder} is of an older world; use another --out, or `unpack` an asset")
    return tokenizer


def decoder_from(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The decoder that a checkpoint of any stage holds."""
    weights = load_checkpoint(checkpoint)["decoder"]
    layers = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in weights if ".layers." in name)
    width = weights["lm_head.weight"].shape[1]
    decoder = build_decoder(tokenizer, layers=layers, width=width)
    decoder.load_state_dict(weights)
    return decoder


def projector_from(checkpoint: Path) -> Projector:
    """The projector that a checkpoint holds."""
    return Projector.from_weights(load_checkpoint(checkpoint)["projector"])


def symbolic_from(checkpoint: Path) -> SymbolicImage:
    """The symbolic embeddings that a decoder checkpoint holds."""
    weights = load_checkpoint(checkpoint)["symbolic"]
    symbolic = SymbolicImage(weights["tables.0.weight"].shape[1])
    symbolic.load_state_dict(weights)
    return symbolic


def unpack(asset: Path, out: Path) -> int:
    """Turns an exported folder into a run to go on from; returns how many tokens are new to its vocabulary.

    Where the world has learnt new words since, the tokens that both vocabularies know keep their embeddings.
    """
    if (out / "stage2.pt").exists():
        raise ConfigError(f"{out / 'stage2.pt'} exists; give another --out")
    processor, folder = AutoProcessor.from_pretrained(asset), out / "vision" / "clip"
    _unpack_clip(asset / "clip", folder)
    processor.image_processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(asset, dtype=torch.float32)
    tokenizer, old = tokenizer_in(out), processor.tokenizer
    state = {f"model.{k}": v for k, v in model.model.language_model.state_dict().items()}
    fresh = build_decoder(tokenizer, layers=1, width=state["model.embed_tokens.weight"].shape[1])
    words, unknown = carry_over(state["model.embed_tokens.weight"], old, fresh.model.embed_tokens.weight, tokenizer)
    start_alike(words, tokenizer, unknown)
    state["model.embed_tokens.weight"] = words
    state["lm_head.weight"], _ = carry_over(model.lm_head.weight, old, 0.1 * words, tokenizer)
    projector = Projector.from_weights(model.model.multi_modal_projector.state_dict())
    save_checkpoint(out / "stage2.pt", {"projector": projector.state_dict(), "decoder": state})
    return len(unknown)


def _unpack_clip(asset: Path, folder: Path) -> None:
    """The CLIP of an exported folder with the present tokenizer, in float32."""
    old, tokenizer = AutoTokenizer.from_pretrained(asset), build_clip_tokenizer()
    clip = CLIPModel.from_pretrained(asset, dtype=torch.float32)
    table = clip.text_model.embeddings.token_embedding
    fresh = table.weight.std() * torch.randn(len(tokenizer), table.weight.shape[1])
    words, _ = carry_over(table.weight, old, fresh, tokenizer)
    clip.text_model.embeddings.token_embedding = torch.nn.Embedding(len(words), words.shape[1], _weight=words)
    clip.config.text_config.vocab_size = len(tokenizer)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
