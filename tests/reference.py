"""The method once more, slowly: one sample at a time, full attention matrices in float64, straight from the equations.

Nothing is shared with the library but `PruneConfig` and the trace that is checked. Left padding does not exist here:
each sample runs alone and unpadded, so a comparison also checks that padding changes nothing.
"""

from __future__ import annotations

import copy
import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ivtp import PruneConfig, PruneTrace

Span = tuple[int, int]
PAPER = {
    "group_layers": 3,
    "llm_layers": 12,
    "threshold": 0.2,
    "aggregation": "residual",
    "guide": "instruction",
    "stages": "both",
}
"""The paper's options, where a config says nothing else."""


@dataclass(frozen=True)
class Prompt:
    """One unpadded sample. `instruction` maps token positions to character spans inside `text`."""

    ids: Tensor  # (T,) with N placeholders for every image
    pixels: Tensor  # (images, 3, H, W)
    text: str
    instruction: dict[int, Span]
    answer: int | None = None
    """In training: the first token of the answer, which the pseudo CLS token must not see."""


@dataclass
class Cut:
    """One cut of one sample. Scores belong to `candidates`; image m counts from m * N."""

    where: str
    layer: int
    candidates: list[int]
    scores: list[float]
    kept: list[int]


@dataclass
class Result:
    """What the reference saw."""

    cuts: list[Cut] = field(default_factory=list)
    words: list[tuple[str, float, bool]] = field(default_factory=list)
    """Every word of the instruction, its relevance, and whether one of its tokens is in the guide."""
    relevance: dict[int, float] = field(default_factory=dict)
    """c_i of every instruction token that belongs to a word."""
    guide: Tensor | None = None
    fallback: bool = False
    cache: list[int] = field(default_factory=list)
    """Tokens that the cache holds after the prefill, a number for each decoder layer."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """(surviving prompt tokens + later tokens, vocabulary)."""
    later: Tensor = field(default_factory=lambda: torch.empty(0))
    """(1 + later tokens, vocabulary): the prediction behind the prompt and behind each later token."""
    survivors: list[int] = field(default_factory=list)
    """Unpruned sequence indices of the prompt tokens behind the last layer."""

    def kept(self, where: str) -> list[int]:
        return [c for c in self.cuts if c.where == where][-1].kept


def prompt_of(processor: Any, prompt: str, question: str, images: Sequence[Any], num_patches: int) -> Prompt:
    """Ids, pixels and the instruction's tokens: those whose span overlaps the last occurrence of the question."""
    image_token = processor.image_token
    expanded = prompt.replace(image_token, image_token * num_patches)
    encoded = processor.tokenizer(expanded, return_offsets_mapping=True)
    text = question.strip()
    start = expanded.rfind(text)
    end = start + len(text)
    tokens = {
        i: (max(a, start) - start, min(b, end) - start)
        for i, (a, b) in enumerate(encoded["offset_mapping"])
        if text and a < end and b > start
    }
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"] if images else torch.empty(0)
    return Prompt(torch.tensor(encoded["input_ids"]), pixels, text, tokens)


def prompt_of_ids(ids: Tensor, pixels: Tensor, image_id: int) -> Prompt:
    """Without a processor the instruction is every token behind the last image."""
    last = int((ids == image_id).nonzero().max())
    return Prompt(ids, pixels, "", dict.fromkeys(range(last + 1, len(ids)), (0, 0)))


class Reference:
    """IVTP on a LLaVA. `clip` is (CLIPModel, tokenizer); weights and hidden states are `dtype`, all else float64.

    Of a SigLIP tower the mean of all rows and of all patches stands for CLS; `clip` is None then.
    """

    both_ways = False
    """Whether a prompt's tokens see each other whatever their order; the pseudo CLS token and an answer are none."""

    def __init__(
        self,
        model: nn.Module,
        clip: tuple[Any, Any] | None,
        config: PruneConfig,
        trainable: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(trainable)
        if clip is not None:
            self.clip, self.clip_tokenizer = copy.deepcopy(clip[0]).to(dtype).requires_grad_(False), clip[1]
        self.config = config
        self.options = options = SimpleNamespace(**{**PAPER, **config.options})
        self.tower = self.model.model.vision_tower
        self.decoder = self.model.model.language_model
        self.num_patches = self._count()

        depth = self.tower.config.num_hidden_layers + 1 + self.model.config.vision_feature_layer
        vision = _groups(depth, options.group_layers) if options.stages != "llm" else []
        llm = _groups(options.llm_layers, options.group_layers) if options.stages != "vision" else []
        total = len(vision) + len(llm)
        counts = list(config.schedule or _uniform(self.num_patches, config.tokens(self.num_patches), total))
        if len(counts) == 2 != total:
            middle, final = counts
            counts = [*_uniform(self.num_patches, middle, len(vision)), *_uniform(middle, final, len(llm))]
        assert len(counts) == total
        self.depth = depth
        self.vision_groups = list(zip(vision, counts[: len(vision)], strict=True))
        self.llm_groups = list(zip(llm, counts[len(vision) :], strict=True))

    def mutual(self, columns: list[int]) -> Tensor:
        """(n, n) bool: which of these columns of a prompt see each other whatever their order."""
        return torch.full((len(columns), len(columns)), self.both_ways)

    def bend(self, logits: Tensor) -> Tensor:
        """What a decoder does to its logits before they are masked."""
        return logits

    def run(self, prompt: Prompt, later: Sequence[int] = ()) -> Result:
        """Prefill of `prompt`, then all `later` tokens at once against what the cache mode lets them see."""
        result = Result()
        images = [self._encode(pixels) for pixels in prompt.pixels]
        for g, (group, _) in enumerate(self.vision_groups if images else []):
            parts = [image.cuts[g] for image in images]
            shift = [m * self.num_patches for m in range(len(parts))]
            result.cuts.append(
                Cut(
                    "vision",
                    group[-1],
                    [i + s for part, s in zip(parts, shift, strict=True) for i in part.candidates],
                    [x for part in parts for x in part.scores],
                    [i + s for part, s in zip(parts, shift, strict=True) for i in part.kept],
                )
            )
        guide = None
        if self.llm_groups and images:
            guide = self._guide(prompt, images, result).detach()
        result.guide = guide

        sequence = self._sequence(prompt, images)
        cuts: dict[int, set[int]] = {}
        if guide is not None:
            cuts = self._decide(sequence, guide, result, prompt.answer)
        prompt_rows = [i for i in sequence.index if prompt.answer is None or i < prompt.answer]
        self._answer(sequence, cuts, list(later), result, self.mutual(prompt_rows))
        return result

    # Stage 1

    def _count(self) -> int:
        """Visual tokens of one image."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    def _encode(self, pixels: Tensor) -> _Image:
        """One image through the tower, pruned group by group."""
        tower = self.tower
        first = int(hasattr(tower.embeddings, "class_embedding"))
        x = tower.embeddings(pixels[None].to(self.dtype))[0]  # (1 + N, D), or (N, D) without CLS
        x = tower.pre_layrnorm(x) if first else x
        patches = list(range(self.num_patches))
        cuts: list[Cut] = []
        maps: list[Tensor] = []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(tower.encoder.layers):
            if index == self.depth:
                features = x
            x, attention, values = _vision_attention(layer, x)
            maps.append(attention)
            if index in ends:
                rows = rollout(maps, self.options.aggregation)
                scores = importance(rows[0, 1:] if first else rows.mean(0), values[first:])
                chosen = select(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                x = x[[*range(first), *[first + i for i in chosen]]]
                patches, maps = kept, []
            x = x + layer.mlp(layer.layer_norm2(x))
        if self.depth == len(tower.encoder.layers):
            features = x
        pooled = self.clip.visual_projection(tower.post_layernorm(x[0])) if first else None
        project = self.model.model.multi_modal_projector
        cls = features[0] if first else features.mean(0)
        return _Image(patches, project(features[first:]), cls, project(cls), pooled, cuts)

    # The pseudo CLS token

    def _guide(self, prompt: Prompt, images: list[_Image], result: Result) -> Tensor:
        guide = self.options.guide
        visual = torch.stack([image.projected_cls for image in images]).mean(0)
        embed = self.decoder.embed_tokens.weight
        if guide == "visual":
            return visual
        if guide == "text":
            if not prompt.instruction:
                result.fallback = True
                return visual
            return embed[prompt.ids[list(prompt.instruction)]].mean(0)
        if guide == "clip":
            sentence = torch.stack([pooled for _, _, pooled in self._text_windows(prompt.text)]).mean(0)
            mapped = torch.linalg.pinv(self.clip.visual_projection.weight) @ sentence
            size = torch.stack([image.feature_cls.norm() for image in images]).mean()
            return self.model.model.multi_modal_projector(mapped / mapped.norm() * size)

        weights = self._relevance(prompt, images, result)
        if not any(weights.values()):
            result.fallback = True
            return visual
        rows = torch.stack([w * embed[prompt.ids[i]] for i, w in weights.items()])
        return rows.sum(0) / sum(weights.values())

    def _relevance(self, prompt: Prompt, images: list[_Image], result: Result) -> dict[int, float]:
        """Eq. 5 and 6, into `result`. Returns each token's weight in the guide.

        Over several images a word (and a token) counts as the image that it fits best.
        """
        tokens: list[tuple[Span, list[float]]] = []
        for spans, projected, _ in self._text_windows(prompt.text):
            for span, t in zip(spans, projected, strict=True):
                tokens.append((span, [cosine_similarity(t, image.clip_cls, dim=0).item() for image in images]))

        def mean(chosen: list[list[float]]) -> float:
            return max(sum(column) / len(chosen) for column in zip(*chosen, strict=True))

        weights: dict[int, float] = {}
        words = split_words(prompt.text)
        joined: set[Span] = set()
        for position, span in prompt.instruction.items():
            own = [word for word in words if _overlap(word, span)]
            hits = [value for s, value in tokens if any(_overlap(s, word) for word in own)]
            if hits:
                c = result.relevance[position] = mean(hits)
                passes = float(c > self.options.threshold)
                weights[position] = passes if self.options.guide == "instruction" else max(c, 0.0)
                joined.update(own if weights[position] else [])
        for word in words:
            hits = [value for span, value in tokens if _overlap(span, word)]
            if hits:
                result.words.append((prompt.text[slice(*word)], mean(hits), word in joined))
        return weights

    def _text_windows(self, text: str) -> list[tuple[list[Span], Tensor, Tensor]]:
        """For each window: the spans of its tokens, their projected outputs, the projected sentence embedding."""
        tokenizer, tower = self.clip_tokenizer, self.clip.text_model
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, truncation=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        size = tower.config.max_position_embeddings - 2
        windows = []
        for start in range(0, max(len(ids), 1), size):
            window = [tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id]
            x = (
                tower.embeddings.token_embedding.weight[window]
                + tower.embeddings.position_embedding.weight[: len(window)]
            )
            for layer in tower.encoder.layers:
                x, _, _ = _vision_attention(layer, x, causal=True)
                x = x + layer.mlp(layer.layer_norm2(x))
            projected = self.clip.text_projection(tower.final_layer_norm(x))
            windows.append((spans[start : start + size], projected[1:-1], projected[-1]))
        return windows

    # Stage 2

    def _sequence(self, prompt: Prompt, images: list[_Image]) -> _Sequence:
        """The prompt behind stage 1: unpruned index, patch (-1 for text) and embedding of every token."""
        image_id = self.model.config.image_token_id
        slots = (prompt.ids == image_id).nonzero().flatten().tolist()
        assert len(slots) == len(images) * self.num_patches
        features: dict[int, tuple[int, Tensor]] = {}
        for m, image in enumerate(images):
            for patch, feature in zip(image.patches, image.features, strict=True):
                features[slots[m * self.num_patches + patch]] = (m * self.num_patches + patch, feature)
        index, patch, rows = [], [], []
        for i, token in enumerate(prompt.ids.tolist()):
            if token != image_id:
                index.append(i)
                patch.append(-1)
                rows.append(self.decoder.embed_tokens.weight[token])
            elif i in features:
                index.append(i)
                patch.append(features[i][0])
                rows.append(features[i][1])
        original = self.config.positions == "original"
        positions = list(index) if original else list(range(len(index)))
        following = len(prompt.ids) if original else len(index)
        return _Sequence(index, patch, positions, following, torch.stack(rows), len(images))

    def _decide(self, sequence: _Sequence, guide: Tensor, result: Result, answer: int | None) -> dict[int, set[int]]:
        """Layers 1..W with the pseudo CLS token last. Returns, for each cut layer, the sequence rows that stay."""
        rows = [row for row, i in enumerate(sequence.index) if answer is None or i < answer]
        hidden = set(range(len(rows), len(sequence.index)))
        positions = [*sequence.positions, sequence.following][: len(rows) + 1]
        x = torch.cat([sequence.embeddings[: len(rows)], guide[None]])
        ends = {group[-1]: k for group, k in self.llm_groups}
        maps: list[Tensor] = []
        cuts: dict[int, set[int]] = {}
        for index, layer in enumerate(self.decoder.layers[: self.options.llm_layers]):
            allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril()
            allowed[:-1, :-1] |= self.mutual([sequence.index[row] for row in rows])
            x, attention, values = self._decoder_attention(layer, x, positions, allowed)
            maps.append(attention)
            if index in ends:
                visual = [j for j, row in enumerate(rows) if sequence.patch[row] >= 0]
                scores = importance(rollout(maps, self.options.aggregation)[-1, visual], values[visual])
                patches = [sequence.patch[rows[j]] for j in visual]
                chosen = {visual[i] for i in self._select(scores, patches, ends[index])}
                candidates = [sequence.patch[rows[j]] for j in visual]
                stay = [j for j, row in enumerate(rows) if sequence.patch[row] < 0 or j in chosen]
                kept = [sequence.patch[rows[j]] for j in stay if j in chosen]
                result.cuts.append(Cut("llm", index, candidates, scores.tolist(), kept))
                x = x[[*stay, -1]]
                positions = [positions[j] for j in [*stay, -1]]
                rows, maps = [rows[j] for j in stay], []
                cuts[index] = set(rows) | hidden
            x = x + layer.mlp(self._norm(layer.post_attention_layernorm, x))
            x = self._behind(index, x, [*(sequence.patch[row] for row in rows), -1])
        return cuts

    def _behind(self, index: int, x: Tensor, patches: list[int]) -> Tensor:
        """What the next layer of the decoder reads of one's output (T, D), of so many `patches`, -1 for text."""
        return x

    def _select(self, scores: Tensor, patches: list[int], keep: int) -> list[int]:
        """Places among `patches` of those that stay: `keep` of each image, or that many times the images of all."""
        image = [patch // self.num_patches for patch in patches]
        if self.config.budget == "prompt":
            return select(scores, keep * len(set(image)))
        chosen: list[int] = []
        for number in sorted(set(image)):
            own = [place for place, of in enumerate(image) if of == number]
            chosen += [own[i] for i in select(scores[own], keep)]
        return sorted(chosen)

    def _answer(
        self, sequence: _Sequence, cuts: dict[int, set[int]], later: list[int], result: Result, mutual: Tensor
    ) -> None:
        """All decoder layers without the pseudo CLS token, the cuts given; later tokens see what is cached.

        The first tokens see each other whatever their order as `mutual` (n, n) says.
        """
        prompt = len(sequence.index)
        rows = [*range(prompt), *range(prompt, prompt + len(later))]
        positions = [*sequence.positions, *range(sequence.following, sequence.following + len(later))]
        embedded = [self.decoder.embed_tokens.weight[token] for token in later]
        x = torch.cat([sequence.embeddings, torch.stack(embedded)]) if later else sequence.embeddings
        final = min(cuts.values(), key=len, default=set(range(prompt)))
        for index, layer in enumerate(self.decoder.layers):
            present = [row for row in rows if row < prompt]
            cached = set(present) if self.config.cache == "layered" else final
            result.cache.append(len(cached))
            allowed = torch.zeros(len(rows), len(rows), dtype=torch.bool)
            for i, query in enumerate(rows):
                for j, key in enumerate(rows):
                    before = key <= query or (key < len(mutual) and bool(mutual[query, key]))
                    allowed[i, j] = before and (query < prompt or key >= prompt or key in cached)
            x, _, _ = self._decoder_attention(layer, x, [positions[row] for row in rows], allowed)
            if index in cuts:
                stay = [i for i, row in enumerate(rows) if row >= prompt or row in cuts[index]]
                x, rows = x[stay], [rows[i] for i in stay]
            x = x + layer.mlp(self._norm(layer.post_attention_layernorm, x))
            x = self._behind(index, x, [sequence.patch[row] if row < prompt else -1 for row in rows])
        result.logits = self._norm(self.decoder.norm, x) @ self.model.lm_head.weight.T
        result.later = result.logits[-1 - len(later) :]
        result.survivors = [sequence.index[row] for row in rows if row < prompt]

    def _decoder_attention(
        self, layer: nn.Module, x: Tensor, positions: list[int], allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and residual of a decoder layer: new states (T, D), Eq. 2's map (T, T), values (T, H_kv * d)."""
        attention = layer.self_attn
        normed = self._norm(layer.input_layernorm, x)
        size = attention.head_dim
        q, k, v = (projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        share = self.decoder.config.num_attention_heads // self.decoder.config.num_key_value_heads
        outputs, maps = [], []
        for head in range(self.decoder.config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // share * size, (head // share + 1) * size)
            query, key = q[:, own], k[:, shared]
            if hasattr(attention, "q_norm"):  # Qwen3's, of each head
                query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
            query, key = self._rotate(query, positions), self._rotate(key, positions)
            logits = self.bend(query.double() @ key.double().T / size**0.5).masked_fill(~allowed, float("-inf"))
            maps.append(logits.softmax(-1))
            outputs.append((maps[-1] @ v[:, shared].double()).to(x.dtype))
        return x + attention.o_proj(torch.cat(outputs, -1)), torch.stack(maps).mean(0), v

    def _rotate(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotary embedding (T, d): halves (a, b) turn by position * theta ** (-2 i / d)."""
        half = x.shape[1] // 2
        theta = float(self.decoder.config.rope_parameters["rope_theta"])
        speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.tensor(positions, dtype=torch.float64)[:, None] * speed
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)

    @staticmethod
    def _norm(norm: nn.Module, x: Tensor) -> Tensor:
        """Root-mean-square norm in float64 (the stock module computes in float32)."""
        exact = x.double()
        normed = exact / (exact.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return norm.weight * normed.to(x.dtype)


def check_stages(trace: PruneTrace, expected: list[Result], tolerance: float = 2e-5) -> None:
    """The trace of a batch has the cuts of the samples: candidates, scores, and what stays."""
    pruned = [(b, result) for b, result in enumerate(expected) if result.cuts]
    for b, result in pruned:
        assert len(trace.stages) == len(result.cuts), "number of cuts"
        for stage, cut in zip(trace.stages, result.cuts, strict=True):
            where = f"sample {b}, {cut.where} layer {cut.layer}"
            assert (stage.where, stage.layer) == (cut.where, cut.layer)
            candidates = [i for i in stage.candidates[b].tolist() if i >= 0]
            assert sorted(candidates) == cut.candidates, where
            scores = dict(zip(stage.candidates[b].tolist(), stage.scores[b].tolist(), strict=True))
            for patch, score in zip(cut.candidates, cut.scores, strict=True):
                assert scores[patch] == pytest.approx(score, rel=1e-3, abs=tolerance), where
            assert [i for i in stage.kept[b].tolist() if i >= 0] == cut.kept, where


@dataclass(frozen=True)
class _Image:
    patches: list[int]
    features: Tensor  # (k, D), projected
    feature_cls: Tensor
    """The projector's CLS input: of the layer that the features come from."""
    projected_cls: Tensor
    clip_cls: Tensor | None
    """v of Eq. 5, of a tower that is CLIP's."""
    cuts: list[Cut]


@dataclass(frozen=True)
class _Sequence:
    index: list[int]
    patch: list[int]
    positions: list[int]
    following: int
    embeddings: Tensor
    images: int


def rollout(maps: list[Tensor], aggregation: str) -> Tensor:
    """Eq. 3 over a group's maps, first layer first."""
    eye = torch.eye(len(maps[0]), dtype=maps[0].dtype)
    if aggregation == "residual":
        return functools.reduce(lambda done, a: (a + eye) / 2 @ done, maps, eye)
    if aggregation == "multiply":
        return functools.reduce(lambda done, a: a @ done, maps, eye)
    if aggregation == "mean":
        return torch.stack(maps).mean(0)
    if aggregation == "max":
        return torch.stack(maps).amax(0)
    assert aggregation == "layer"
    return maps[-1]


def importance(row: Tensor, values: Tensor) -> Tensor:
    """Eq. 4: the reference token's row over the visual tokens, and their values."""
    weighted = row * values.double().norm(dim=-1)
    return weighted / weighted.sum()


def select(scores: Tensor, k: int) -> list[int]:
    """The k highest, ties to the lower index, in their original order."""
    values = scores.tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return sorted(ranked[:k])


def split_words(text: str) -> list[Span]:
    """Runs of letters and digits; each CJK character, and every other visible character, is a word of its own.

    A combining mark belongs to the character before it.
    """
    words: list[Span] = []
    open_run = False
    for i, char in enumerate(text):
        adjacent = bool(words) and words[-1][1] == i
        script = unicodedata.name(char, "").split(" ")[0]
        joins = char.isalnum() and script not in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
        if adjacent and (unicodedata.category(char)[0] == "M" or (joins and open_run)):
            words[-1] = (words[-1][0], i + 1)
            continue
        if not char.isspace():
            words.append((i, i + 1))
        open_run = joins
    return words


def _overlap(a: Span, b: Span) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _uniform(tokens: int, keep: int, groups: int) -> list[int]:
    return [round(tokens * (keep / tokens) ** (g / groups)) for g in range(1, groups + 1)]


def _groups(layers: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, layers))) for start in range(0, layers, size)]


def _vision_attention(layer: nn.Module, x: Tensor, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and residual of a CLIP layer: new states (T, D), Eq. 2's map (T, T), values (T, D)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(x)
    q, k, v = (projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if causal else None
    outputs, maps = [], []
    for head in range(attention.num_heads):
        own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        logits = q[:, own].double() @ k[:, own].double().T / attention.head_dim**0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        maps.append(logits.softmax(-1))
        outputs.append((maps[-1] @ v[:, own].double()).to(x.dtype))
    return x + attention.out_proj(torch.cat(outputs, -1)), torch.stack(maps).mean(0), v
