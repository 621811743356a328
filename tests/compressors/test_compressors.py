"""Every trained projector in a tiny LLaVA: what it reads and gives, what is saved of it, and what it leaves behind."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import difference, fingerprint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import NUM_PATCHES, QUESTIONS, Tiny, generated, image, samples
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import ivtp
from ivtp.compressors.base import Compressor
from ivtp.cost.sizes import sizes
from ivtp.errors import AttachError, ConfigError, LoadError, UnsupportedModelError
from ivtp.hosts.tiny import randomise
from ivtp.registry import compressor_class, host_class

# peft still asks transformers for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

NAMES = ivtp.list_compressors()
READING = [name for name in NAMES if compressor_class(name).info.reads_question]


def possible(name: str, tiny: Tiny) -> list[int]:
    """All numbers of tokens that a compressor can give."""
    geometry, found = sizes(tiny.model()).geometry, []
    for tokens in range(1, NUM_PATCHES + 1):
        with suppress(ConfigError):
            compressor_class(name).check(geometry, tokens)
            found.append(tokens)
    return found


class Compressed:
    """A tiny LLaVA with a compressor whose random weights are as large as the model's own."""

    def __init__(self, tiny: Tiny, name: str, tokens: int | None = None, seed: int = 1) -> None:
        self.tiny = copy.copy(tiny)
        self.tiny.processor = copy.deepcopy(tiny.processor)
        self.model = tiny.model()
        counts = possible(name, tiny)
        self.tokens = tokens or next(n for n in counts if n >= 9)
        self.compression = ivtp.compress(self.model, self.tiny.processor, name, tokens=self.tokens)
        randomise(self.compression.compressor, seed)
        if name == "llamavid":  # whose attention has no scale: weights as large let it see a single patch
            with torch.no_grad():
                self.compression.compressor.query.weight.mul_(0.05)

    def inputs(self, *which: Any) -> dict[str, Tensor]:
        """Arguments of a call, padded on the left, with as many slots as tokens."""
        return self.tiny.inputs(*which)

    def ask(self, question: str = QUESTIONS[0], picture: int = 3) -> str:
        return ivtp.ask(self.model, self.tiny.processor, image(picture), question, max_new_tokens=5).text


@pytest.fixture(params=NAMES)
def compressed(request: pytest.FixtureRequest, tiny: Tiny) -> Compressed:
    return Compressed(tiny, request.param)


# ---- what it reads and gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_as_many_tokens_as_it_says(tiny: Tiny, name: str) -> None:
    geometry, counts = sizes(tiny.model()).geometry, possible(name, tiny)
    assert counts
    for tokens in {counts[0], counts[len(counts) // 2], counts[-1]}:
        compressor = compressor_class(name).seeded(geometry, tokens, seed=0)
        found = compressor(torch.randn(2, NUM_PATCHES, geometry.vision_hidden))
        assert found.shape == (2, tokens, geometry.text_hidden)


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_give_from_16_to_256_tokens_or_all(name: str) -> None:
    geometry, kind = sizes("llava-1.5-7b").geometry, compressor_class(name)
    for tokens in (576,) if name == "mlp" else (16, 64, 256):
        with torch.device("meta"):
            assert kind(geometry, tokens)(torch.zeros(1, 576, 1024)).shape == (1, tokens, 4096)


def test_its_tokens_take_the_images_slots(compressed: Compressed) -> None:
    """Without the stock forward: the compressor's own output, scattered by hand."""
    model, inputs = compressed.model, compressed.inputs(*samples(compressed.tiny, "mixed"))
    slots = inputs["input_ids"] == model.config.image_token_id
    assert slots.sum(dim=1).tolist() == [compressed.tokens * images for images in (1, 2, 0, 1)]
    with torch.no_grad():
        features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        found = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert len(found) == 4
        if compressed.compression.compressor.info.reads_question:
            return  # whose tokens depend on the prompt; see below
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        embeddings[slots] = compressed.compression.compressor(features).flatten(0, 1)
        by_hand = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
        assert torch.allclose(model(**inputs).logits, by_hand, atol=1e-4)


def test_images_do_not_mix(compressed: Compressed) -> None:
    compressor = compressed.compression.compressor
    features = torch.randn(3, NUM_PATCHES, 32)
    with torch.no_grad():
        together = compressor(features)
        alone = torch.cat([compressor(one) for one in features.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_its_prompts_do_alone(compressed: Compressed, beams: int) -> None:
    prompts = samples(compressed.tiny, "batch")
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "min_new_tokens": 5}
    inputs = compressed.inputs(*prompts)
    together = generated(compressed.model.generate(**inputs, **options), inputs)
    for row, prompt in enumerate(prompts):
        own = compressed.inputs(prompt)
        assert generated(compressed.model.generate(**own, **options), own)[0].tolist() == together[row].tolist()


def test_a_mixed_batch_sees_each_prompts_own_images(compressed: Compressed) -> None:
    prompts = samples(compressed.tiny, "mixed")
    with torch.no_grad():
        together = compressed.model(**compressed.inputs(*prompts)).logits[:, -1]
        for row, prompt in enumerate(prompts):
            alone = compressed.model(**compressed.inputs(prompt)).logits[0, -1]
            assert torch.allclose(together[row], alone, atol=1e-3)


def test_gradients_reach_every_parameter(compressed: Compressed) -> None:
    model = compressed.model.train()
    inputs = compressed.inputs(*samples(compressed.tiny, "batch"))
    reached = dict(model.model.multi_modal_projector.named_parameters())
    assert {id(p) for p in reached.values()} <= {id(p) for p in model.parameters()}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, weight in reached.items() if weight.grad is None] == []
    assert all(weight.grad.isfinite().all() for weight in reached.values())
    still = {name for name, weight in reached.items() if not weight.grad.any()}
    assert not {name for name in still if not name.endswith("key.bias")}  # the same for all keys: softmax forgets it


def test_it_learns_and_only_it(compressed: Compressed) -> None:
    """A projector's stage of training: everything else is frozen, also under gradient checkpointing."""
    model, inputs = compressed.model, compressed.inputs(*samples(compressed.tiny, "one"))
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.gradient_checkpointing_enable()
    model.train()
    torch.manual_seed(0)  # of the Q-Former's dropout
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if "multi_modal_projector" not in n)


# ---- the question -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READING)
def test_the_question_guides_the_context_token_alone(tiny: Tiny, name: str) -> None:
    compressed = Compressed(tiny, name)
    compressor, found = compressed.compression.compressor, []
    compressor.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    for question in QUESTIONS[:2]:
        compressed.ask(question)
    first, second = found
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-2)
    with torch.no_grad():
        compressed.model.get_image_features(compressed.inputs(tiny.sample())["pixel_values"])  # nothing is asked here
    assert found[-1].isfinite().all()


@pytest.mark.parametrize("name", READING)
def test_only_the_question_is_read(tiny: Tiny, name: str) -> None:
    """Neither role words and padding nor an answer that is trained on."""
    compressed, read = Compressed(tiny, name), []
    compressor = compressed.compression.compressor
    compressor.register_forward_hook(lambda m, args, kwargs, output: read.append(kwargs), with_kwargs=True)
    prompt = tiny.sample(QUESTIONS[1], images=2)
    answered = type(prompt)(f"{prompt.prompt} Two dogs", prompt.question, prompt.images)
    compressed.model(**compressed.inputs(answered, tiny.sample(QUESTIONS[3])))
    tokenizer = compressed.tiny.processor.tokenizer
    (kwargs,) = read
    texts = [
        tokenizer.decode(ids[asked]).strip() for ids, asked in zip(kwargs["question"], kwargs["asked"], strict=True)
    ]
    assert texts == [QUESTIONS[1], QUESTIONS[1], QUESTIONS[3]]


@pytest.mark.parametrize("name", READING)
def test_a_static_cache_asks_the_same(tiny: Tiny, name: str) -> None:
    """Its masks are made for all of its slots before the prefill, and do not say where padding is."""
    compressed = Compressed(tiny, name)
    inputs, asked = compressed.inputs(*samples(tiny, "batch")), []
    compressed.compression.compressor.register_forward_hook(
        lambda module, args, kwargs, output: asked.append(kwargs["question"][kwargs["asked"]]), with_kwargs=True
    )
    options = {"max_new_tokens": 3, "do_sample": False}
    dynamic = compressed.model.generate(**inputs, **options)
    assert torch.equal(compressed.model.generate(**inputs, **options, cache_implementation="static"), dynamic)
    assert torch.equal(*asked)


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def test_it_is_saved_beside_a_stock_checkpoint(compressed: Compressed, tmp_path: Path) -> None:
    answer = compressed.ask()
    ivtp.save(compressed.model, compressed.tiny.processor, tmp_path)
    assert compressed.ask() == answer  # and is still in
    loaded = ivtp.load(tmp_path)
    assert ivtp.compression_of(loaded[0]).name == compressed.compression.name
    assert ivtp.ask(*loaded, image(3), QUESTIONS[0], max_new_tokens=5).text == answer
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    projector = compressed.tiny.model().model.multi_modal_projector.state_dict()
    for key, weight in stock.model.multi_modal_projector.state_dict().items():
        assert torch.equal(weight, projector[key])
    assert sizes(tmp_path).geometry.compressed == sizes(loaded[0]).geometry.compressed
    ivtp.compression_of(loaded[0]).detach()
    ivtp.save(*loaded, tmp_path)  # over it
    assert ivtp.compression_of(ivtp.load(tmp_path)[0]) is None
    assert not list(tmp_path.glob("compressor*"))


def test_what_lies_beside_a_checkpoint_stays(tiny: Tiny, tmp_path: Path) -> None:
    compressed = Compressed(tiny, "qformer")
    tmp_path.joinpath("ivtp.json").write_text('{"threshold": 0.25}')
    ivtp.save(compressed.model, compressed.tiny.processor, tmp_path)
    beside = json.loads(tmp_path.joinpath("ivtp.json").read_text())
    assert beside == {"threshold": 0.25, "compressor": {"name": "qformer", "tokens": compressed.tokens}}
    loaded = ivtp.load(tmp_path)
    ivtp.save(*loaded, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "ivtp.json").read_text()) == beside
    ivtp.compression_of(loaded[0]).detach()
    with ivtp.attach(*loaded, method="topk", keep=4) as pruner:  # its recommendation is none for methods
        assert pruner.method.keep == 4


def _spoil(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = next(iter(weights))
    if how == "not finite":
        return {**weights, name: weights[name] * float("nan")}
    return {key: weight for key, weight in weights.items() if key != name}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", "compressor.safetensors, the weights of its compressor qformer, are missing"),
        ("not finite", "not finite"),
        ("one is missing", "does not fit its compressor qformer"),
        ({"name": "nowhere", "tokens": 9}, "unknown compressor 'nowhere'"),
        ({"name": "qformer"}, r"not like \{\"name\""),
        ("other", r"not like \{\"name\""),
        ({"name": "qformer", "tokens": 10}, "does not fit"),
        ({"name": "qformer", "tokens": 900}, "tokens=900"),
    ],
)
def test_a_broken_one_is_one_line(tiny: Tiny, tmp_path: Path, how: Any, words: str) -> None:
    compressed = Compressed(tiny, "qformer")
    ivtp.save(compressed.model, compressed.tiny.processor, tmp_path)
    file = tmp_path / "compressor.safetensors"
    if how == "gone":
        file.unlink()
    elif how in ("not finite", "one is missing"):
        save_file(_spoil(load_file(file), how), file)
    else:
        (tmp_path / "ivtp.json").write_text(json.dumps({"compressor": how}))
    with pytest.raises(LoadError, match=words) as caught:
        ivtp.load(tmp_path)
    assert "\n" not in str(caught.value)


# ---- in and out -----------------------------------------------------------------------------------------------------


def test_taking_it_out_leaves_nothing(compressed: Compressed, tiny: Tiny) -> None:
    model, processor = tiny.model(), copy.deepcopy(tiny.processor)
    inputs = tiny.inputs(*samples(tiny, "mixed"))
    model.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        stock = model(**inputs).logits
    before, slots, draws = fingerprint(model), copy.deepcopy(vars(processor)), torch.get_rng_state()
    with ivtp.compress(model, processor, compressed.compression.name, tokens=compressed.tokens) as compression:
        assert torch.equal(torch.get_rng_state(), draws)
        assert isinstance(model.model.multi_modal_projector, Compressor)
        assert ivtp.compression_of(model) is compression
        model.generate(**compressed.inputs(*samples(tiny, "mixed")), max_new_tokens=2)
    assert difference(before, fingerprint(model)) == []
    assert {k: v for k, v in vars(processor).items() if isinstance(v, int)} == {
        k: v for k, v in slots.items() if isinstance(v, int)
    }
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
    compression.detach()  # twice does nothing


def test_weights_follow_from_the_seed(tiny: Tiny) -> None:
    for name in NAMES:
        geometry, tokens = sizes(tiny.model()).geometry, possible(name, tiny)[0]
        first, again, other = (
            torch.cat([p.flatten() for p in compressor_class(name).seeded(geometry, tokens, seed).parameters()])
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_model_that_was_moved_gets_a_moved_projector_back(tiny: Tiny) -> None:
    compressed = Compressed(tiny, "resampler")
    compressed.model.to(torch.bfloat16).train()
    compressed.ask()
    compressed.compression.detach()
    projector = compressed.model.model.multi_modal_projector
    assert {weight.dtype for weight in projector.parameters()} == {torch.bfloat16}
    assert projector.training


def test_nothing_prunes_behind_it(compressed: Compressed) -> None:
    model, processor = compressed.model, compressed.tiny.processor
    for act in (
        lambda: ivtp.attach(model, processor, method="topk", keep=4),
        lambda: ivtp.ask(model, processor, image(3), "?", method="ivtp", keep=4),
    ):
        with pytest.raises(AttachError, match=f"the compressor {compressed.compression.name} of this model") as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(AttachError, match="the compressor"):
        ivtp.compress(model, processor, "qformer", tokens=4)
    with pytest.raises(AttachError, match="cannot be copied"):
        copy.deepcopy(model)


def test_what_cannot_be_compressed_is_one_line_and_untouched(tiny: Tiny) -> None:
    model, processor = tiny.model(), copy.deepcopy(tiny.processor)
    before = fingerprint(model)
    with tiny.attach(model), pytest.raises(AttachError, match="a pruner is attached"):
        ivtp.compress(model, processor, "qformer", tokens=4)
    other = copy.deepcopy(processor)
    other.num_additional_image_tokens = -8
    for act, error, words in (
        (lambda: ivtp.compress(model, processor, "q-former", tokens=4), ConfigError, "did you mean qformer"),
        (lambda: ivtp.compress(model, processor.tokenizer, "qformer", tokens=4), ConfigError, "writes no image slots"),
        (lambda: ivtp.compress(model, other, "qformer", tokens=4), ConfigError, "writes 27 slots"),
        (lambda: ivtp.compress(model, processor, "cabstractor", tokens=7), ConfigError, "for example"),
        (lambda: ivtp.compress(model, processor, "qformer", tokens=37), ConfigError, "of 36 patches"),
    ):
        with pytest.raises(error, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", [name for name in ivtp.list_hosts() if not host_class(name).compressible])
def test_other_families_are_refused_for_what_they_are(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"LLaVA with a CLIP tower alone.* {name};") as caught:
        ivtp.compress(*host_class(name).tiny(), "qformer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READING)  # which have hooks to be copied
def test_peft_trains_a_copy_of_it_which_is_saved(tiny: Tiny, name: str, tmp_path: Path) -> None:
    compressed = Compressed(tiny, name)
    lora = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["multi_modal_projector"])
    wrapped = get_peft_model(compressed.model, lora)
    inputs = compressed.inputs(*samples(tiny, "one"))
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [p for n, p in wrapped.named_parameters() if "modules_to_save" in n]
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1.5)
    merged = wrapped.merge_and_unload()
    ivtp.save(merged, compressed.tiny.processor, tmp_path)
    answer = compressed.ask()
    loaded = ivtp.load(tmp_path)
    assert ivtp.ask(*loaded, image(3), QUESTIONS[0], max_new_tokens=5).text == answer
    for kept, parameter in zip(loaded[0].model.multi_modal_projector.parameters(), trained, strict=True):
        assert torch.equal(kept, parameter)
