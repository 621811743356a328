"""A compiled model with a pruner attached decides and answers as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import Tiny, samples
from torch import nn


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shallow(model: nn.Module) -> nn.Module:
    """With as many layers as two groups need: Dynamo's time grows with them."""
    tower, decoder = model.model.vision_tower, model.model.language_model
    for config, stack, count in ((tower.config, tower.encoder, 4), (decoder.config, decoder, 3)):
        stack.layers, config.num_hidden_layers = stack.layers[:count], count
    return model


@pytest.mark.parametrize(
    ("depth", "batch"),
    [("shallow", "one"), *(pytest.param("whole", b, marks=pytest.mark.slow) for b in ("one", "batch"))],
)
def test_a_compiled_model_keeps_the_same_tokens_and_gives_the_same_logits(tiny: Tiny, depth: str, batch: str) -> None:
    """And Dynamo warns of nothing: a warning fails a test."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, batch))
    changes = {}
    if depth == "shallow":
        model, changes = shallow(model), {"llm_layers": 3}
    with torch.no_grad(), tiny.attach(model, **changes) as pruner:
        eager, kept = model(**inputs).logits, pruner.trace.kept()
        assert [stage.where for stage in pruner.trace.stages][-2:] == (["vision", "llm"] if changes else ["llm"] * 2)
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
