"""Published figures name their papers and our methods, stand beside ours, and the rank correlation is Spearman's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp import list_methods
from ivtp.errors import IvtpError
from ivtp.evaluation import published
from ivtp.evaluation.asked import Asked, Run
from ivtp.evaluation.published import published_shares, ranked, spearman


def test_every_figure_names_its_paper_its_table_and_a_method_of_ours() -> None:
    for source in published.sources():
        assert source["paper"].startswith("https://arxiv.org/abs/")
        assert source["title"]
        assert source["table"]
        assert source["figures"].keys() <= set(list_methods())
        assert all(0.4 < figure / source["full"] < 1 for figure in source["figures"].values())
    assert "ivtp" not in published_shares()


def test_known_correlations() -> None:
    assert ranked([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    assert spearman([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1)
    assert spearman([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1)
    assert spearman([(1, 1), (2, 3), (3, 2), (4, 4)]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([(1, 5), (2, 5)]) == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=12))
def test_only_the_order_counts(pairs: list[tuple[int, int]]) -> None:
    stretched = [(a**3, 2.5 * b - 7) for a, b in pairs]
    assert spearman(stretched) == pytest.approx(spearman(pairs))
    assert -1.0001 <= spearman(pairs) <= 1.0001


@pytest.fixture
def reproduced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`make` of `ivtp reproduce published` where methods score what is said, in points of 0 to 100."""
    pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")
    from ivtp.evaluation.ratios import Ratios
    from ivtp.evaluation.reproduce import base
    from ivtp.evaluation.reproduce import published as table
    from ivtp.evaluation.sweep import Measured

    def measured(points: int) -> Measured:
        right = np.array([[float(item < points)] for item in range(100)])
        part = Ratios(right, np.ones_like(right), tuple(range(100)), 100.0)
        return Measured({"GQA": float(points)}, {"GQA": part}, {}, {})

    def make(points: Mapping[str, int], model: str = "micro", **asked: Any) -> Any:
        monkeypatch.setattr(base, "measure", lambda *_: {Run(name): measured(value) for name, value in points.items()})
        request = base.Request(Asked(model, ("gqa",)), **asked)
        return table.make(request, lambda total, title: nullcontext(lambda more: None))

    return make


def test_ours_stands_beside_theirs_in_percent_of_the_full_model(reproduced: Any) -> None:
    points = {"none": 80, "scope": 72, "fastv": 40, "sparsevlm": 64, "ivtp": 79}
    result = reproduced(points)
    assert [row["method"] for row in result.rows] == ["scope", "sparsevlm", "fastv"]  # IVTP has no published figure
    for row in result.rows:
        assert row["here"] == pytest.approx(100 * points[row["method"]] / 80)
        assert row["here low"] < row["here"] < row["here high"]
        assert min(row["papers"].values()) <= row["published"] <= max(row["papers"].values())
        assert row["rank"] == row["rank here"]
    assert result.rows[0]["papers"] == {"https://arxiv.org/abs/2606.27161": 96.0}
    assert result.about["correlation"]["Spearman"] == pytest.approx(1)
    assert "in its own synthetic world" in result.markdown
    assert all(f"]({source['paper']}): {source['table']}" in result.markdown for source in published.sources())
    assert "synthetic" not in reproduced(points, model="llava-hf/llava-1.5-7b-hf").markdown


def test_an_interval_that_holds_0_shows_no_correlation(reproduced: Any) -> None:
    against = reproduced({"none": 80, "scope": 40, "cdpruner": 72, "sparsevlm": 60, "fastv": 64})
    assert against.about["correlation"]["Spearman low"] < 0 < against.about["correlation"]["Spearman high"]
    assert "none is shown" in against.markdown
    shares = published_shares()
    alike = {name: 10 + place for place, name in enumerate(sorted(shares, key=lambda name: shares[name]))}
    assert "none is shown" not in reproduced({"none": 80, **alike}).markdown


@pytest.mark.parametrize(
    ("points", "asked", "words"),
    [
        ({"none": 80}, {"methods": ("ivtp",)}, "ivtp: no paper"),
        ({"none": 80}, {"keeps": (16,)}, "64 tokens"),
        ({"none": 0, "topk": 1}, {}, "nothing to retain"),
    ],
)
def test_what_cannot_be_compared(reproduced: Any, points: dict[str, int], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(IvtpError, match=words) as caught:
        reproduced(points, **asked)
    assert "\n" not in str(caught.value)
