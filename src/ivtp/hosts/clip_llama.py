"""What families of a CLIP tower, a token-wise projector and a decoder with Llama's layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp.errors import InputError, LoadError, UnsupportedModelError
from ivtp.files.sidecar import SIDECAR
from ivtp.hosts.base import Host, openai_clip
from ivtp.plan import Geometry
from ivtp.stock import decoder_mask, kernel_name

_DECODERS = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")


class ClipLlamaHost(Host):
    """A CLIP tower of which one feature layer is read, LLaVA's projector, and a decoder with Llama's layers."""

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `LlavaConfig`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        vision, text = config.vision_config, config.text_config
        if vision.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"the vision tower is a {vision.model_type!r}; LLaVA with a clip_vision_model can be pruned"
            )
        feature = config.vision_feature_layer
        if not isinstance(feature, int) or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_layer={feature!r} with strategy {config.vision_feature_select_strategy!r} is not "
                'prunable; one feature layer with the strategy "default" is'
            )
        _check_decoder(text)
        layers = vision.num_hidden_layers
        heads = text.num_attention_heads
        return Geometry(
            name=str(getattr(config, "name_or_path", "") or "llava"),
            num_patches=(vision.image_size // vision.patch_size) ** 2,
            patch_size=vision.patch_size,
            vision_layers=feature if feature >= 0 else layers + 1 + feature,
            vision_depth=layers,
            vision_hidden=vision.hidden_size,
            vision_mlp=vision.intermediate_size,
            vision_heads=vision.num_attention_heads,
            vision_cls=1,
            text_layers=text.num_hidden_layers,
            text_hidden=text.hidden_size,
            text_mlp=text.intermediate_size,
            text_heads=heads,
            text_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            text_head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            text_mlp_matrices=3,
            vocab_size=text.vocab_size,
        )

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock LLaVA."""
        inner: Any = model
        self.model = model
        self.size = self.geometry(inner.config)
        self.multimodal = inner.model
        self.decoder = inner.model.language_model
        self.embedding = inner.get_input_embeddings()
        self.vision_tower = inner.model.vision_tower
        self.projector = inner.model.multi_modal_projector
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        self.vision_layers = tower.encoder.layers
        self._post_norm = tower.post_layernorm
        self.text_layers = self.decoder.layers  # type: ignore[assignment]  # nn.Module attributes are untyped
        self.image_token = inner.config.image_token_id

    def run_vision(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Run the CLIP tower; its pooler is the post layer norm of the last layer's CLS."""
        output = self.vision_tower(pixel_values, return_dict=True)
        return output.pooler_output, output.last_hidden_state

    def normalise(self, hidden: Tensor) -> Tensor:
        """CLIP's post layer norm."""
        return self._post_norm(hidden)  # type: ignore[no-any-return]

    def project(self, features: Tensor) -> Tensor:
        """LLaVA's two-layer projector."""
        return self.projector(features)  # type: ignore[no-any-return]

    def attention_of(self, where: str, layer: int) -> nn.Module:
        """`self_attn` in both towers."""
        layers = self.vision_layers if where == "vision" else self.text_layers
        return layers[layer].self_attn  # type: ignore[return-value]

    def attend(
        self, where: str, layer: Any, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Pre-norm attention with residual, as in CLIPEncoderLayer and LlamaDecoderLayer."""
        norm = layer.layer_norm1 if where == "vision" else layer.input_layernorm
        if args:  # CLIP hands its mask over by position
            kwargs["attention_mask"] = args[0]
        if bias is not None:  # the images of CLIP have no mask of their own
            kwargs["attention_mask"] = self._checked_bias(bias).to(hidden.dtype)
        attended, _ = layer.self_attn(hidden_states=norm(hidden), **kwargs)
        return hidden + attended  # type: ignore[no-any-return]

    def _checked_bias(self, bias: Tensor) -> Tensor:
        if "flash" in kernel_name(self.vision_tower.config):
            raise InputError(
                "FlashAttention cannot weigh merged tokens by their size; load the model with "
                'attn_implementation={"vision_config": "sdpa"}'
            )
        return bias

    def feed_forward(self, where: str, layer: Any, hidden: Tensor) -> Tensor:
        """Pre-norm MLP with residual."""
        norm = layer.layer_norm2 if where == "vision" else layer.post_attention_layernorm
        return hidden + layer.mlp(norm(hidden))  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`norm` in all decoders of the family."""
        return self.decoder.norm(hidden)  # type: ignore[no-any-return, operator]  # nn.Module attributes are untyped

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
    ) -> Any:
        """Transformers' own mask for the decoder's attention implementation; None where its kernel needs none.

        Raises `InputError` where a kernel without a mask is asked to hide something.
        """
        config: Any = self.decoder.config
        if visible is not None and "flash" in kernel_name(config):
            raise InputError(
                "FlashAttention cannot hide the answer from the pseudo CLS token; "
                'load the model with attn_implementation="sdpa" to train or draft with pruning'
            )
        return decoder_mask(config, hidden, valid, visible, cache)

    def check_call(self, inputs: dict[str, Any]) -> None:
        """The layer and strategy of the vision features are those of the config."""
        inner: Any = self.model
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, configured = inputs.get(name), getattr(inner.config, name)
            if given is not None and given != configured:
                raise InputError(
                    f"{name}={given!r} differs from the model's own ({configured!r}), which a pruned model reads; "
                    "set it in model.config before attaching"
                )

    def default_clip(self) -> str | None:
        """The folder that the checkpoint's `ivtp.json` names, else OpenAI's CLIP for a tower of its sizes."""
        folder, named = self._folder(), self._sidecar().get("clip")
        if folder and named:
            clip = folder / str(named)
            if not clip.is_dir():
                raise LoadError(
                    f"{clip}, which {SIDECAR} beside it names, does not exist; copy it there or pass clip=..."
                )
            return str(clip)
        return openai_clip(self.size, len(self.vision_layers))


def _check_decoder(text: Any) -> None:
    """Refuse decoders whose layers are not a Llama layer's maths: cut in two they would silently be wrong."""
    if text.model_type not in _DECODERS:
        raise UnsupportedModelError(
            f"the decoder is a {text.model_type!r}; decoders with Llama's layers can be pruned: {', '.join(_DECODERS)}"
        )
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"] * bool(window)):
        raise UnsupportedModelError(
            f"the decoder ({text.model_type}) has sliding-window layers, which do not see the whole prompt; "
            "a decoder with full attention in every layer can be pruned"
        )
