"""Published figures name their papers and our methods; the rank correlation is Spearman's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp import list_methods
from recipes.micro.published import PUBLISHED, like_published, published_shares, ranked, spearman


def test_every_figure_names_its_paper_its_table_and_a_method_of_ours() -> None:
    for source in json.loads(PUBLISHED.read_text(encoding="utf-8"))["sources"]:
        assert source["paper"].startswith("https://arxiv.org/abs/")
        assert source["title"]
        assert source["table"]
        assert source["figures"].keys() <= set(list_methods())
        assert all(0.4 < figure / source["full"] < 1 for figure in source["figures"].values())
    assert "ivtp" not in published_shares(PUBLISHED)


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


def test_the_gate_compares_what_both_have(tmp_path: Path) -> None:
    ours = [("none", 576, 0.9), ("fastv", 64, 0.45), ("scope", 64, 0.81), ("ivtp", 64, 0.8), ("topk", 16, 0.1)]
    compared = tmp_path / "compared.json"
    rows = [{"method": method, "keep": keep, "accuracy": accuracy} for method, keep, accuracy in ours]
    compared.write_text(json.dumps({"tables": [{"rows": rows}]}))
    correlation, figures = like_published(compared)
    assert correlation.rows[0]["methods"] == 2
    assert correlation.rows[0]["Spearman"] == pytest.approx(1)
    assert [(row["method"], row["here"]) for row in figures.rows] == [("scope", 0.9), ("fastv", 0.5)]
