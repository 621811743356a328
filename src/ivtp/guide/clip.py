"""CLIP's text side, which relates words to the vision tower of a host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.core.characters import Span
from ivtp.core.select import on_device
from ivtp.errors import ConfigError
from ivtp.files.checkpoint import LOADING, check_finite, read_checkpoint


@dataclass(frozen=True)
class ClipText:
    """The parts of a CLIP model that relate text to the vision tower of a host."""

    text_model: nn.Module
    text_projection: nn.Linear
    visual_projection: nn.Linear
    tokenizer: Any
    context: int
    """Tokens that the text tower reads at once, BOS and EOS included."""

    @classmethod
    def load(cls, source: Any, *, vision_hidden: int, device: torch.device, dtype: torch.dtype) -> ClipText:
        """From `(CLIPModel, tokenizer)`, a folder or a hub id; what is loaded here goes to `device` and `dtype`.

        The last two text sides that were loaded stay in memory (CLIP-L's takes 0.25 GB in 16 bits) and serve again
        for the same source, device and dtype, whatever happens to their files meanwhile. Raises `LoadError` where
        there is no such model and `ConfigError` where it belongs to another vision tower.
        """
        if isinstance(source, str | Path):
            folder = Path(source)
            with LOADING:  # a second thread waits, and finds what the first one has loaded
                side = _load_clip(str(folder.resolve() if folder.is_dir() else source), device, dtype)
        else:
            side = cls.of(*_check_pair(source))
        if side.visual_projection.in_features != vision_hidden:
            raise ConfigError(
                f"the CLIP model reads vision features of width {side.visual_projection.in_features}, this model's "
                f"tower has {vision_hidden}; pass the CLIP model that the tower was taken from as clip=..."
            )
        return side

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> ClipText:
        """The parts of a `CLIPModel`; its vision tower is not held on to."""
        context = model.config.text_config.max_position_embeddings
        return cls(model.text_model, model.text_projection, model.visual_projection, tokenizer, context)

    def encode(self, text: str) -> tuple[Tensor, Tensor, list[Span]]:
        """Per-token projections (n, P), sentence projection (P,) and character spans of `text`.

        Texts beyond the context are read in consecutive windows; the sentence is the mean over the windows. BOS, EOS
        and padding are not among the n tokens.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(encoded["input_ids"]), [(a, b) for a, b in encoded["offset_mapping"]]
        body = self.context - 2
        windows = [ids[i : i + body] for i in range(0, len(ids), body)] or [[]]
        width = max(map(len, windows)) + 2
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        device = self.text_projection.weight.device
        rows = on_device([[bos, *w, eos] + [eos] * (width - 2 - len(w)) for w in windows], device)
        # what follows the EOS is never seen by a token before it: the tower is causal
        output = self.text_model(input_ids=rows)
        projected = self.text_projection(output.last_hidden_state)  # (windows, width, P)
        tokens = torch.cat([projected[i, 1 : 1 + len(w)] for i, w in enumerate(windows)])
        ends = torch.stack([projected[i, 1 + len(w)] for i, w in enumerate(windows)])
        return tokens, ends.mean(dim=0), spans

    def image(self, pooled: Tensor) -> Tensor:
        """Visual projection (I, P) of post-normalised CLS outputs (I, D)."""
        weight = self.visual_projection.weight
        projected: Tensor = self.visual_projection(pooled.to(weight.device, weight.dtype))
        return projected

    def to_vision(self, sentence: Tensor) -> Tensor:
        """The shortest vision feature (D,) whose visual projection is `sentence` (P,)."""
        feature: Tensor = torch.linalg.pinv(self.visual_projection.weight.float()) @ sentence.float()
        return feature


def _check_pair(source: Any) -> tuple[Any, Any]:
    parts = source if isinstance(source, tuple) else ()
    if len(parts) == 2 and hasattr(parts[0], "visual_projection") and hasattr(parts[0], "text_projection"):
        return parts
    raise ConfigError(
        f"clip={type(source).__name__} is no CLIP text side; pass (CLIPModel, its tokenizer), a folder or a hub id"
    )


@lru_cache(maxsize=2)
def _load_clip(source: str, device: torch.device, dtype: torch.dtype) -> ClipText:
    from transformers import AutoTokenizer, CLIPModel

    parts = ("text_model", "text_projection", "visual_projection")  # what is read; the rest may be anything

    def read(path: str) -> ClipText:
        model, report = CLIPModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if any(key.startswith(parts) for key in report["missing_keys"]):
            raise ValueError("it has no CLIP text side")
        check_finite((name, weight) for name, weight in model.named_parameters() if name.startswith(parts))
        model = model.to(device).eval().requires_grad_(False)  # whoever trains beside it, it is everyone's
        return ClipText.of(model, AutoTokenizer.from_pretrained(path))

    advice = 'pass clip=(model, tokenizer), a folder or a hub id, or use a guide without CLIP: "visual" or "text"'
    return read_checkpoint(source, read, what="the CLIP text side", advice=advice)
