"""Arguments of a call that stock transformers takes: the attached model does the same, or says in one line why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NUM_PATCHES, Tiny, samples, with_cache
from torch import Tensor
from transformers import DynamicCache

from ivtp.errors import InputError


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("where", ["argument", "generation config", "model's config"])
def test_a_prompt_that_is_to_be_read_in_chunks_is_pruned_whole(tiny: Tiny, where: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    options: dict[str, Any] = {}
    with tiny.attach(model) as pruner:
        whole = generate(model, inputs)
        kept = pruner.trace.kept().tolist()
        if where == "argument":
            options = {"prefill_chunk_size": 16}
        elif where == "generation config":
            model.generation_config.prefill_chunk_size = None
            options = {"generation_config": type(model.generation_config)(**model.generation_config.to_dict())}
            options["generation_config"].prefill_chunk_size = 16
        else:
            model.generation_config.prefill_chunk_size = 16
        assert generate(model, inputs, **options) == whole
        assert pruner.trace.kept().tolist() == kept


def test_the_model_drafts_for_itself(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model) as pruner:
        alone = generate(model, inputs)
        kept = pruner.trace.kept().tolist()
        assert generate(model, inputs, assistant_model=model) == alone
        assert pruner.trace.kept().tolist() == kept


@pytest.mark.parametrize("kind", ["offloaded", "static", "quantized"])
def test_a_cache_that_cannot_shrink_is_refused_with_what_to_do(tiny: Tiny, kind: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    if kind == "quantized":
        pytest.importorskip("optimum.quanto")
    if kind == "offloaded" and not torch.cuda.is_available() and torch.version.cuda:
        pytest.skip("a CUDA build of torch makes no stream without a GPU")
    with tiny.attach(model), pytest.raises(InputError, match="leave cache_implementation out") as caught:
        generate(model, inputs, cache_implementation=kind)
    assert "static" not in str(caught.value).replace("StaticCache", "")


def test_an_offloading_cache_of_the_users_is_refused(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    cache = DynamicCache()
    cache.offloading = True
    with tiny.attach(model), pytest.raises(InputError, match="offloaded"):
        model(**inputs, **with_cache(model, cache))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(tiny: Tiny, value: float) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    inputs["pixel_values"][0, 1, 2, 3] = value
    with tiny.attach(model), pytest.raises(InputError, match="pixel_values hold NaN"):
        generate(model, inputs)


def test_embeddings_beside_an_image_are_refused_with_what_to_do(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    with tiny.attach(model), pytest.raises(InputError, match="pass them instead of inputs_embeds"):
        model(**embedded)


def test_merged_embeddings_run_unpruned_with_a_word(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    merged = embeddings.masked_scatter((inputs["input_ids"] == tiny.processor.image_token_id)[..., None], features)
    with torch.no_grad(), tiny.attach(model) as pruner, pytest.warns(UserWarning, match="nothing is pruned"):
        model(inputs_embeds=merged, attention_mask=inputs["attention_mask"])
    assert pruner.trace is None


def test_guidance_by_a_second_prompt_keeps_the_record(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model) as pruner:
        generate(model, inputs)
        kept = pruner.trace.kept().tolist()
        generate(model, inputs, guidance_scale=1.5)
        assert pruner.trace is not None
        assert pruner.trace.kept().tolist() == kept


# ---- masks that hide image slots --------------------------------------------------------------------------------


def hidden_slots(tiny: Tiny, inputs: dict[str, Tensor], kind: str) -> Tensor:
    """The mask of two prompts with some slots of the first row hidden."""
    mask = inputs["attention_mask"].clone()
    slots = (inputs["input_ids"][0] == tiny.processor.image_token_id).nonzero().flatten()
    if kind == "inside":
        mask[0, slots[3:9]] = 0
    elif kind == "left":
        mask[0, : slots[5]] = 0
    else:
        mask[0, slots] = 0
    return mask


@pytest.mark.parametrize("kind", ["inside", "left", "whole image"])
def test_hidden_slots_keep_their_features_to_themselves(tiny: Tiny, kind: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    inputs["attention_mask"] = hidden_slots(tiny, inputs, kind)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with tiny.attach(model, keep=NUM_PATCHES):
            torch.testing.assert_close(model(**inputs).logits[real], stock[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["inside", "left"])
@pytest.mark.parametrize("method", ["ivtp", "topk", "fastv", "tome"])
def test_hidden_slots_do_not_change_another_prompt(tiny: Tiny, method: str, kind: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    with torch.no_grad(), tiny.attach(model, method=method) as pruner:
        plain = model(**inputs).logits
        kept = pruner.trace.kept()
        inputs["attention_mask"] = hidden_slots(tiny, inputs, kind)
        hidden = model(**inputs).logits
        torch.testing.assert_close(hidden[1:, -4:], plain[1:, -4:], atol=1e-5, rtol=1e-5)
        assert torch.equal(pruner.trace.kept()[1:], kept[1:])


def test_hidden_patches_leave_first(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    slots = (inputs["input_ids"][0] == tiny.processor.image_token_id).nonzero().flatten()
    inputs["attention_mask"][0, slots[:28]] = 0
    with torch.no_grad(), tiny.attach(model, method="fastv", keep=8) as pruner:
        model(**inputs)
    assert pruner.trace.kept()[0].tolist() == list(range(28, 36))
