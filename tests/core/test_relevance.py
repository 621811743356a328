"""Words and their relevance (Eq. 5-7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.relevance import overlapping, pseudo_cls, relevance, spread, words


def cut(text: str) -> list[str]:
    return [text[a:b] for a, b in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is the dog?", ["Where", "is", "the", "dog", "?"]),
        ("it's 2nd", ["it", "'", "s", "2nd"]),
        ("图中有狗吗", ["图", "中", "有", "狗", "吗"]),
        ("x_2\tà la", ["x", "_", "2", "à", "la"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("", []),
        (" \n\u3000", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@given(st.text(max_size=60))
def test_words_cover_all_but_white_space_once_and_in_order(text: str) -> None:
    covered = [i for a, b in words(text) for i in range(a, b)]
    assert covered == sorted(set(covered))
    assert all(text[i].isspace() for i in set(range(len(text))) - set(covered))


spans = st.lists(st.integers(0, 40), min_size=0, max_size=20, unique=True).map(
    lambda marks: list(zip(sorted(marks)[::2], sorted(marks)[1::2], strict=False))
)


@given(spans, spans)
def test_overlaps_are_those_of_the_definition(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    expected = [(i, j) for i, x in enumerate(a) for j, y in enumerate(b) if x[0] < y[1] and y[0] < x[1]]
    assert sorted(overlapping(a, b)) == expected


def test_relevance_is_a_cosine() -> None:
    text, image = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.5, 0.0]])
    torch.testing.assert_close(relevance(text, image), torch.tensor([[1.0], [0.5**0.5]]))


def test_a_token_takes_the_mean_over_the_clip_tokens_of_its_words() -> None:
    """Word 0 is two CLIP tokens; LLM token 0 is inside word 0, token 1 spans words 0 and 1, token 2 is in none."""
    by_token = torch.tensor([[0.2], [0.4], [0.9]])
    clip_words = [(0, 0), (0, 1), (1, 2)]
    own_words = [(0, 0), (0, 1), (1, 1)]
    scores = spread(by_token, clip_words, own_words, 3)
    torch.testing.assert_close(scores[:2], torch.tensor([0.3, 0.5]))
    assert scores[2].isnan()


def test_of_several_images_the_best_one_judges_a_whole_word() -> None:
    by_token = torch.tensor([[0.9, 0.0], [0.1, 0.6]])  # means 0.5 and 0.3, not the mean of the maxima
    assert spread(by_token, [(0, 0), (0, 1)], [(0, 0)], 1).item() == pytest.approx(0.5)


def test_the_mean_of_the_passing_tokens_or_the_fallback() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [3.0, 2.0], [100.0, 100.0]])
    token, empty = pseudo_cls(embeddings, torch.tensor([1.0, 1.0, 0.0]), torch.zeros(2))
    assert token.tolist() == [2.0, 1.0]
    assert not empty
    token, empty = pseudo_cls(embeddings, torch.zeros(3), torch.tensor([7.0, 7.0]))
    assert token.tolist() == [7.0, 7.0]
    assert empty
