"""DynamicViT's predictors learn from pictures, and what they learned prunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fingerprint import difference, fingerprint
from safetensors.torch import save_file
from tiny import NUM_PATCHES, Tiny, samples

import ivtp
from ivtp.config import PruneConfig
from ivtp.cost.sizes import sizes
from ivtp.errors import AttachError
from ivtp.registry import method_class
from ivtp.training.predictors import predictor_losses


def test_predictors_learn_and_prune(tiny: Tiny, tmp_path: Path) -> None:
    """Random ones drop half at each place; the plan wants nearly all, and so does the teacher."""
    torch.manual_seed(0)
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    model.requires_grad_(False)
    model(**inputs)
    before = fingerprint(model)
    method = method_class("dynamicvit")(PruneConfig(method="dynamicvit", keep=30), sizes(model).geometry)
    untrained = {name: weight.clone() for name, weight in method.predictors.state_dict().items()}
    optimizer = torch.optim.AdamW(method.predictors.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        losses = predictor_losses(model, method, inputs["pixel_values"])
        optimizer.zero_grad()
        losses.total.backward()
        assert all(weight.grad is not None for weight in method.predictors.parameters())
        optimizer.step()
        history.append((losses.ratio.item(), losses.total.item()))
    assert difference(before, fingerprint(model)) == []
    first, last = (torch.tensor(part).mean(dim=0) for part in (history[:5], history[-5:]))
    assert (last < first).all()
    assert last[0] < 0.02  # the share of the plan, 30 of 36 at last
    file = tmp_path / "predictors.safetensors"
    save_file(method.predictors.state_dict(), file)
    kept = []
    save_file(untrained, tmp_path / "untrained.safetensors")
    for predictors in (file, tmp_path / "untrained.safetensors"):
        with torch.no_grad(), tiny.attach(model, method="dynamicvit", predictors=str(predictors)) as pruner:
            model(**inputs)
            assert pruner.trace.kept().shape == (3, 8)
            assert "untrained" not in " ".join(pruner.trace.notes)
            kept.append(pruner.trace.kept().tolist())
    assert kept[0] != kept[1]


def test_masks_that_drop_nothing_change_nothing(tiny: Tiny) -> None:
    """With every token kept, the student is the teacher."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    method = method_class("dynamicvit")(PruneConfig(method="dynamicvit", keep=NUM_PATCHES), sizes(model).geometry)
    with torch.no_grad():
        for predictor in method.predictors:
            predictor.leave[-2].weight.zero_()
            predictor.leave[-2].bias.copy_(torch.tensor([100.0, -100.0]))  # keep
        losses = predictor_losses(model, method, inputs["pixel_values"])
    assert losses.distillation.item() == pytest.approx(0, abs=1e-6)
    assert losses.ratio.item() == 0


def test_a_pruned_model_is_refused(tiny: Tiny) -> None:
    model = tiny.model()
    method = method_class("dynamicvit")(PruneConfig(method="dynamicvit", keep=8), sizes(model).geometry)
    with ivtp.attach(model, method="topk", keep=4), pytest.raises(AttachError, match="a pruner is attached"):
        predictor_losses(model, method, torch.zeros(1, 3, 24, 24))
