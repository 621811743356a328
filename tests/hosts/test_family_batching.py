"""A prompt of any family is pruned the same way, and answers the same, alone and in any left-padded batch."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from family import BATCHES, METHODS, NONE, ONE, THREE, TWO, Family, Prompt, generated

import ivtp
from ivtp.methods.base import READS_CLIP, Guide

Row = tuple[list[int], list[int]]


def together(family: Family, batch: tuple[Prompt, ...], **options: Any) -> list[Row]:
    """Kept patches and generated tokens of each prompt of one batch."""
    model, inputs = family.model(), family.inputs(*batch)
    with family.attach(model, **options) as pruner:
        tokens = generated(model.generate(**inputs, max_new_tokens=5, do_sample=False), inputs).tolist()
        trace = pruner.trace
    kept = [[i for i in row if i >= 0] for row in trace.kept().tolist()] if trace else [[]]
    return list(zip(kept, tokens, strict=True))


def alone(family: Family, batch: tuple[Prompt, ...], **options: Any) -> list[Row]:
    """The same of each prompt by itself."""
    return [together(family, (prompt,), **options)[0] for prompt in batch]


@pytest.mark.parametrize("method", [m for m in ivtp.list_methods() if m != "random"])
def test_alone_and_in_a_batch(family: Family, method: str) -> None:
    """No, one, two and three images of different sizes. (`random` draws for a place in the batch.)"""
    batch = BATCHES["mixed"]
    assert together(family, batch, method=method) == alone(family, batch, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_one_image_in_each_row(family: Family, method: str) -> None:
    batch = (ONE, ("Is it a cat", ((90, 30),)), ("How many bananas are there?", ((40, 120),)))
    assert together(family, batch, method=method) == alone(family, batch, method=method)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "compact"},
        {"cache": "layered"},
        {"stages": "vision", "positions": "compact", "cache": "layered"},
        {"stages": "llm", "positions": "compact", "cache": "layered"},
        {"budget": "prompt"},
        {"keep": "25%"},
        *({"guide": guide} for guide in get_args(Guide) if guide != "instruction"),
    ],
    ids=str,
)
def test_options_in_a_mixed_batch(family: Family, options: dict[str, Any]) -> None:
    if options.get("guide") in READS_CLIP and family.clip is None:
        pytest.skip("the tower of this family is no CLIP's")
    if options.get("stages") == "vision" and "inside" not in family.host.cuts:
        pytest.skip("the encoder of this family is not cut inside a layer")
    batch = BATCHES["mixed"]
    assert together(family, batch, **options) == alone(family, batch, **options)


def test_the_order_of_the_batch_does_not_matter(family: Family) -> None:
    batch = BATCHES["mixed"]
    assert together(family, batch[::-1]) == together(family, batch)[::-1]


def test_much_padding(family: Family) -> None:
    """A question of a few tokens beside one of hundreds."""
    batch = (("Cat?", ONE[1]), (f"{ONE[0]} {TWO[0]} " * 4, ONE[1]))
    assert together(family, batch) == alone(family, batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1, 8, "25%"])
def test_every_image_keeps_its_own_budget(family: Family, method: str, keep: int | str) -> None:
    batch = (ONE, TWO, NONE, THREE)
    model = family.model()
    with torch.no_grad(), family.attach(model, method, keep=keep) as pruner:
        model(**family.inputs(*batch))
    assert list(pruner.trace.images) == [1, 2, 0, 3]
    for prompt, row in zip(batch, pruner.trace.kept().tolist(), strict=True):
        found = [len(kept) for kept in family.kept_of_each_image(prompt, row)]
        counts = family.counts(prompt[1])
        assert found == [max(1, round(n / 4)) if keep == "25%" else keep for n in counts]


@pytest.mark.parametrize("method", ["fastv", "ivtp", "sparsevlm"])
def test_images_of_a_prompt_may_share_their_budgets(family: Family, method: str) -> None:
    model = family.model()
    with torch.no_grad(), family.attach(model, method, keep=5, budget="prompt") as pruner:
        model(**family.inputs(TWO, THREE))
    for prompt, row in zip((TWO, THREE), pruner.trace.kept().tolist(), strict=True):
        assert sum(map(len, family.kept_of_each_image(prompt, row))) == 5 * len(prompt[1])
