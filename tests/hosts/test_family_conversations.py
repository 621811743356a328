"""In any family, the next turn of a conversation on the cache of the one before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from family import ONE, TWO, Family
from packaging.version import Version
from tiny import with_cache

from ivtp.errors import InputError


def generate(model: Any, inputs: dict[str, Any], count: int = 4, past_key_values: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        past = {} if past_key_values is None else with_cache(model, past_key_values)
        options = {"return_dict_in_generate": True, "output_logits": True, **past, **options}
        return model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)


def conversation(family: Family, *, images: bool) -> dict[str, Any]:
    """The inputs of two turns, the answer to the first between them; `images`: the second shows one too."""
    made = [family.inputs(ONE), family.inputs((TWO[0], ONE[1] if images else ()))]
    tokenizer = family.processor.tokenizer
    answer = tokenizer(" It is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    opened = int(made[1]["input_ids"][0, 0] == tokenizer.bos_token_id)
    kind = torch.full_like(answer, int(family.host.both_ways))  # where a question is read both ways, an answer is not
    between = {"input_ids": answer, **dict.fromkeys(family.host.of_columns, kind)}
    if "mm_token_type_ids" in made[0]:
        between["mm_token_type_ids"] = torch.zeros_like(answer)
    columns = {name: torch.cat([made[0][name], part, made[1][name][:, opened:]], 1) for name, part in between.items()}
    media = {name: torch.cat([p[name] for p in made if name in p]) for name in family.host.media if name in made[0]}
    return {**columns, "attention_mask": torch.ones_like(columns["input_ids"]), **media}


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=2e-4, rtol=0)


@pytest.mark.parametrize("repruning", ["first", "turn"])
def test_a_second_question_about_all_tokens_is_stock(family: Family, repruning: str) -> None:
    model, inputs, again = family.model(), family.inputs(ONE), conversation(family, images=False)
    if repruning == "turn":
        stock = generate(model, again)
    else:
        text = {name: value for name, value in again.items() if name not in family.host.media}
        stock = generate(model, text, past_key_values=generate(model, inputs, 1).past_key_values)
    with family.attach(model, keep="100%", repruning=repruning):
        same(generate(model, again, past_key_values=generate(model, inputs, 1).past_key_values), stock)


@pytest.mark.parametrize("images", [False, True], ids=["text", "a new image"])
def test_a_second_question_chooses_again_as_in_one_pass(family: Family, images: bool) -> None:
    model, inputs, again = family.model(), family.inputs(ONE), conversation(family, images=images)
    with family.attach(model, repruning="turn") as pruner:
        held = generate(model, inputs, 1).past_key_values
        expected, kept = generate(model, again), pruner.trace.kept()
        new = {n: v[len(v) // 2 :] if images else None for n, v in again.items() if n in family.host.media}
        for given in (again,) if family.host.generate_reads else (again, {**again, **new}):
            same(generate(model, given, past_key_values=copy.deepcopy(held)), expected)
            assert torch.equal(pruner.trace.kept(), kept)


def test_what_the_stock_model_reads_of_all_images_is_asked_for(family: Family) -> None:
    if not family.host.generate_reads:
        pytest.skip("the stock model reads what describes the images of a turn alone")
    model, inputs, again = family.model(), family.inputs(ONE), conversation(family, images=False)
    with family.attach(model, repruning="turn"):
        held = generate(model, inputs, 1).past_key_values
        text = {name: value for name, value in again.items() if name not in family.host.media}
        with pytest.raises(InputError, match="image_grid_thw of all images of the conversation"):
            generate(model, text, past_key_values=held)


def test_a_new_image_is_pruned_behind_the_cache(family: Family) -> None:
    """By a method that reads no question: turn by turn is one pass."""
    if family.host.both_ways:
        pytest.skip("the family reads all images in both directions, and refuses")
    if family.host.generate_reads and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before transformers 5.23 the stock generate gives a new image behind a cache the places of words")
    model, inputs, again = family.model(), family.inputs(ONE), conversation(family, images=True)
    with family.attach(model, "divprune"):
        expected = generate(model, again)
        same(generate(model, again, past_key_values=generate(model, inputs, 1).past_key_values), expected)
