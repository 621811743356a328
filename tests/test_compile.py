"""A compiled model with a pruner attached decides and answers as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import Tiny, samples

# Dynamo explains its graph breaks in warnings
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", ["one", "batch"])
def test_a_compiled_model_keeps_the_same_tokens_and_gives_the_same_logits(tiny: Tiny, batch: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, batch))
    with torch.no_grad(), tiny.attach(model) as pruner:
        eager, kept = model(**inputs).logits, pruner.trace.kept()
        compiled = torch.compile(model, backend="eager")(**inputs).logits
        assert torch.equal(pruner.trace.kept(), kept)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("way", ["fullgraph", "export"])
def test_what_needs_a_single_graph_is_refused_by_torch_and_leaves_nothing(tiny: Tiny, way: str) -> None:
    """Which tokens stay is decided from values; `docs/compatibility.md` says so."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    in_one_graph = {
        "fullgraph": lambda model, inputs: torch.compile(model, backend="eager", fullgraph=True)(**inputs),
        "export": lambda model, inputs: torch.export.export(model, (), kwargs=dict(inputs)),
    }
    with torch.no_grad():
        stock = model(**inputs).logits
        with tiny.attach(model):
            pruned = model(**inputs).logits
            with pytest.raises(RuntimeError):
                in_one_graph[way](model, inputs)
            assert torch.equal(model(**inputs).logits, pruned)
        assert torch.equal(model(**inputs).logits, stock)
