"""The rule keeps apart what is apart, and its limit is where it was asked to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.micro.familiar import ALARMS, KINDS, SIZE, Rule, drawn


def test_a_rule_tells_two_clouds_apart() -> None:
    torch.manual_seed(0)
    known, validation = torch.randn(300, 8), torch.randn(400, 8)
    strange = torch.randn(100, 8) + 4.0
    rule = Rule.fit(known, strange, validation)
    assert sum(rule.strange(validation)) == pytest.approx(ALARMS * 400, abs=1)
    assert all(rule.strange(torch.randn(100, 8) + 4.0))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_drawn_pictures_are_the_same_every_time_and_differ(kind: object) -> None:
    first, second = drawn(kind, 2, seed=0)  # type: ignore[arg-type]
    assert first.size == (SIZE, SIZE)
    assert first.tobytes() == drawn(kind, 1, seed=0)[0].tobytes()  # type: ignore[arg-type]
    assert first.tobytes() != second.tobytes() != drawn(kind, 1, seed=1)[0].tobytes()  # type: ignore[arg-type]
    assert np.asarray(first).std() > 1
