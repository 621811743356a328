"""In any family: what a pruner does from `attach` to `detach`, and that the model is then as it was."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family import BATCHES, KEEP, METHODS, NONE, ONE, TWO, Family, generated
from fingerprint import difference, fingerprint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ivtp
from ivtp.errors import InputError
from ivtp.hosts.tiny import tiny_images
from ivtp.plug import find_host

# peft still asks transformers for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture
def model(family: Family) -> Any:
    """A model that has run once, so that lazily built attributes of the stock code exist already."""
    model = family.model()
    model.generate(**family.inputs(ONE), max_new_tokens=2)
    return model


@pytest.mark.parametrize("method", ivtp.list_methods())
def test_every_method_runs_or_is_refused_and_leaves_nothing(family: Family, model: Any, method: str) -> None:
    """All that one does with an attached model. A family that lacks what a method needs says so in a line."""
    inputs = family.inputs(*BATCHES["mixed"])
    with torch.no_grad():
        stock = model(**inputs).logits
    before = fingerprint(model)
    side = fingerprint(family.clip[0]) if family.clip else {}
    refusal = family.refusal(model, method)
    if refusal is None:
        with family.attach(model, method):
            assert model(**inputs).logits.isfinite().all()
            model.generate(**inputs, max_new_tokens=3)
            model.generate(**family.inputs(NONE), max_new_tokens=2, num_beams=2)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            model.zero_grad(set_to_none=True)
    else:
        assert method not in family.everywhere
        assert method in refusal or "keep=" in refusal, "too few tokens of an image that may be large"
        assert "\n" not in refusal
    assert difference(before, fingerprint(model)) == []
    assert difference(side, fingerprint(family.clip[0]) if family.clip else {}) == []
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method", ivtp.list_methods())
def test_trace(family: Family, method: str) -> None:
    batch = BATCHES["mixed"]
    model = family.model()
    with torch.no_grad(), family.attach(model, method) as pruner:
        model(**family.inputs(*batch))
    trace = pruner.trace
    assert list(trace.images) == [len(sizes) for _, sizes in batch]
    assert trace.stages
    assert trace.seconds > 0
    assert trace.flops > 0
    assert len(trace.words) == len(trace.fallback) == len(batch)
    there = [set(range(sum(family.counts(sizes)))) for _, sizes in batch]
    for stage in trace.stages:
        tower = {"vision": find_host(model).vision, "llm": find_host(model).text}[stage.where]
        assert 0 <= stage.layer < len(tower.layers)
        assert stage.kept.dtype == torch.int64
        assert stage.scores is not None or stage.sources is not None, "a cut ranks, or it says what merged"
        assert stage.stand_ins is None or stage.stand_ins.shape == stage.kept.shape
        for place, row in enumerate(stage.kept.tolist()):
            kept = [i for i in row if i >= 0]
            assert row == sorted(set(kept)) + [-1] * (len(row) - len(kept)), "in order, none twice, -1 at the end"
            real = stage.candidates[place] >= 0
            assert set(kept) <= set(stage.candidates[place][real].tolist()) <= there[place], "what was cut is gone"
            there[place] = set(kept)
            if stage.scores is not None:
                assert not stage.scores[place][real].isnan().any()
                assert (stage.scores[place][~real] == -torch.inf).all()
    for prompt, row in zip(batch, trace.kept().tolist(), strict=True):
        for image in family.kept_of_each_image(prompt, row):
            assert abs(len(image) - KEEP) <= (2 if method == "spatial" else 0)


def test_the_words_of_the_question_lead(family: Family) -> None:
    """Those that are relevant to the picture, by CLIP, and not the others; a guide without words has none."""
    if family.clip is None:
        pytest.skip("the tower of this family is no CLIP's")
    found = []
    for guide in ("instruction", "visual"):
        with torch.no_grad(), family.attach(model := family.model(), guide=guide) as pruner:
            model(**family.inputs(ONE))
        found.append(pruner.trace.words[0] if pruner.trace.words else [])
    assert [word.text for word in found[0]] == [*ONE[0].rstrip("?").split(), "?"]
    assert {word.used for word in found[0]} == {True, False}
    assert all(word.used == (word.score > 0.06) for word in found[0])
    assert found[1] == []


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_forward_that_dies(family: Family, model: Any, tower: str) -> None:
    """The next one prunes as ever, and detaching still restores everything."""
    inputs = family.inputs(*BATCHES["mixed"])
    with torch.no_grad(), family.attach(other := family.model()):
        expected = other(**inputs).logits[:, -1]
        model(**inputs)
    before = fingerprint(model)
    *_, last = (part for part in getattr(find_host(model), tower).layers[4].modules() if isinstance(part, nn.Linear))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with torch.no_grad(), family.attach(model):
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs)
        handle.remove()
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected)
    assert difference(before, fingerprint(model)) == []


def test_wrong_inputs_are_a_clear_line(family: Family, model: Any) -> None:
    """One slot too few, one picture too few, pixels that are no numbers; the model prunes on afterwards."""
    inputs = family.inputs(TWO)
    slot = int((inputs["input_ids"][0] == family.image_token).nonzero()[0])
    columns = [c for c in range(inputs["input_ids"].shape[1]) if c != slot]
    of_tokens = [k for k, v in inputs.items() if v.shape == inputs["input_ids"].shape]
    short = {**inputs, **{k: inputs[k][:, columns] for k in of_tokens}}
    picture = {k: v[:1] if len(v) > 1 or v.dim() == 1 else v[:, :1] for k, v in inputs.items() if k not in of_tokens}
    fewer = {**inputs, **picture}
    spoilt = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    spoilt["pixel_values"].view(-1)[3] = float("nan")
    with torch.no_grad(), family.attach(model) as pruner:
        expected = model(**inputs).logits
        for wrong, says in ((short, "image"), (fewer, "image"), (spoilt, "NaN")):
            for call in (model, functools.partial(model.generate, max_new_tokens=2)):
                with pytest.raises(InputError, match=says) as caught:
                    call(**wrong)
                assert "\n" not in str(caught.value)
        assert torch.equal(model(**inputs).logits, expected)
        assert pruner.trace.kept().shape == (1, 2 * KEEP)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_kept_tokens(family: Family, method: str) -> None:
    """All weights have finite gradients, and the pixels have some: nothing but kept tokens can carry them."""
    model, inputs = family.model().train(), family.inputs(*BATCHES["mixed"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == family.image_token] = -100
    inputs["pixel_values"].requires_grad_()
    with family.attach(model, method):
        model(**inputs, labels=labels).loss.backward()
    pixels = inputs["pixel_values"].grad
    assert pixels.isfinite().all()
    given = [picture.any() for picture in inputs["pixel_values"]]
    assert [picture.any() for picture in pixels] == given, "of every picture something was kept"
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ivtp.list_methods())
def test_half_precision_runs(family: Family, method: str) -> None:
    model, inputs = family.model(dtype=torch.bfloat16), family.inputs(*BATCHES["mixed"], dtype=torch.bfloat16)
    with torch.no_grad(), family.attach(model, method) as pruner:
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert pruner.trace.kept().shape == (4, 3 * KEEP)


@pytest.mark.parametrize("order", ["attach first", "LoRA first", "LoRA first, inner model attached"])
def test_lora(family: Family, order: str) -> None:
    """Trains its own weights alone, keeps the same tokens whichever came first, and is stock PEFT when detached."""
    text = find_host(family.model()).text.module
    name = next(name for name, module in family.model().named_modules() if type(module) is type(text))
    lora = LoraConfig(r=4, target_modules=rf"{name}.*(q_proj|v_proj)", init_lora_weights=False)
    inputs = family.inputs(*BATCHES["mixed"])

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, lora)

    def greedy(model: Any) -> list[list[int]]:
        return model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()

    plain = greedy(adapted(family.model()))
    model = family.model()
    wrapped = adapted(model) if order.startswith("LoRA first") else None
    pruner = family.attach(wrapped if order == "LoRA first" else model)
    wrapped = wrapped or adapted(model)
    loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    kept = pruner.trace.kept()
    assert trained
    assert all("lora" in name for name in trained)
    assert kept.shape == (4, 3 * KEEP)
    pruner.detach()
    assert greedy(wrapped) == plain
    with family.attach(wrapped, keep="100%"):
        assert greedy(wrapped) == plain
    with family.attach(wrapped) as again:
        assert wrapped(**inputs, labels=inputs["input_ids"]).loss.item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.equal(again.trace.kept(), kept)


def test_saving_an_attached_model_writes_a_stock_checkpoint(family: Family, tmp_path: Path) -> None:
    model = family.model()
    model.save_pretrained(tmp_path / "stock")
    with family.attach(model):
        model.save_pretrained(tmp_path / "attached")
        assert list(model.state_dict()) == list(family.model().state_dict())
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert names == {path.name for path in (tmp_path / "attached").iterdir()}
    for name in names - {"model.safetensors"}:
        stock, attached = (json.loads((tmp_path / folder / name).read_text()) for folder in ("stock", "attached"))
        assert stock == attached, name
    stock, attached = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "attached"))
    assert stock.keys() == attached.keys()
    assert all(torch.equal(stock[key], attached[key]) for key in stock)


def test_a_saved_model_loads_answers_and_is_pruned_as_the_model_was(family: Family, tmp_path: Path) -> None:
    question, sizes = ONE
    model, inputs = family.model(), family.inputs(ONE)
    with torch.no_grad():
        stock = model(**inputs).logits
    with torch.no_grad(), family.attach(model, "divprune") as pruner:
        model.save_pretrained(tmp_path)
        tokens = generated(model.generate(**inputs, max_new_tokens=5, do_sample=False), inputs)
        kept = pruner.trace.kept()
    if family.has_stock_processor:
        family.processor.save_pretrained(tmp_path)
        loaded, processor = ivtp.load(tmp_path)
    else:
        loaded, processor = type(model).from_pretrained(tmp_path), family.processor
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, stock, atol=1e-5, rtol=0)
    before, picture = fingerprint(loaded), tiny_images(question, sizes)[0]
    answer = ivtp.ask(loaded, processor, picture, question, method="divprune", keep=KEEP, max_new_tokens=5)
    assert answer.text == family.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert torch.equal(answer.trace.kept(), kept)
    assert difference(before, fingerprint(loaded)) == []


def counted(family: Family, method: str, prompt: Any, **changes: Any) -> tuple[float, float]:
    """FLOPs of one pruned prefill: what the trace says, and what a counter of matrix products sees."""
    model, inputs = family.model("eager"), family.inputs(prompt)
    if family.clip is not None:
        family.clip[0].set_attn_implementation("eager")
    with torch.no_grad(), family.attach(model, method, **changes) as pruner, FlopCounterMode(display=False) as counter:
        model(**inputs)
    return pruner.trace.flops, counter.get_total_flops()


@pytest.mark.parametrize("prompt", [ONE, TWO], ids=["one", "two images"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_the_decoder_costs_what_a_counter_sees(family: Family, method: str, prompt: Any) -> None:
    """What is saved by keeping fewer tokens, so that the encoder, which these methods leave alone, does not count."""
    said, seen = zip(*(counted(family, method, prompt, keep=keep) for keep in ("100%", 4)), strict=True)
    assert said[0] - said[1] == pytest.approx(seen[0] - seen[1], rel=0.01)
    assert seen[1] < seen[0]


@pytest.mark.parametrize("prompt", [ONE, TWO], ids=["one", "two images"])
def test_all_of_it_costs_what_a_counter_sees(family: Family, prompt: Any) -> None:
    """Where the projector, or CLIP's guide, reads the whole encoder: nothing runs that is not counted."""
    size = family.host.geometry(family.model().config)
    if family.clip is None and size.vision_layers < size.vision_depth:
        pytest.skip("without CLIP's guide some encoder layers lead nowhere")
    said, seen = counted(family, "ivtp", prompt)
    assert said == pytest.approx(seen, rel=0.01)
