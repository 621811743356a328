"""Decoders with Llama's layers: pre-norm, rotary positions, every layer sees the whole prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp.core.select import take
from ivtp.errors import InputError, UnsupportedModelError
from ivtp.stock import decoder_mask, kernel_name
from ivtp.towers.base import TextTower


class LlamaTower(TextTower):
    """A `LlamaModel`, or another decoder whose layers do the same sums in the same order."""

    kinds: ClassVar[tuple[str, ...]] = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
    """What their configs call themselves."""
    slides: ClassVar[bool] = False
    """Whether some layers may see a sliding window alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = module.layers  # type: ignore[assignment]  # nn.Module attributes are untyped

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """Of a decoder whose layers are a Llama layer's maths: any other, cut in two, would silently be wrong."""
        if config.model_type not in cls.kinds:
            raise UnsupportedModelError(
                f"the decoder is a {config.model_type!r}; decoders with Llama's layers can be pruned: "
                f"{', '.join(cls.kinds)}"
            )
        window = getattr(config, "sliding_window", None)
        kinds_of_layers = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window)
        if "sliding_attention" in kinds_of_layers and not cls.slides:
            raise UnsupportedModelError(
                f"the decoder ({config.model_type}) has sliding-window layers, which do not see the whole prompt; "
                "a decoder with full attention in every layer can be pruned"
            )
        heads = config.num_attention_heads
        return {
            "text_layers": config.num_hidden_layers,
            "text_hidden": config.hidden_size,
            "text_mlp": config.intermediate_size,
            "text_heads": heads,
            "text_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "text_head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "text_mlp_matrices": 3,
            "vocab_size": config.vocab_size,
        }

    def attention(self, layer: int) -> nn.Module:
        """`self_attn`."""
        return self.layers[layer].self_attn  # type: ignore[return-value]  # nn.Module attributes are untyped

    def attend(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in LlamaDecoderLayer."""
        block: Any = self.layers[layer]
        if args:
            kwargs["attention_mask"] = args[0]
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **kwargs)
        return hidden + attended  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in LlamaDecoderLayer."""
        block: Any = self.layers[layer]
        return hidden + block.mlp(block.post_attention_layernorm(hidden))  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`norm` in all of them."""
        return self.module.norm(hidden)  # type: ignore[no-any-return, operator]  # nn.Module attributes are untyped

    def cut_positions(self, kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """The cosines and sines of the rotary embedding."""
        return {"position_embeddings": tuple(take(part, index) for part in kwargs["position_embeddings"])}

    def turn_back(self, key: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Llama's turn of the halves of a head, which Phi-3 may leave some channels out of and stretch."""
        cos, sin = (part.float().unsqueeze(1) for part in turn)  # (B, 1, 1, d_turned)
        stretch = torch.hypot(cos, sin)
        turned, rest = key[..., : cos.shape[-1]].float(), key[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        back = (turned * cos - torch.cat([-second, first], dim=-1) * sin) / stretch
        return torch.cat([back.to(key.dtype), rest], dim=-1)

    def causal_mask(
        self,
        hidden: Tensor,
        valid: Tensor | None,
        visible: Callable[..., Tensor] | None = None,
        cache: Cache | None = None,
        blocks: Tensor | None = None,
    ) -> Any:
        """Transformers' own mask for the decoder's attention implementation; None where its kernel needs none."""
        config: Any = self.module.config
        if visible is not None and "flash" in kernel_name(config):
            raise InputError(
                "FlashAttention cannot hide the answer from the pseudo CLS token; "
                'load the model with attn_implementation="sdpa" to train or draft with pruning'
            )
        if blocks is not None and "flash" in kernel_name(config):
            raise InputError(
                "FlashAttention cannot let a prompt's tokens see each other in both directions and others not; "
                'load the model with attn_implementation="sdpa" to prune it'
            )
        return decoder_mask(config, hidden, valid, visible, cache, blocks)


class QwenTextTower(LlamaTower):
    """The decoder of Qwen2-VL and its successors: Llama's layers, whose turns mix positions on three axes."""

    kinds = ("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text")
