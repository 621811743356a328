"""A `Method` class of the user's own is attached like a registered one, without editing the package."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, samples
from torch import Tensor

import ivtp
from ivtp.errors import ConfigError
from ivtp.methods.base import Cut, Method, MethodInfo, Plan, Window


class First(Method):
    """Keeps the first patches."""

    info = MethodInfo(title="First", year=2026, stage="vision", paper="(baseline)")

    def make_plan(self) -> Plan:
        return Plan((Cut("vision", self.geometry.vision_layers - 1, self.keep, place="behind"),))

    def score(self, window: Window) -> Tensor:
        return -window.patch.float()


def test_a_class_is_a_method(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), ivtp.attach(model, tiny.processor, method=First, keep=5) as pruner:
        model(**inputs)
        assert pruner.trace.kept().tolist() == [[0, 1, 2, 3, 4]]
    with torch.no_grad(), ivtp.attach(model, config=ivtp.PruneConfig(method=First, keep=2)) as pruner:
        model(**inputs)
        assert pruner.trace.kept().tolist() == [[0, 1]]


def test_a_class_is_asked_with_and_counted(tiny: Tiny) -> None:
    sample = tiny.sample()
    answer = ivtp.ask(tiny.model(), tiny.processor, sample.images[0], sample.question, method=First, keep=3)
    assert answer.trace.kept().tolist() == [[0, 1, 2]]
    costs = [ivtp.flops("llava-1.5-7b", method=method, keep=64).total for method in (First, "none")]
    assert costs[0] < costs[1]


def test_another_class_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"subclass ivtp\.methods\.base\.Method"):
        ivtp.attach(tiny.model(), tiny.processor, method=dict, keep=5)


def test_a_name_in_place_of_a_config_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="name options"):
        ivtp.attach(tiny.model(), tiny.processor, "topk")  # type: ignore[arg-type]
