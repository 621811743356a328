"""The instruction inside a prompt: its text, its tokens, and what CLIP reads in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.checkpoint import LOADING, check_finite, read_checkpoint
from ivtp.core.relevance import Span
from ivtp.core.select import on_device
from ivtp.errors import ConfigError

_SENTINEL = "instruction-goes-here"


@dataclass(frozen=True)
class Instruction:
    """The user's text in one prompt: `columns[i]` of the prompt covers the characters `spans[i]` of `text`."""

    text: str
    columns: list[int]
    spans: list[Span]


class InstructionReader:
    """Finds the last user turn in token ids, by the role words of the processor's chat template."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(self.tokenizer, "decode") or not callable(self.tokenizer):
            raise ConfigError(
                f"{type(processor).__name__} reads no text; pass the model's processor (AutoProcessor) or its tokenizer"
            )
        self.before, self.behind = self._role_words(processor)

    def read(self, ids: Sequence[int], columns: Sequence[int]) -> Instruction:
        """The instruction in `ids`, the prompt's text tokens without image slots and padding, at `columns`."""
        text, spans = self._offsets(list(ids))
        stop = text.rfind(self.behind) if self.behind else -1
        stop = len(text) if stop < 0 else stop
        start = text.rfind(self.before, 0, stop) if self.before else -1
        start = 0 if start < 0 else start + len(self.before)
        special = set(self.tokenizer.all_special_ids)
        own = [i for i, (a, b) in enumerate(spans) if a < stop and b > start and ids[i] not in special]
        start = max([start, *(spans[i][0] for i in own[:1])])
        stop = min([stop, *(spans[i][1] for i in own[-1:])]) if own else start
        body = text[start:stop]
        start += len(body) - len(body.lstrip())
        body = body.strip()
        stop = start + len(body)
        inside = [i for i in own if spans[i][0] < stop and spans[i][1] > start]
        return Instruction(
            body,
            [columns[i] for i in inside],
            [(max(spans[i][0] - start, 0), min(spans[i][1], stop) - start) for i in inside],
        )

    def _role_words(self, processor: Any) -> tuple[str, str]:
        """What the chat template writes before and behind a user's text; empty strings without a template."""
        if not getattr(processor, "chat_template", None):
            return "", ""
        turn = [{"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}]
        written = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, _, behind = str(written).partition(_SENTINEL)
        # of a template that opens with a system prompt, only the role word next to the text marks the turn
        return self._as_decoded((before.strip().splitlines() or [""])[-1]), self._as_decoded(behind)

    def _as_decoded(self, text: str) -> str:
        """`text` as it looks in decoded prompts: some tokenizers lower-case, or normalise characters."""
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        return self._decode(list(ids)).strip()

    def _offsets(self, ids: list[int]) -> tuple[str, list[Span]]:
        """The text of `ids` and the characters of each token."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if getattr(self.tokenizer, "is_fast", False):
            again = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if list(again["input_ids"]) == ids:
                return text, [(a, b) for a, b in again["offset_mapping"]]
        return self._offsets_by_decoding(ids)

    def _offsets_by_decoding(self, ids: list[int]) -> tuple[str, list[Span]]:
        """Character spans where encoding the text does not give the same ids again: decode token by token."""
        text, spans = "", []
        for i in range(len(ids)):
            context = ids[max(0, i - 4) : i]
            known = self._decode(context)
            piece = self._decode([*context, ids[i]])[len(known) :]
            spans.append((len(text), len(text) + len(piece)))
            text += piece
        return text, spans

    def _decode(self, ids: list[int]) -> str:
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded).rstrip("�")  # an unfinished character belongs to the token that completes it


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
