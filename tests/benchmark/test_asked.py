"""What a benchmark can be asked, and which configurations that makes."""

from __future__ import annotations

from typing import Any

import pytest

from ivtp.benchmark.asked import Asked, Point
from ivtp.errors import ConfigError


def test_a_grid_has_every_combination_with_keep_outermost() -> None:
    points = Asked(keeps=(64, "11%"), texts=(32, 64), batches=(1, 4)).points()
    assert len(points) == 8
    assert points[:3] == [Point(64, 32, 1, 1), Point(64, 32, 1, 4), Point(64, 64, 1, 1)]
    assert [point.keep for point in points] == [64] * 4 + ["11%"] * 4


def test_growth_varies_one_axis_at_a_time() -> None:
    asked = Asked(growth=True)
    points = asked.points()
    assert asked.tokens == 0
    assert points[0] == Point(64, 32, 1, 1)
    assert max(point.text for point in points) == 4096
    assert {point.images for point in points} == {1, 5, 20}
    assert {point.batch for point in points} == {1, 2, 4, 8, 16, 32}
    assert {p.text for p in points if p.images > 1 or p.batch > 1} == {128}  # 20 placeholders need more than 32
    assert all(sum((p.text != 128, p.images != 1, p.batch != 1)) <= 1 for p in points)
    assert len(points) == 6 + 2 + 5
    assert len(Asked(growth=True, texts=(32, 64), images=(1,), batches=(1,)).points()) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("ivpt",)}, "did you mean ivtp"),
        ({"methods": ("ivtp", "ivtp")}, "twice"),
        ({"keeps": (0,)}, "keep=0"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"layers": (4, 8)}, "--geometry"),
        ({"options": {"nothing": 1}}, "nothing"),
        ({"options": {"guide": "nobody"}}, "guide"),
        ({"texts": (6,), "images": (5,)}, "7 or more"),
        ({"growth": True, "keeps": (32, 64)}, "one --keep"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Asked(**changes)


def test_options_go_to_the_methods_that_take_them() -> None:
    asked = Asked(methods=("ivtp", "topk"), options={"aggregation": "mean", "where": "layers"}, seed=3)
    assert asked.values_for("ivtp") == {"aggregation": "mean", "seed": 3}
    assert asked.values_for("topk") == {"where": "layers", "seed": 3}
