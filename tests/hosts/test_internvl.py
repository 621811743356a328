"""InternVL's own: what is cut are squares of patches, against a slow reference that keeps the stock order of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from reference import Cut, Reference, _Image, check_stages, importance, prompt_of, rollout, select
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import ivtp
from ivtp import PruneConfig
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.hosts.internvl import HOST
from ivtp.hosts.tiny import IMAGE, settle, tiny_images
from ivtp.methods.topk import METHOD as TOPK

SIDE, ACROSS = 8, 2
"""Patches along a tile of the tiny model, and along the square that becomes one visual token."""
ONE_TILE = (("What is left of the dog?", ((50, 40),)), ("How many bananas are there?", ((40, 50), (32, 32))))
SHAPES = [(50, 40), (64, 64), (200, 20), (20, 200), (33, 97), (1000, 2)]


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


class InternVLReference(Reference):
    """One tile an image; tokens stay in raster order, and rows and columns of full maps are picked square by square."""

    def _count(self) -> int:
        return (SIDE // ACROSS) ** 2

    def _encode(self, pixels: Tensor) -> _Image:
        tower, project = self.tower, self.model.model.multi_modal_projector
        x = tower.embeddings(pixels[None].to(self.dtype))[0]  # (1 + patches, D)
        patches, columns = list(range(self.num_patches)), [[1 + place for place in own] for own in squares()]
        cuts: list[Cut] = []
        maps: list[Tensor] = []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(tower.encoder.layer):
            x, attention, values = intern_attention(layer, x)
            maps.append(attention)
            if index in ends:
                row = rollout(maps, self.options.aggregation)[0]
                received = torch.stack([row[own].sum() for own in columns])
                scores = importance(received, torch.stack([values[own].mean(0) for own in columns]))
                chosen = select(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                stay = sorted([0, *(token for i in chosen for token in columns[i])])
                x = x[stay]
                patches, columns = kept, [[stay.index(token) for token in columns[i]] for i in chosen]
                maps = []
            x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
        joined = torch.stack([torch.cat([x[token] for token in own]) for own in columns])
        return _Image(patches, project(joined), x[0], project(x[0].repeat(ACROSS**2)), None, cuts)


def intern_attention(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and residual of an InternViT layer: new states (T, D), Eq. 2's map (T, T), values (T, D)."""
    attention, normed = layer.attention, layer.layernorm_before(x)
    q, k = attention.q_norm(attention.q_proj(normed)), attention.k_norm(attention.k_proj(normed))
    v = attention.v_proj(normed)
    outputs, maps = [], []
    for head in range(attention.num_heads):
        own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        maps.append((q[:, own] @ k[:, own].T / attention.head_dim**0.5).softmax(-1))
        outputs.append(maps[-1] @ v[:, own])
    return x + layer.lambda_1 * attention.projection_layer(torch.cat(outputs, -1)), torch.stack(maps).mean(0), v


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"aggregation": how} for how in ("mean", "max", "multiply", "layer")),
        {"guide": "visual"},
        {"stages": "vision", "group_layers": 2},
        {"stages": "llm", "guide": "visual"},
        {"keep": 1, "group_layers": 4},
        {"positions": "compact", "cache": "layered"},
    ],
    ids=str,
)
def test_what_stays_is_what_the_reference_keeps(small: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, processor = small
    options = {"keep": 5, "guide": "text", "llm_layers": 6, **options}
    reference = InternVLReference(model, None, PruneConfig.of(**options))
    expected = []
    for question, sizes in ONE_TILE:
        content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text, images = text.replace(IMAGE, f"<img>{IMAGE}</img>"), tiny_images(question, sizes)
        expected.append(reference.run(prompt_of(processor, text, question, images, reference.num_patches)))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**HOST.tiny_inputs(model, processor, ONE_TILE)).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


def test_a_square_is_chosen_by_the_attention_that_all_of_it_receives(small: tuple[Any, Any]) -> None:
    """Of every tile of an image, behind the encoder: the whole is the last of them."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(200, 60)])])
    with torch.no_grad(), ivtp.attach(model, processor, method="topk", keep=64) as pruner:
        model(**inputs)
        (kept,), (scores,) = pruner.trace.kept().tolist(), pruner.trace.stages[0].scores
    assert kept == list(range(64))
    rows = []
    with torch.no_grad():
        for tile in inputs["pixel_values"]:
            x = model.model.vision_tower.embeddings(tile[None])[0]
            for layer in model.model.vision_tower.encoder.layer:
                x, attention, _ = intern_attention(layer, x)
                x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
            rows += [attention[0, [1 + place for place in own]].sum() for own in squares()]
    torch.testing.assert_close(scores, torch.stack(rows), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["topk", "divprune", "fastv", "ivtp", "mmtok", "dynamicvit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_that_of_the_whole_image(small: tuple[Any, Any], method: str, shape: tuple[int, int]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    options = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=7, **options) as pruner:
        model(**inputs)
    (kept,) = pruner.trace.kept().tolist()
    assert len(set(kept)) == 7
    assert 0 <= min(kept) <= max(kept) < pruner.trace.patches[0][0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_an_image_has_as_many_tiles_as_the_stock_processor_makes(width: int, height: int) -> None:
    config = InternVLConfig(vision_config=InternVLVisionConfig(), text_config={"model_type": "qwen2"})
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    visual = HOST.visual(config, (width, height))
    assert len(visual.tiles) == processor.get_number_of_image_patches(height, width, {})
    assert visual.token.tolist() == list(range(256 * len(visual.tiles)))


@pytest.mark.parametrize("method", ["topk", "fastv"])
@pytest.mark.parametrize("count", [1, 2])
def test_images_cost_what_a_prefill_counts(method: str, count: int) -> None:
    """From their sizes alone, with the released checkpoints' number of tiles."""
    model, processor = HOST.tiny()
    processor.image_processor.max_patches = 12
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(200, 90)] * count)])
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - slots + count
    expected = ivtp.flops(model, method=method, keep=5, text_tokens=text, images=count, image_size=(200, 90)).total
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5) as pruner:
        model(**inputs)
    assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


def test_normalised_queries_and_a_last_norm(small: tuple[Any, Any]) -> None:
    """As the towers of 6 billion weights have them: keeping all is the stock model."""
    model, processor = small
    config = InternVLConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    for name, value in {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}.items():
        setattr(config.vision_config, name, value)
    other = settle(type(model)(config), processor.tokenizer, 3)
    inputs = HOST.tiny_inputs(other, processor, ONE_TILE)
    with torch.no_grad():
        stock = other(**inputs).logits[:, -1]
        for method in ("topk", "ivtp"):
            guide = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
            with ivtp.attach(other, processor, method=method, keep="100%", **guide):
                torch.testing.assert_close(other(**inputs).logits[:, -1], stock, atol=1e-4, rtol=0)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="before transformers 5.23 a layer reruns with its hooks"
)
@pytest.mark.parametrize("method", ["ivtp", "dynamicvit"])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(method: str) -> None:
    """Of cuts inside a layer of the tower, and behind one."""
    model, processor = HOST.tiny()
    options = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
    inputs = HOST.tiny_inputs(model, processor, ONE_TILE)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train().zero_grad()
        with ivtp.attach(model, processor, method=method, keep=5, **options):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["tome", "evit", "visionzip", "prumerge", "ivtp+", "tome+fastv"])
def test_merging_in_the_encoder_is_refused(small: tuple[Any, Any], method: str) -> None:
    options = {"guide": "text"} if method == "ivtp+" else {}
    with pytest.raises(ConfigError, match="reads 4 of them each") as caught:
        ivtp.attach(*small, method=method, keep=8, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model", {"downsample_ratio": 0.25}, "downsample_ratio=0.25"),
        ("model", {"vision_feature_select_strategy": "full"}, 'the strategy "default"'),
        ("vision", {"image_size": (32, 64)}, "square"),
        ("vision", {"patch_size": (32, 32)}, "fill a tile"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_a_line(part: str, change: dict[str, Any], says: str) -> None:
    config = HOST.tiny()[0].config
    for name, value in change.items():
        setattr(config if part == "model" else config.vision_config, name, value)
    with pytest.raises(UnsupportedModelError, match=says):
        HOST.geometry(config)


class Seen(TOPK):  # type: ignore[misc, valid-type]
    """Remembers what it was shown."""

    windows: ClassVar[list[Any]] = []

    def score(self, window: Any) -> Tensor:
        self.windows.append(window)
        return super().score(window)


def test_a_method_sees_the_mean_of_a_square(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)])])
    with torch.no_grad(), ivtp.attach(model, processor, method=Seen, keep=5):
        Seen.windows.clear()
        model(**inputs)
        stock = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0]
    (window,) = Seen.windows
    assert window.patch.tolist() == [[-1, *range(16)]]
    means = [stock[0], *(stock[[1 + place for place in own]].mean(0) for own in squares())]
    torch.testing.assert_close(window.hidden[0], torch.stack(means), atol=1e-4, rtol=1e-4)
