"""Torch's default dtype is the process's, and other threads change it while they load a model: nothing may read it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import Tiny, samples

import ivtp


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("method", [*ivtp.list_methods(), "visionzip+fastv"])
def test_every_method_is_the_same_under_any_default_dtype(tiny: Tiny, default_dtype: torch.dtype, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    with torch.no_grad():
        with tiny.attach(model, method=method) as pruner:
            expected, kept = model(**inputs).logits, pruner.trace.kept()
        torch.set_default_dtype(default_dtype)
        with tiny.attach(model, method=method) as pruner:
            logits = model(**inputs).logits
            assert torch.equal(pruner.trace.kept(), kept)
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.2 if default_dtype != torch.float64 else 1e-5, rtol=0)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("guide", ["instruction", "text", "clip", "weighted", "visual"])
def test_every_guide_under_any_default_dtype(tiny: Tiny, default_dtype: torch.dtype, guide: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    with torch.no_grad():
        with tiny.attach(model, guide=guide) as pruner:
            model(**inputs)
            expected = pruner.trace
        torch.set_default_dtype(default_dtype)
        with tiny.attach(model, guide=guide) as pruner:
            model(**inputs)
            found = pruner.trace
    assert torch.equal(found.kept(), expected.kept())
    assert [[w.text for w in row] for row in found.words] == [[w.text for w in row] for row in expected.words]
