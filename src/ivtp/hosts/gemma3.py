"""Gemma 3: a SigLIP tower, a projector that averages squares of patches, and images that see themselves both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.errors import InputError, UnsupportedModelError
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, settle_gemma, tiny_siglip, tiny_tokenizer
from ivtp.plan import Geometry
from ivtp.towers.gemma import Gemma3Tower
from ivtp.towers.siglip import SiglipSquaresTower, SiglipTower, so400m

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "query_pre_attn_scalar"),
)
_STOCK = {
    "gemma-3-4b-it": (2560, 10240, 34, 8, 4, 256, 256),
    "gemma-3-12b-it": (3840, 15360, 48, 16, 8, 256, 256),
    "gemma-3-27b-it": (5376, 21504, 62, 32, 16, 128, 168),
}
_BEGIN, _END = "<start_of_image>", "<end_of_image>"


class Gemma3Host(LlavaLike):
    """`Gemma3ForConditionalGeneration` with a SigLIP tower; pan-and-scan crops are images like any other.

    What is cut are visual tokens: the projector averages 4 x 4 patches of the encoder into one, and they leave
    together, by the sum of the attention that they receive. What is left of an image sees itself in both directions, as
    `token_type_ids` say. The mean over all patches, of their attention and of their features, stands for CLS. Prompt
    and answer have to fit in the sliding window of the decoder's layers (1024 tokens in the released checkpoints).

    Refuses: prompts and answers beyond the sliding window; decoders that read text in both directions; FlashAttention;
    methods that need a CLS token or a text side, or merge in the encoder; `ivtp train`, whose batches say no types.
    """

    name = "gemma3"
    model_class = "Gemma3ForConditionalGeneration"
    stock = tuple(_STOCK)
    hub = "google/{}"
    gives = frozenset({"grid"})
    tower = SiglipTower
    decoder = Gemma3Tower
    settings = ()
    of_columns = ("token_type_ids",)
    writes = ("Here is the original image", "and here are some crops to help you see better")

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A Gemma 3 config with a vision tower."""
        return getattr(config, "model_type", None) == "gemma3"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `Gemma3Config`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        vision: dict[str, Any] = cls.tower.sizes(config.vision_config)
        text: dict[str, Any] = cls.decoder.sizes(config.text_config)
        tokens, patches = config.mm_tokens_per_image, vision["num_patches"]
        if math.isqrt(tokens) ** 2 != tokens or math.isqrt(patches) % math.isqrt(tokens):
            raise UnsupportedModelError(
                f"mm_tokens_per_image={tokens} is not prunable with {patches} patches; as many as there are whole "
                "squares of patches in an image, such as 256 of 4096, are"
            )
        return Geometry(
            str(getattr(config, "name_or_path", "") or cls.name),
            vision_layers=vision["vision_depth"],
            projector_matrices=1,
            projector_averages=True,
            unit=patches // tokens,
            marks=4,  # a blank line and a mark on either side
            **{**vision, "num_patches": tokens},
            **text,
        )

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Gemma 3 of the given size, with SigLIP-so400m/14 at 896 pixels."""
        from transformers import Gemma3Config, Gemma3TextConfig

        decoder = dict(zip(_SIZES, _STOCK[name], strict=True))
        rotary = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
        text = Gemma3TextConfig(**decoder, vocab_size=262208, sliding_window=1024, rope_parameters=rotary)
        return Gemma3Config(vision_config=so400m(896), text_config=text)

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock Gemma 3."""
        super().__init__(model)
        inner: Any = model
        self.vision = SiglipSquaresTower(inner.model.vision_tower, math.isqrt(self.size.unit))

    def project(self, features: Tensor) -> Tensor:
        """The post layer norm, the mean of each square, a norm, and the only matrix."""
        inner: Any = self._projector
        normed = self.vision.normalise(features)
        mean = normed.view(len(normed), -1, self.size.unit, normed.shape[2]).mean(dim=2)
        projected: Tensor = inner.mm_soft_emb_norm(mean) @ inner.mm_input_projection_weight
        return projected.type_as(features)

    def columns(self, ids: Tensor) -> dict[str, Tensor]:
        """Type 1 in the slots."""
        return {"token_type_ids": (ids == self.image_token).long()}

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        """A block for each run of columns of type 1; without types images are read as text is, as the model does."""
        types, ids = inputs.get("token_type_ids"), inputs["input_ids"]
        if types is None:
            return None
        if types.shape != ids.shape:
            raise InputError(
                f"token_type_ids of shape {tuple(types.shape)} do not say which of the input_ids {tuple(ids.shape)} "
                "are of an image; pass both as the processor makes them"
            )
        shown = types == 1
        begins = shown & ~nn.functional.pad(shown, (1, 0))[:, :-1]
        return torch.where(shown, begins.cumsum(dim=1) - 1, -1)

    @classmethod
    def process(cls, processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
        """As the stock processor makes them, which is told of prompts without images too."""
        own = [list(some) for some in pictures]
        several = len(texts) > 1
        return processor(images=own if any(own) else None, text=list(texts), padding=several, return_tensors="pt")

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """25 tokens made of 400 patches, 5 encoder and 8 decoder layers, of which every third sees all."""
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, Gemma3TextConfig
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        tokenizer = tiny_tokenizer(boi_token=_BEGIN, eoi_token=_END, blank_line="\n\n")  # one token, as in Gemma's
        processor = Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 80, "width": 80}),
            tokenizer,
            chat_template=CHAT_TEMPLATE.replace(IMAGE, _BEGIN),
            image_seq_length=25,
        )
        rotary = {
            "full_attention": {"rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        text = Gemma3TextConfig(
            **dict(zip(_SIZES, (48, 96, 8, 4, 2, 16, 4), strict=True)),
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            sliding_window=1024,
            layer_types=[f"{'full' if layer % 3 == 2 else 'sliding'}_attention" for layer in range(8)],
            rope_parameters=rotary,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
        config = Gemma3Config(
            vision_config=tiny_siglip(num_hidden_layers=5, image_size=80, patch_size=4),
            text_config=text,
            mm_tokens_per_image=25,
            image_token_index=tokenizer.image_token_id,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            model: Any = settle(Gemma3ForConditionalGeneration(config), tokenizer, seed)
        settle_gemma(model, model.model.language_model, model.model.multi_modal_projector)
        return model, processor


HOST = Gemma3Host
