"""Coverage and the probe count right."""

from __future__ import annotations

import pytest
import torch

from ivtp.micro import world
from ivtp.micro.world.photo import take_photo
from recipes.micro.coverage import average_precision, covered, fit_linear


@pytest.mark.parametrize("index", range(6))
def test_an_object_is_covered_by_any_of_its_patches(index: int) -> None:
    photo = take_photo("test", index)
    number = len(photo.scene.objects)
    assert covered(photo, []) == (0, number)
    assert covered(photo, range(576)) == (number, number)
    one = world.patches_of(photo.scene, [0])[-1:]
    on = [i for i in range(number) if one[0] in world.patches_of(photo.scene, [i])]
    assert covered(photo, one) == (len(on), number)


def test_average_precision_of_known_rankings() -> None:
    truth = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([4.0, 1.0, 3.0, 2.0]), truth) == 1
    assert average_precision(torch.tensor([1.0, 4.0, 2.0, 3.0]), truth) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_the_probe_finds_what_is_linear_and_nothing_else() -> None:
    torch.manual_seed(0)
    features = torch.randn(600, 8)
    truth = torch.stack([features @ torch.randn(8) > 1, torch.rand(600) > 0.7], dim=1)
    scores = fit_linear(features[:400], truth[:400])(features[400:])
    linear, chance = (average_precision(scores[:, i], truth[400:, i]) for i in range(2))
    assert linear > 0.98
    assert chance < 0.5
