"""A sample is pruned the same way, and answers the same, alone and in any left-padded batch."""

from __future__ import annotations

import pytest
import torch
from tiny import QUESTIONS, Sample, Tiny, generated, samples

import ivtp

METHODS = [m for m in ivtp.list_methods() if m != "random"]


def alone(tiny: Tiny, batch: list[Sample], **changes: object) -> list[tuple[list[int], list[int]]]:
    """Kept patches and generated tokens of each sample by itself."""
    model, rows = tiny.model(), []
    with tiny.attach(model, **changes) as pruner:
        for sample in batch:
            inputs = tiny.inputs(sample)
            tokens = generated(model.generate(**inputs, max_new_tokens=6, do_sample=False), inputs)[0]
            kept = [] if not sample.images else [i for i in pruner.trace.kept()[0].tolist() if i >= 0]
            rows.append((kept, tokens.tolist()))
    return rows


def together(tiny: Tiny, batch: list[Sample], **changes: object) -> list[tuple[list[int], list[int]]]:
    model, inputs = tiny.model(), tiny.inputs(*batch)
    with tiny.attach(model, **changes) as pruner:
        tokens = generated(model.generate(**inputs, max_new_tokens=6, do_sample=False), inputs)
    kept = [[i for i in row if i >= 0] for row in pruner.trace.kept().tolist()]
    return list(zip(kept, tokens.tolist(), strict=True))


@pytest.mark.parametrize("name", ["batch", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_alone_and_in_a_batch(tiny: Tiny, method: str, name: str) -> None:
    batch = samples(tiny, name)
    assert together(tiny, batch, method=method) == alone(tiny, batch, method=method)


@pytest.mark.parametrize("stages", ["vision", "llm"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("cache", ["evict", "layered"])
def test_options_in_a_mixed_batch(tiny: Tiny, stages: str, positions: str, cache: str) -> None:
    batch = samples(tiny, "mixed")
    options = {"stages": stages, "positions": positions, "cache": cache}
    assert together(tiny, batch, **options) == alone(tiny, batch, **options)


@pytest.mark.parametrize("guide", ["text", "clip", "weighted", "visual"])
def test_guides_in_a_mixed_batch(tiny: Tiny, guide: str) -> None:
    batch = samples(tiny, "mixed")
    assert together(tiny, batch, guide=guide) == alone(tiny, batch, guide=guide)


def test_the_order_of_the_batch_does_not_matter(tiny: Tiny) -> None:
    batch = samples(tiny, "mixed")
    assert together(tiny, batch[::-1]) == together(tiny, batch)[::-1]


def test_much_padding(tiny: Tiny) -> None:
    """A question of a few tokens beside one of hundreds."""
    batch = [tiny.sample("Cat?", seed=4), tiny.sample(" ".join(QUESTIONS * 4), seed=5)]
    assert together(tiny, batch) == alone(tiny, batch)


def test_different_questions_about_one_image(tiny: Tiny) -> None:
    """Stage 1 does not know the question, stage 2 does."""
    batch = [tiny.sample(q, seed=10) for q in QUESTIONS]
    model, inputs = tiny.model(), tiny.inputs(*batch)
    with torch.no_grad(), tiny.attach(model) as pruner:
        model(**inputs)
    first, final = pruner.trace.kept("vision").tolist(), pruner.trace.kept().tolist()
    assert all(row == first[0] for row in first)
    assert len({tuple(row) for row in final}) > 1


def test_plain_forward_without_a_mask(tiny: Tiny) -> None:
    """A batch without padding needs no attention mask."""
    inputs = tiny.inputs(*samples(tiny, "one"))
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model):
        masked = model(**inputs).logits[:, -1]
        inputs.pop("attention_mask")
        torch.testing.assert_close(model(**inputs).logits[:, -1], masked, atol=1e-5, rtol=0)


def test_padding_on_the_right(tiny: Tiny) -> None:
    """Training pads on the right: the same patches stay, and the real tokens predict the same."""
    batch = samples(tiny, "batch")
    left = tiny.inputs(*batch)
    lengths = left["attention_mask"].sum(1).tolist()
    right = {k: v.clone() for k, v in left.items()}
    for b, n in enumerate(lengths):
        for key, pad in (("input_ids", tiny.processor.tokenizer.pad_token_id), ("attention_mask", 0)):
            right[key][b] = torch.cat([left[key][b, -n:], left[key].new_full((len(left[key][b]) - n,), pad)])
    labels = [x["input_ids"].clone() for x in (left, right)]
    for label, padded in zip(labels, (left, right), strict=True):
        # The first real token has no prediction on the right and a meaningless one behind padding on the left.
        label[padded["attention_mask"].cumsum(1) <= 1] = -100
        label[(label == tiny.processor.image_token_id) | (padded["attention_mask"] == 0)] = -100
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model) as pruner:
        loss = model(**left, labels=labels[0]).loss
        kept = pruner.trace.kept().tolist()
        assert model(**right, labels=labels[1]).loss == pytest.approx(loss.item(), abs=1e-4)
        assert pruner.trace.kept().tolist() == kept
