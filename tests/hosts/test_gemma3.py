"""Gemma 3's own: squares of 4 x 4 patches, images that see themselves both ways, and layers that turn otherwise."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gemma import multiplied_out
from reference import Cut, Prompt, Reference, _Image, _vision_attention, check_stages, importance, prompt_of, rollout
from reference import select as best
from tiny import with_cache
from torch import Tensor, nn
from transformers import DynamicCache

import ivtp
from ivtp import PruneConfig
from ivtp.core.schedule import uniform_ratio
from ivtp.errors import InputError, UnsupportedModelError
from ivtp.hosts.gemma3 import HOST
from ivtp.hosts.tiny import tiny_images
from ivtp.plug import find_host
from ivtp.prompt.instruction import InstructionReader
from ivtp.stock import set_kernel
from tests.methods import naive

SIDE, ACROSS = 20, 4
"""Patches along an image of the tiny model, and along the square that becomes one visual token."""
TOKENS = (SIDE // ACROSS) ** 2
SLOT = "\n\n<start_of_image><image><end_of_image>\n\n"
"""What the processor writes for one image, with one slot in the place of all."""
ONE = (("What is left of the dog?", ((50, 40),)), ("How many bananas are there, near the house?", ((84, 84),)))
PROMPTS = (ONE[0], ("How many bananas are there?", ((30, 90), (84, 84))))


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return HOST.tiny()


def squares() -> list[list[int]]:
    """The patches, counted in raster order, of each square in raster order."""
    count = SIDE // ACROSS
    return [
        [(row * ACROSS + y) * SIDE + column * ACROSS + x for y in range(ACROSS) for x in range(ACROSS)]
        for row in range(count)
        for column in range(count)
    ]


def images_of(ids: Tensor, slot: int) -> list[int]:
    """The image that each token is of; -1: text."""
    found, image, before = [], -1, -1
    for token in ids.tolist():
        image += token == slot != before
        found.append(image if token == slot else -1)
        before = token
    return found


class Gemma3Reference(Reference):
    """Patches stay in raster order, and rows and columns of full maps are picked square by square."""

    def __init__(self, model: nn.Module, config: PruneConfig) -> None:
        super().__init__(multiplied_out(model), None, config)

    def run(self, prompt: Prompt, later: Any = ()) -> Any:
        self.image = images_of(prompt.ids, self.model.config.image_token_id)
        return super().run(prompt, later)

    def mutual(self, columns: list[int]) -> Tensor:
        image = torch.tensor([self.image[column] for column in columns])
        return (image[:, None] == image) & (image >= 0)

    def _count(self) -> int:
        return TOKENS

    def _encode(self, pixels: Tensor) -> _Image:
        x = self.tower.embeddings(pixels[None].to(self.dtype))[0]  # (patches, D)
        patches, columns = list(range(TOKENS)), squares()
        cuts: list[Cut] = []
        maps: list[Tensor] = []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(self.tower.encoder.layers):
            x, attention, values = _vision_attention(layer, x)
            maps.append(attention)
            if index in ends:
                row = rollout(maps, self.options.aggregation).mean(0)
                received = torch.stack([row[own].sum() for own in columns])
                scores = importance(received, torch.stack([values[own].mean(0) for own in columns]))
                chosen = best(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                stay = sorted(token for i in chosen for token in columns[i])
                x = x[stay]
                patches, columns = kept, [[stay.index(token) for token in columns[i]] for i in chosen]
                maps = []
            x = x + layer.mlp(layer.layer_norm2(x))
        features = torch.stack([self._projected(x[own]) for own in columns])
        return _Image(patches, features, x.mean(0), self._projected(x.mean(0)[None]), None, cuts)

    def _projected(self, square: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        mean = self.tower.post_layernorm(square).mean(0)
        return self._norm(projector.mm_soft_emb_norm, mean) @ projector.mm_input_projection_weight

    def _decoder_attention(self, layer: nn.Module, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        slides = layer.self_attn.is_sliding
        self.turn = self.decoder.config.rope_parameters["sliding_attention" if slides else "full_attention"]
        return super()._decoder_attention(layer, *args)

    def _rotate(self, x: Tensor, positions: list[int]) -> Tensor:
        half = x.shape[1] // 2
        speed = self.turn["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.tensor(positions, dtype=torch.float64)[:, None] * speed / self.turn.get("factor", 1)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


def slow_prompt(processor: Any, question: str, sizes: Any) -> Prompt:
    content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    reads = SimpleNamespace(image_token="<image>", **parts)
    return prompt_of(reads, text.replace("<start_of_image>", SLOT), question, tiny_images(question, sizes), TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"aggregation": how} for how in ("mean", "multiply", "layer")),
        {"guide": "visual"},
        {"stages": "vision", "group_layers": 2},
        {"stages": "llm", "keep": 1, "group_layers": 4},
        {"positions": "compact", "cache": "layered"},
    ],
    ids=str,
)
def test_what_stays_is_what_the_reference_keeps(small: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, processor = small
    options = {"keep": 7, "guide": "text", "llm_layers": 6, **options}
    reference = Gemma3Reference(model, PruneConfig.of(**options))
    expected = [reference.run(slow_prompt(processor, *prompt)) for prompt in PROMPTS]
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**HOST.tiny_inputs(model, processor, PROMPTS)).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


class Decoder:
    """The stock decoder on one unpadded prompt, eager and with masks made by hand; its columns leave by hand."""

    def __init__(self, model: Any, processor: Any, prompt: Any) -> None:
        self.module, entered = model.model.language_model, []
        inputs = HOST.tiny_inputs(model, processor, [prompt])
        hook = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        self.hidden: Tensor = entered[0]
        self.image = images_of(inputs["input_ids"][0], model.config.image_token_id)
        self.columns = list(range(len(self.image)))
        self.asked = slow_prompt(processor, *prompt).instruction
        self.next = 0

    @property
    def visual(self) -> list[bool]:
        return [self.image[c] >= 0 for c in self.columns]

    def arguments(self, number: int) -> dict[str, Any]:
        image = torch.tensor([self.image[c] for c in self.columns])
        seen = torch.ones(len(image), len(image)).tril().bool() | ((image[:, None] == image) & (image >= 0))
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {"position_embeddings": self.turn(number), "attention_mask": hidden[None, None]}

    def turn(self, number: int) -> Any:
        kind = self.module.config.layer_types[number]
        return self.module.rotary_emb(self.hidden, torch.tensor([self.columns]), kind)

    def attend(self, number: int) -> list[list[float]]:
        """Head-mean attention of the next layers' first."""
        layer = self.module.layers[number]
        _, weights = layer.self_attn(layer.input_layernorm(self.hidden), **self.arguments(number))
        return weights[0].double().mean(0).tolist()

    def key_norms(self, number: int) -> list[float]:
        """L1 norms of a layer's keys, turned by its own angles."""
        layer = self.module.layers[number]
        key = layer.self_attn.k_proj(layer.input_layernorm(self.hidden))
        key = layer.self_attn.k_norm(key.view(1, len(self.columns), -1, layer.self_attn.head_dim))
        (cos, sin), (first, second) = (part.unsqueeze(2) for part in self.turn(number)), key.chunk(2, dim=-1)
        turned = key * cos + torch.cat([-second, first], dim=-1) * sin
        return turned.abs().sum(dim=(2, 3))[0].double().tolist()

    def advance(self) -> list[list[float]]:
        rows = self.attend(self.next)
        self.hidden = self.module.layers[self.next](self.hidden, **self.arguments(self.next))
        self.next += 1
        return rows

    def ranked(self, scores: list[float]) -> list[int]:
        """Places of the visual tokens, the best first."""
        places = [place for place, is_visual in enumerate(self.visual) if is_visual]
        return [places[k] for k in naive.descending([scores[place] for place in places])]

    def keep(self, stay: Any) -> list[int]:
        """Keep these places and all text; the patches that are left."""
        places = [place for place, is_visual in enumerate(self.visual) if place in stay or not is_visual]
        self.hidden, self.columns = self.hidden[:, places], [self.columns[place] for place in places]
        first = self.image.index(0)
        return [c - first for c in self.columns if self.image[c] >= 0]


def slow(small: tuple[Any, Any]) -> list[Decoder]:
    model, processor = copy.deepcopy(small[0]), small[1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [Decoder(model, processor, prompt) for prompt in ONE]


def pruned(small: tuple[Any, Any], method: str, **options: Any) -> list[list[list[int]]]:
    """What each stage keeps of each prompt of a padded batch."""
    model, processor = small
    with torch.no_grad(), ivtp.attach(model, processor, method=method, **options) as pruner:
        model(**HOST.tiny_inputs(model, processor, ONE))
    return [stage.kept.tolist() for stage in pruner.trace.stages]


@pytest.mark.parametrize("layer", [1, 3, 5])
@torch.no_grad()
def test_fastv_ranks_by_what_the_last_token_sees(small: tuple[Any, Any], layer: int) -> None:
    expected = []
    for decoder in slow(small):
        for _ in range(layer):
            rows = decoder.advance()
        expected.append(decoder.keep(decoder.ranked(rows[-1])[:9]))
    assert pruned(small, "fastv", keep=9, layer=layer) == [expected]


@torch.no_grad()
def test_pyramiddrop_looks_ahead_by_the_angles_of_the_next_layer(small: tuple[Any, Any]) -> None:
    """From a layer that slides to one that does not, between two that do, and back."""
    counts, expected = uniform_ratio(TOKENS, 5, 3), [[], [], []]
    slides = [kind == "sliding_attention" for kind in small[0].config.text_config.layer_types]
    assert [(slides[layer], slides[layer + 1]) for layer in (1, 3, 5)] == [(True, False), (True, True), (False, True)]
    for decoder in slow(small):
        for stage, count in enumerate(counts):
            decoder.advance(), decoder.advance()
            rows = decoder.attend(decoder.next)
            expected[stage].append(decoder.keep(decoder.ranked(rows[-1])[:count]))
    assert pruned(small, "pyramiddrop", keep=5) == expected


@torch.no_grad()
def test_sparsevlm_counts_what_the_question_sees(small: tuple[Any, Any]) -> None:
    """Of 25 tokens 11 stay as they are, and one stands for the best of the others."""
    (first, _, _) = pruned(small, "sparsevlm", keep=6, schedule=(12, 9, 6))
    for decoder, kept in zip(slow(small), first, strict=True):
        asked = [c in decoder.asked for c in decoder.columns]
        weights = naive.raters(decoder.hidden[0].double().tolist(), decoder.visual, asked)
        ranked = decoder.ranked(naive.weighted_sum(decoder.advance(), weights))
        begin = decoder.image.index(0)
        best_first = [place - begin for place in ranked]
        assert len(kept) == 12
        assert set(best_first[:11]) <= set(kept)


@pytest.mark.parametrize("layer", [2, 3])
@torch.no_grad()
def test_dart_turns_keys_back_by_the_angles_of_their_layer(small: tuple[Any, Any], layer: int) -> None:
    expected = []
    for decoder in slow(small):
        for _ in range(layer - 1):
            decoder.advance()
        norms = decoder.key_norms(decoder.next)
        decoder.advance()
        hidden = decoder.module.norm(decoder.hidden[0]).double().tolist()
        asked = [c in decoder.asked for c in decoder.columns]
        expected.append(decoder.keep(naive.least_similar(hidden, norms, decoder.visual, asked, 9, 4)))
    assert pruned(small, "dart", keep=9, layer=layer) == [expected]


def scanned(model: Any, processor: Any, question: str, size: tuple[int, int]) -> dict[str, Any]:
    """A prompt about a picture and its crops, as the stock processor writes it."""
    picture = tiny_images(question, [size])
    text = ivtp.prompt_for(processor, question)
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    return dict(processor(images=[picture], text=[text], return_tensors="pt", images_kwargs=crops))


@pytest.mark.parametrize(("size", "images"), [((50, 40), 3), ((40, 40), 1), ((200, 40), 5), ((12, 100), 1)])
def test_crops_are_images_of_the_prompt(small: tuple[Any, Any], size: tuple[int, int], images: int) -> None:
    """Each with its own budget; with all tokens the answer is the stock model's."""
    model, processor = small
    inputs = scanned(model, processor, "Is it a dog?", size)
    assert len(inputs["pixel_values"]) == images
    with torch.no_grad():
        stock = model(**inputs).logits
        for method in ("divprune", "fastv", "ivtp"):
            options = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
            with ivtp.attach(model, processor, method=method, keep="100%", **options):
                torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=0)
            with ivtp.attach(model, processor, method=method, keep=3, **options) as pruner:
                model(**inputs)
            (kept,) = pruner.trace.kept().tolist()
            assert [sum(i // TOKENS == m for i in kept) for m in range(images)] == [3] * images


@pytest.mark.parametrize("question", ["Is it a dog?", "Here is the original image of a dog: is it?"])
def test_what_is_written_around_crops_is_no_part_of_the_question(small: tuple[Any, Any], question: str) -> None:
    """Also where the question begins with the same words."""
    model, processor = small
    ids = scanned(model, processor, question, (50, 40))["input_ids"][0].tolist()
    assert "here are some crops" in processor.tokenizer.decode(ids)
    columns = [c for c, token in enumerate(ids) if token != model.config.image_token_id]
    found = InstructionReader(processor, HOST.writes).read([ids[c] for c in columns], columns)
    assert found.text == question
    asked = processor.tokenizer.decode([ids[c] for c in found.columns]).strip()
    assert asked == question


def test_without_types_images_are_read_as_the_stock_model_reads_them(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, PROMPTS)
    types, mask = inputs.pop("token_type_ids"), inputs["attention_mask"].bool()
    with torch.no_grad():
        stock, both_ways = (model(**inputs, **given).logits for given in ({}, {"token_type_ids": types}))
        with ivtp.attach(model, processor, method="divprune", keep="100%"):
            torch.testing.assert_close(model(**inputs).logits[mask], stock[mask], atol=1e-4, rtol=0)
            assert (both_ways - stock)[mask].abs().max() > 0.1
            with pytest.raises(InputError, match="token_type_ids of shape") as caught:
                model(**inputs, token_type_ids=types[:, 1:])
    assert "\n" not in str(caught.value)


def test_flash_attention_is_refused() -> None:
    """Its kernels have no mask in which an image sees itself both ways."""
    tower = find_host(HOST.tiny()[0]).text
    set_kernel(tower.module.config, "flash_attention_2")
    everything = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match='attn_implementation="sdpa"'):
        tower.causal_mask(torch.zeros(1, 3, 48), everything + 1, blocks=everything)


def test_what_goes_beyond_the_sliding_window_is_refused_in_a_line() -> None:
    """Of a prompt at once, also behind a cache; of an answer where it gets there; within it the model answers."""
    model, processor = HOST.tiny()
    (question, sizes), length = ONE[0], 70
    inputs = HOST.tiny_inputs(model, processor, [(question, sizes)])
    first = inputs["input_ids"].shape[1]
    assert first < length - 2 < 2 * first
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=4) as pruner:
        pruner.host.text.window = length
        long = HOST.tiny_inputs(model, processor, [(question * 4, sizes)])
        held = model(**inputs, use_cache=True).past_key_values
        again = {**inputs, "attention_mask": torch.ones(1, 2 * first, dtype=torch.long), **with_cache(model, held)}
        for call in (
            lambda: model(**long),
            lambda: model(**again),
            lambda: model.generate(**inputs, max_new_tokens=60),
        ):
            with pytest.raises(InputError, match=f"see {length} at once") as caught:
                call()
            assert "\n" not in str(caught.value)
        model.generate(**inputs, max_new_tokens=3)
        assert pruner.trace.kept().shape == (1, 4)


def test_a_cache_with_a_sliding_window_is_filled_like_any_other(small: tuple[Any, Any]) -> None:
    """`generate` makes one by the config of the model."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, ONE)
    cache = DynamicCache(config=model.config)
    assert any(cache.is_sliding)
    with torch.no_grad(), ivtp.attach(model, processor, method="fastv", keep=4):
        model(**inputs, **with_cache(model, cache))
        model(**inputs, **with_cache(model, other := DynamicCache()))
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize("types", ["of the new turn", "of the conversation"])
def test_a_new_image_sees_itself_both_ways_behind_a_cache(small: tuple[Any, Any], types: str) -> None:
    """As in one pass: in a forward that is handed the new turn alone."""
    model, processor = small
    one, two = (HOST.tiny_inputs(model, processor, [prompt]) for prompt in ONE)
    seen = one["input_ids"].shape[1]
    columns = ("input_ids", "token_type_ids", "attention_mask")
    whole = {name: torch.cat([one[name], two[name]], 1) for name in columns}
    whole["pixel_values"] = torch.cat([one["pixel_values"], two["pixel_values"]])
    later = {**two, "attention_mask": whole["attention_mask"]}
    if types == "of the conversation":
        later["token_type_ids"] = whole["token_type_ids"]
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=6):
        expected = model(**whole).logits[:, seen:]
        held = model(**one, use_cache=True).past_key_values
        found = model(**later, **with_cache(model, held)).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        (None, "mm_tokens_per_image", 24, "mm_tokens_per_image=24"),
        (None, "mm_tokens_per_image", 9, "mm_tokens_per_image=9"),
        ("text_config", "use_bidirectional_attention", True, "both directions"),
        ("vision_config", "model_type", "siglip2_vision_model", "siglip_vision_model can be pruned"),
    ],
)
def test_what_is_not_of_the_family_is_refused(part: str | None, name: str, value: Any, says: str) -> None:
    config = copy.deepcopy(HOST.tiny()[0].config)
    object.__setattr__(getattr(config, part) if part else config, name, value)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        HOST.geometry(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOST.stock)
def test_a_released_size_has_256_tokens_of_4096_patches(name: str) -> None:
    size = HOST.geometry(HOST.stock_config(name))
    assert (size.num_patches, size.unit, size.square, size.visual_tokens) == (256, 16, 896, 256)
    assert size.text_heads * size.text_head_dim in (2048, 4096)
