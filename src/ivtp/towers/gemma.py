"""Decoders of Gemma 2 and 3: norms before and behind each half of a layer, and layers with a sliding window."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ivtp.errors import UnsupportedModelError
from ivtp.stock import heeds_softcap
from ivtp.towers.llama import LlamaTower


class Gemma2Tower(LlamaTower):
    """A `Gemma2Model`, within its sliding window: there all layers see all that they are shown."""

    kinds = ("gemma2",)
    slides = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        config: Any = module.config
        self.window = config.sliding_window if "sliding_attention" in config.layer_types else None

    @property
    def softcap(self) -> float | None:
        """Of the config, where the kernel heeds it."""
        config: Any = self.module.config
        return config.attn_logit_softcapping if heeds_softcap(config) else None

    def attend(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in Gemma2DecoderLayer."""
        block: Any = self.layers[layer]
        if args:
            kwargs["attention_mask"] = args[0]
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **kwargs)
        return hidden + block.post_attention_layernorm(attended)  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in Gemma2DecoderLayer."""
        block: Any = self.layers[layer]
        fed = block.mlp(block.pre_feedforward_layernorm(hidden))
        return hidden + block.post_feedforward_layernorm(fed)  # type: ignore[no-any-return]


class Gemma3Tower(Gemma2Tower):
    """A `Gemma3TextModel`, within its sliding window: layers that slide turn their tokens by other angles."""

    kinds = ("gemma3_text",)

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """Of a decoder whose text is read in one direction."""
        if getattr(config, "use_bidirectional_attention", None):
            raise UnsupportedModelError(
                "the decoder reads its text in both directions (use_bidirectional_attention), to embed it; one that "
                "answers, with use_bidirectional_attention=False, can be pruned"
            )
        return super().sizes(config)

    @property
    def softcap(self) -> None:
        """No layer of Gemma 3 caps its logits."""
        return None

    def rotary(self, layer: int) -> int:
        """1 where a layer slides."""
        return int(self._type(layer) == "sliding_attention")

    def positions(self, layer: int, hidden: Tensor, position: Tensor) -> dict[str, Any]:
        """The cosines and sines of the layer's own rotary embedding."""
        module: Any = self.module
        return {"position_embeddings": module.rotary_emb(hidden, position, self._type(layer))}

    def _type(self, layer: int) -> str:
        config: Any = self.module.config
        return str(config.layer_types[layer])
