"""PaliGemma's own: prompts whose tokens see each other in both directions, and a processor that frames them itself."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from gemma import multiplied_out
from reference import Prompt, Reference, check_stages, prompt_of
from tiny import with_cache
from torch import Tensor, nn
from transformers import DynamicCache

import ivtp
from ivtp import PruneConfig
from ivtp.core.schedule import uniform_ratio
from ivtp.errors import InputError, LoadError
from ivtp.hosts.paligemma import HOST
from ivtp.hosts.tiny import tiny_images
from ivtp.plug import find_host
from ivtp.prompt.chat import prompt_writer
from ivtp.prompt.instruction import InstructionReader
from ivtp.registry import host_class
from ivtp.stock import set_kernel
from tests.methods import naive

PATCHES = 36
ONE = (("What is left of the dog?", ((50, 40),)), ("How many bananas are there, near the house?", ((84, 84),)))
PROMPTS = (ONE[0], ("How many bananas are there?", ((30, 90), (84, 84))))


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def small(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return host_class(str(request.param)).tiny()


class InBothDirections(Reference):
    """The reference on a PaliGemma: Gemma's sums are Llama's once its norms and embeddings are multiplied out.

    Those of Gemma 2 are, once its norms behind each half, and what it divides logits by, belong to its matrices.
    """

    both_ways = True

    def __init__(self, model: nn.Module, config: PruneConfig) -> None:
        model = multiplied_out(model)
        inner = model.model
        inner.multi_modal_projector = nn.Sequential(inner.vision_tower.post_layernorm, inner.multi_modal_projector)
        self.cap = find_host(model).text.softcap
        super().__init__(model, None, config)

    def bend(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def slow_prompt(processor: Any, question: str, sizes: Any, suffix: str = "") -> Prompt:
    framed = f"{'<image>' * len(sizes)}<s>{question}\n{suffix}"
    prompt = prompt_of(processor, framed, question, tiny_images(question, sizes), PATCHES)
    answer = len(processor.tokenizer(suffix)["input_ids"]) if suffix else None
    return Prompt(prompt.ids, prompt.pixels, prompt.text, prompt.instruction, answer and len(prompt.ids) - answer)


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
    options = {"keep": 8, "guide": "text", "llm_layers": 6, **options}
    reference = InBothDirections(model, PruneConfig.of(**options))
    expected = [reference.run(slow_prompt(processor, *prompt)) for prompt in PROMPTS]
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**HOST.tiny_inputs(model, processor, PROMPTS)).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


def suffixed(processor: Any, suffixes: list[str]) -> dict[str, Any]:
    """A batch as the stock processor makes it to train on: what it says behind each prompt, and labels of that."""
    texts = [f"{'<image>' * len(sizes)}{question}" for question, sizes in PROMPTS]
    pictures = [tiny_images(question, sizes) for question, sizes in PROMPTS]
    made = processor(images=pictures, text=texts, suffix=suffixes, padding=True, return_tensors="pt")
    made["labels"][made["attention_mask"] == 0] = -100
    return dict(made)


def test_a_suffix_is_read_in_one_direction_and_does_not_lead(small: tuple[Any, Any]) -> None:
    """In training: as the stock model with all tokens, and as the reference with some of them."""
    model, processor = small
    suffixes = ["a cat", "seventeen"]
    inputs = suffixed(processor, suffixes)
    assert (inputs["token_type_ids"] * inputs["attention_mask"]).sum() > 0
    options: dict[str, Any] = {"guide": "text", "llm_layers": 6}
    with torch.no_grad():
        stock = model(**inputs)
        with ivtp.attach(model, processor, keep="100%", **options):
            ours = model(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], stock.logits[real], atol=1e-4, rtol=0)
    assert ours.loss.item() == pytest.approx(stock.loss.item(), abs=1e-5)
    reference = InBothDirections(model, PruneConfig.of(keep=8, **options))
    expected = [
        reference.run(slow_prompt(processor, *prompt, suffix=f"{suffix}</s>"))
        for prompt, suffix in zip(PROMPTS, suffixes, strict=True)
    ]
    with torch.no_grad(), ivtp.attach(model, processor, keep=8, **options) as pruner:
        logits = model(**inputs).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


class Decoder:
    """The stock decoder on one unpadded prompt, eager and without any mask; its columns leave by hand."""

    def __init__(self, model: Any, processor: Any, prompt: Any) -> None:
        self.module, entered = model.model.language_model, []
        inputs = HOST.tiny_inputs(model, processor, [prompt])
        hook = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        self.hidden: Tensor = entered[0]
        ids = inputs["input_ids"][0].tolist()
        self.columns = list(range(len(ids)))
        self.slots = [c for c in self.columns if ids[c] == model.config.image_token_id]
        self.asked = slow_prompt(processor, *prompt).instruction
        self.next = 0

    @property
    def visual(self) -> list[bool]:
        return [c in self.slots for c in self.columns]

    @property
    def patches(self) -> list[int]:
        return [self.slots.index(c) for c in self.columns if c in self.slots]

    def turn(self, first: int) -> Any:
        return self.module.rotary_emb(self.hidden, torch.tensor([self.columns]) + first)

    def attend(self, number: int) -> list[list[float]]:
        """Head-mean attention of the next layers' first."""
        layer = self.module.layers[number]
        _, weights = layer.self_attn(
            layer.input_layernorm(self.hidden), position_embeddings=self.turn(1), attention_mask=None
        )
        return weights[0].double().mean(0).tolist()

    def key_norms(self, number: int) -> list[float]:
        """L1 norms of a layer's keys, turned by positions that begin at 0."""
        layer = self.module.layers[number]
        key = layer.self_attn.k_proj(layer.input_layernorm(self.hidden))
        key = key.view(1, len(self.columns), -1, layer.self_attn.head_dim)
        (cos, sin), (first, second) = (part.unsqueeze(2) for part in self.turn(0)), key.chunk(2, dim=-1)
        turned = key * cos + torch.cat([-second, first], dim=-1) * sin
        return turned.abs().sum(dim=(2, 3))[0].double().tolist()

    def advance(self) -> list[list[float]]:
        rows = self.attend(self.next)
        self.hidden = self.module.layers[self.next](self.hidden, position_embeddings=self.turn(1), attention_mask=None)
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
        return self.patches


def eager(model: Any) -> Any:
    """A copy whose kernel caps logits in every release of transformers."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def slow(small: tuple[Any, Any]) -> list[Decoder]:
    model, processor = small
    with torch.no_grad():
        return [Decoder(eager(model), processor, prompt) for prompt in ONE]


def pruned(small: tuple[Any, Any], method: str, **options: Any) -> list[list[list[int]]]:
    """What each stage keeps of each prompt of a padded batch."""
    model, processor = eager(small[0]), small[1]
    with torch.no_grad(), ivtp.attach(model, processor, method=method, **options) as pruner:
        model(**HOST.tiny_inputs(model, processor, ONE))
    return [stage.kept.tolist() for stage in pruner.trace.stages]


@pytest.mark.parametrize("layer", [1, 2, 5])
@torch.no_grad()
def test_fastv_ranks_by_what_the_last_token_sees(small: tuple[Any, Any], layer: int) -> None:
    expected = []
    for decoder in slow(small):
        for _ in range(layer):
            rows = decoder.advance()
        expected.append(decoder.keep(decoder.ranked(rows[-1])[:9]))
    assert pruned(small, "fastv", keep=9, layer=layer) == [expected]


@torch.no_grad()
def test_pyramiddrop_looks_ahead_in_both_directions(small: tuple[Any, Any]) -> None:
    """Behind its first cut only what stayed is seen, in the right places."""
    counts, expected = uniform_ratio(PATCHES, 5, 3), [[], [], []]
    for decoder in slow(small):
        for stage, count in enumerate(counts):
            decoder.advance(), decoder.advance()
            rows = decoder.attend(decoder.next)
            expected[stage].append(decoder.keep(decoder.ranked(rows[-1])[:count]))
    assert pruned(small, "pyramiddrop", keep=5) == expected


@torch.no_grad()
def test_sparsevlm_counts_what_the_question_sees(small: tuple[Any, Any]) -> None:
    """Of 36 tokens 23 stay as they are, and one stands for the best three of the others."""
    (first, _, _) = pruned(small, "sparsevlm", keep=6, schedule=(24, 12, 6))
    for decoder, kept in zip(slow(small), first, strict=True):
        asked = [c in decoder.asked for c in decoder.columns]
        weights = naive.raters(decoder.hidden[0].double().tolist(), decoder.visual, asked)
        ranked = decoder.ranked(naive.weighted_sum(decoder.advance(), weights))
        assert set(ranked[:23]) < set(kept) <= set(ranked[:26])
        assert len(kept) == 24


@torch.no_grad()
def test_dart_compares_states_that_saw_the_whole_prompt(small: tuple[Any, Any]) -> None:
    expected = []
    for decoder in slow(small):
        decoder.advance()
        norms = decoder.key_norms(decoder.next)
        decoder.advance()
        hidden = decoder.module.norm(decoder.hidden[0]).double().tolist()
        asked = [c in decoder.asked for c in decoder.columns]
        expected.append(decoder.keep(naive.least_similar(hidden, norms, decoder.visual, asked, 9, 4)))
    assert pruned(small, "dart", keep=9) == [expected]


def test_a_call_that_does_not_say_what_sees_what_is_refused(small: tuple[Any, Any]) -> None:
    """Stock kernels disagree about such a call."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, PROMPTS)
    types = inputs.pop("token_type_ids")
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=4) as pruner:
        for wrong in (None, types[:, 1:]):
            for call in (model, functools.partial(model.generate, max_new_tokens=2)):
                with pytest.raises(InputError, match="token_type_ids") as caught:
                    call(**inputs, token_type_ids=wrong)
                assert "\n" not in str(caught.value)
        model(**inputs, token_type_ids=types)
        assert pruner.trace.kept().shape == (2, 8)


def test_flash_attention_is_refused() -> None:
    """Its kernels have no mask that hides the guide from a prompt that is read in both directions."""
    tower = find_host(HOST.tiny()[0]).text
    set_kernel(tower.module.config, "flash_attention_2")
    everything = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match='attn_implementation="sdpa"'):
        tower.causal_mask(torch.zeros(1, 3, 48), everything + 1, blocks=everything)


@pytest.mark.parametrize("images", [1, 2])
def test_the_question_is_what_was_typed(small: tuple[Any, Any], images: int) -> None:
    """Nothing of what the processor writes around it, and all of its columns."""
    model, processor = small
    question = "answer en What is left of the dog?"
    inputs = HOST.process(
        processor, [ivtp.prompt_for(processor, question, images=images)], [tiny_images("", [(50, 40)] * images)]
    )
    ids = inputs["input_ids"][0].tolist()
    columns = [c for c, token in enumerate(ids) if token != model.config.image_token_id]
    found = InstructionReader(processor).read([ids[c] for c in columns], columns)
    assert found.text == question
    assert found.columns == columns[1:-1]
    assert processor.tokenizer.decode([ids[c] for c in (columns[0], columns[-1])]) == "<s>\n"


def test_asking_answers_as_the_stock_processor_and_model_do(small: tuple[Any, Any]) -> None:
    model, processor = small
    picture, question = tiny_images("a", [(50, 40)])[0], "What is left of the dog?"
    stock = processor(images=picture, text=f"<image>{question}", return_tensors="pt")
    tokens = model.generate(**stock, max_new_tokens=5, do_sample=False)[0, stock["input_ids"].shape[1] :]
    expected = processor.decode(tokens, skip_special_tokens=True).strip()
    for options in ({"method": "none"}, {"method": "divprune", "keep": "100%"}):
        assert ivtp.ask(model, processor, picture, question, max_new_tokens=5, **options).text == expected


def test_a_conversation_is_refused_in_a_line(small: tuple[Any, Any]) -> None:
    writer = prompt_writer(small[1])
    assert writer.write_messages([("user", [None, "Is it ", None, "a cat?"])]) == "<image><image>Is it a cat?"
    with pytest.raises(LoadError, match="one question") as caught:
        writer.write([("user", "Why?"), ("assistant", "Because."), ("user", "And?")])
    assert "\n" not in str(caught.value)


def test_what_goes_beyond_the_sliding_window_is_refused_in_a_line() -> None:
    """Of a prompt at once, of an answer where it gets there; within it the model answers."""
    model, processor = host_class("paligemma2").tiny()
    (question, sizes), length = ONE[0], 60
    inputs = HOST.tiny_inputs(model, processor, [(question, sizes)])
    assert inputs["input_ids"].shape[1] < length - 2
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=4) as pruner:
        pruner.host.text.window = length
        long = HOST.tiny_inputs(model, processor, [(question * 3, sizes)])
        for call in (lambda: model(**long), lambda: model.generate(**inputs, max_new_tokens=30)):
            with pytest.raises(InputError, match="see 60 at once") as caught:
                call()
            assert "\n" not in str(caught.value)
        model.generate(**inputs, max_new_tokens=3)
        assert pruner.trace.kept().shape == (1, 4)


def test_a_cache_with_a_sliding_window_is_filled_like_any_other() -> None:
    """`generate` makes one by the config of the model."""
    model, processor = host_class("paligemma2").tiny()
    inputs = HOST.tiny_inputs(model, processor, ONE)
    cache = DynamicCache(config=model.config)
    assert any(cache.is_sliding)
    with torch.no_grad(), ivtp.attach(model, processor, method="fastv", keep=4):
        model(**inputs, **with_cache(model, cache))
        model(**inputs, **with_cache(model, other := DynamicCache()))
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def test_a_new_image_behind_a_cache_is_refused(small: tuple[Any, Any]) -> None:
    """What is cached cannot see it, and stock places its columns wrongly."""
    model, processor = small
    model = copy.deepcopy(model)
    first, both = (HOST.tiny_inputs(model, processor, [prompt]) for prompt in (ONE[0], (ONE[0][0], ONE[0][1] * 2)))
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    seen = first["input_ids"].shape[1]
    later = {**both, "input_ids": torch.cat([first["input_ids"], both["input_ids"]], 1)}
    later["attention_mask"] = torch.ones_like(later["input_ids"])
    later["token_type_ids"] = torch.zeros_like(later["input_ids"])
    later["pixel_values"] = torch.cat([first["pixel_values"], both["pixel_values"]])
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=8):
        held = model.generate(**first, **options).past_key_values
        held.crop(seen - held.get_seq_length())
        with pytest.raises(InputError, match="both directions"):
            model.generate(**later, **with_cache(model, copy.deepcopy(held)), **options)
        alone = {name: value[:, seen:] for name, value in later.items() if name.endswith("_ids")}
        with pytest.raises(InputError, match="both directions"):
            model(**alone, pixel_values=both["pixel_values"], **with_cache(model, held))
