"""Rows of a batch: questions about one image, no mask, padding on the right."""

from __future__ import annotations

import pytest
import torch
from tiny import QUESTIONS, Tiny, samples


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
