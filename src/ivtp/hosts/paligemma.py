"""PaliGemma: a SigLIP tower, one matrix as projector, and a Gemma that reads images and question in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from ivtp.errors import InputError
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import (
    IMAGE,
    PROMPTS,
    settle,
    settle_gemma,
    tiny_images,
    tiny_llama,
    tiny_siglip,
    tiny_tokenizer,
)
from ivtp.plan import Geometry
from ivtp.towers.siglip import SiglipTower, so400m

_STOCK = ("paligemma-3b-pt-224", "paligemma-3b-pt-448", "paligemma-3b-pt-896")
"""They end in the pixels of a side of what the tower reads."""
VOCABULARY = 257216
"""Of the released checkpoints."""
_DECODER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class PaliGemmaHost(LlavaLike):
    """`PaliGemmaForConditionalGeneration` with a SigLIP tower and a decoder with Llama's layers, such as Gemma.

    Images and question see each other in both directions, also what is left of them; the pseudo CLS token sees all and
    is seen by nothing. The mean over all patches, of their attention and of their features, stands for CLS.

    Refuses: a call without `token_type_ids`, which say what is read in both directions; FlashAttention; decoders with
    sliding-window layers; methods that need a CLS token or a text side; a new image behind the cache of earlier turns,
    which the stock model misplaces (with `repruning="turn"` the conversation is read in one pass).
    """

    name = "paligemma"
    model_class = "PaliGemmaForConditionalGeneration"
    stock: ClassVar[tuple[str, ...]] = _STOCK
    hub = "google/{}"
    gives = frozenset({"grid"})
    tower = SiglipTower
    settings = ()
    of_columns = ("token_type_ids",)
    both_ways = True
    writes_prompts = "PaliGemmaProcessor"

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A PaliGemma config, whatever its decoder; Gemma 2 makes another family of it."""
        return getattr(config, "model_type", None) == "paligemma" and config.text_config.model_type != "gemma2"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `PaliGemmaConfig`. Raises `UnsupportedModelError` for towers outside the family."""
        vision: dict[str, Any] = cls.tower.sizes(config.vision_config)
        text: dict[str, Any] = cls.decoder.sizes(config.text_config)
        name = str(getattr(config, "name_or_path", "") or cls.name)
        return Geometry(name, vision_layers=vision["vision_depth"], projector_matrices=1, **vision, **text)

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """PaliGemma of the given image size, with SigLIP-so400m/14 and Gemma 2B."""
        from transformers import GemmaConfig, PaliGemmaConfig

        text = GemmaConfig(
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
        )
        return PaliGemmaConfig(vision_config=so400m(int(name.rpartition("-")[2])), text_config=text)

    def project(self, features: Tensor) -> Tensor:
        """The post layer norm, and the only matrix."""
        return super().project(self.vision.normalise(features))

    def positions(self, inputs: dict[str, Any], ids: Tensor, mask: Tensor | None, past: int = 0) -> Tensor:
        """As they are given; without any the first token's is 1."""
        given = super().positions(inputs, ids, mask, past)
        return torch.arange(past + 1, past + 1 + ids.shape[1], device=ids.device)[None] if given is None else given

    def blocks(self, inputs: dict[str, Any]) -> Tensor:
        """One of the columns of type 0: all but a suffix to learn."""
        types, ids = inputs.get("token_type_ids"), inputs["input_ids"]
        if types is None or types.shape != ids.shape:
            raise InputError(
                f"{self.name} needs the token_type_ids (batch, tokens) that its processor makes: they say which tokens "
                "see each other in both directions; pass them with input_ids"
            )
        return (types == 0).long() - 1  # type: ignore[no-any-return]  # what a call holds is untyped

    @classmethod
    def process(cls, processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
        """As the stock processor makes them, one by one, without its labels, which name no column.

        It refuses a prompt without images, which is framed here as it frames the others.
        """
        tokenizer, made = processor.tokenizer, []
        for text, own in zip(texts, pictures, strict=True):
            if own:
                made.append(processor(images=[list(own)], text=[text], return_tensors="pt"))
            else:
                framed = f"{tokenizer.bos_token}{text}\n"
                made.append(tokenizer([framed], return_token_type_ids=True, return_tensors="pt"))
        columns = ("input_ids", "token_type_ids", "attention_mask")
        rows = {name: [one[name][0].tolist() for one in made] for name in columns}
        batch = BatchFeature(dict(tokenizer.pad(rows, return_tensors="pt")))
        pixels = [one["pixel_values"] for one in made if "pixel_values" in one]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """36 patches, 6 encoder and 8 decoder layers, one head of keys for all queries."""
        from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": 84, "width": 84}, image_seq_length=36)
        processor = PaliGemmaProcessor(images, tiny_tokenizer())
        tokenizer = processor.tokenizer
        decoder = {**tiny_llama(tokenizer).to_dict(), "head_dim": 16, "num_key_value_heads": 1}
        config = PaliGemmaConfig(
            vision_config=tiny_siglip(num_hidden_layers=6, image_size=84, patch_size=14),
            text_config=cls.tiny_decoder({name: decoder[name] for name in _DECODER}),
            image_token_index=processor.image_token_id,
            projection_dim=decoder["hidden_size"],
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            model: Any = settle(PaliGemmaForConditionalGeneration(config), tokenizer, seed)
        settle_gemma(model, model.model.language_model)
        return model, processor

    @classmethod
    def tiny_decoder(cls, sizes: dict[str, Any]) -> Any:
        """The config of its decoder."""
        from transformers import GemmaConfig

        return GemmaConfig(**sizes)

    @classmethod
    def tiny_inputs(
        cls,
        model: nn.Module,
        processor: Any,
        prompts: Sequence[tuple[str, Sequence[tuple[int, int]]]] = PROMPTS,
        seed: int = 0,
    ) -> dict[str, Any]:
        """As the base says; the processor writes the prompts."""
        any_model: Any = model
        texts = [f"{IMAGE * len(sizes)}{question}" for question, sizes in prompts]
        pictures = [tiny_images(question, sizes, seed) for question, sizes in prompts]
        return dict(cls.process(processor, texts, pictures).to(any_model.device))


HOST = PaliGemmaHost
