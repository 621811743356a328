"""Which parameters learn, on every family."""

from __future__ import annotations

import pytest
from torch import nn

from ivtp.plug import find_host
from ivtp.registry import host_class, list_hosts
from ivtp.training.stages import FINETUNE, PRETRAIN, linear_layers, modules_of, parts_of, set_trainable


@pytest.mark.parametrize("name", list_hosts())
def test_parts_hold_every_parameter_once(name: str) -> None:
    model, _ = host_class(name).tiny()
    host = find_host(model)
    parts = parts_of(host)
    named = [each for names in parts.values() for each in names]
    assert sorted(named) == sorted(each for each, _ in model.named_parameters())
    assert all(parts.values())
    inside = {id(p) for module in host.vision.projectors for p in module.parameters()}
    tower = sum(p.numel() for p in host.vision.module.parameters() if id(p) not in inside)
    assert sum(model.get_parameter(each).numel() for each in parts["tower"]) == tower
    learned = [each for each in modules_of(model, parts["projector"]) if each]
    assert learned
    assert not any(isinstance(module, nn.Linear) for module in model.modules() if module is host.vision.module)
    assert len(linear_layers(host)) == 7 * host.size.text_layers


@pytest.mark.parametrize("stage", [PRETRAIN, FINETUNE], ids=lambda stage: stage.name)
@pytest.mark.parametrize("name", list_hosts())
def test_a_stage_freezes_the_tower(name: str, stage: object) -> None:
    model, _ = host_class(name).tiny()
    parts = parts_of(find_host(model))
    set_trainable(model, parts, stage.learns)
    learned = {each for each, p in model.named_parameters() if p.requires_grad}
    assert learned == {each for part in stage.learns for each in parts[part]}
    assert not learned & set(parts["tower"])
