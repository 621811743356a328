"""The picture shows the patches that the trace names, where the model saw them, and every word's relevance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from ivtp.errors import ConfigError
from ivtp.trace import PruneTrace, StageTrace, Where, Word
from ivtp.visualize import Fate, Panel, as_seen, draw, draw_comparison, fates, paint
from ivtp.visualize.text import USED, shorten, wrap

GRID = 6
PATCHES = GRID**2


def stage(where: Where, *rows: list[int]) -> StageTrace:
    """A cut; rows with fewer tokens end in -1."""
    width = max(map(len, rows))
    kept = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    return StageTrace(where, 0, kept, torch.zeros(kept.shape), kept)


def two_stages(vision: list[int], final: list[int], words: list[Word] | None = None) -> PruneTrace:
    """One sample with one image."""
    return PruneTrace(PATCHES, (1,), [stage("vision", vision), stage("llm", final)], [words or []], [False])


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Bright random colours."""
    pixels = np.random.default_rng(seed).integers(100, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- which patch went where -----------------------------------------------------------------------------------


def test_fates_of_two_stages() -> None:
    found = fates(two_stages([0, 1, 7, 35], [1, 35])).ravel()
    assert {i for i in range(PATCHES) if found[i] == Fate.KEPT} == {1, 35}
    assert {i for i in range(PATCHES) if found[i] == Fate.DROPPED_IN_DECODER} == {0, 7}
    assert (found == Fate.DROPPED_IN_ENCODER).sum() == PATCHES - 4


def test_a_stage_that_did_not_run_drops_nothing() -> None:
    only_llm = PruneTrace(PATCHES, (1,), [stage("llm", [3])])
    assert set(fates(only_llm).ravel()) == {Fate.KEPT, Fate.DROPPED_IN_DECODER}
    only_vision = PruneTrace(PATCHES, (1,), [stage("vision", [3])])
    assert set(fates(only_vision).ravel()) == {Fate.KEPT, Fate.DROPPED_IN_ENCODER}
    assert (fates(PruneTrace(PATCHES, (1,))) == Fate.KEPT).all()


@given(st.data())
def test_every_image_of_every_sample_gets_its_own_patches(data: st.DataObject) -> None:
    images = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    rows = [
        sorted(data.draw(st.sets(st.integers(0, count * PATCHES - 1), min_size=1, max_size=20))) for count in images
    ]
    trace = PruneTrace(PATCHES, images, [stage("llm", *rows)])
    for row, count in enumerate(images):
        found = [
            m * PATCHES + i for m in range(count) for i in np.flatnonzero(fates(trace, row, m).ravel() == Fate.KEPT)
        ]
        assert found == rows[row]


@pytest.mark.parametrize(("row", "image"), [(1, 0), (-1, 0), (0, 1)])
def test_samples_and_images_that_are_not_there(row: int, image: int) -> None:
    with pytest.raises(ConfigError):
        fates(PruneTrace(PATCHES, (1,)), row, image)


# ---- where on the picture -------------------------------------------------------------------------------------


def test_the_picture_is_cropped_as_clip_crops_it() -> None:
    from transformers import CLIPImageProcessorPil

    for size in ((500, 300), (300, 500), (336, 336), (90, 84)):
        coarse = noise((size[0] // 10, size[1] // 10)).resize(size, Image.Resampling.BICUBIC)
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}, do_normalize=False, do_rescale=False
        )
        seen = np.asarray(processor(coarse)["pixel_values"][0]).transpose(1, 2, 0).astype(int)
        assert np.abs(np.asarray(as_seen(coarse, 84)).astype(int) - seen).mean() < 4


def test_kept_patches_keep_their_pixels_and_dropped_ones_lose_colour() -> None:
    picture = Image.new("RGB", (GRID * 16, GRID * 16), (250, 120, 120))
    painted = np.asarray(paint(picture, fates(two_stages([0, 1, 7], [7]))))
    assert painted.shape == (GRID * 16, GRID * 16, 3)

    def centre(patch: int) -> np.ndarray:  # type: ignore[type-arg]
        row, column = divmod(patch, GRID)
        return painted[row * 16 + 3 : row * 16 + 13, column * 16 + 3 : column * 16 + 13].reshape(-1, 3).astype(int)

    assert (centre(7) == (250, 120, 120)).all()
    assert centre(35).max() < 80  # dropped in the encoder: dark and grey
    assert np.ptp(centre(35), axis=1).max() == 0
    assert (centre(0)[:, 2] > centre(0)[:, 0] + 40).all()  # dropped in the decoder: blue
    assert len(np.unique(centre(0), axis=0)) > 1  # and hatched


def test_keeping_everything_changes_no_pixel() -> None:
    picture = noise((GRID * 10, GRID * 10))
    assert not ImageChops.difference(paint(picture, fates(PruneTrace(PATCHES, (1,)))), picture).getbbox()


# ---- whole pages ----------------------------------------------------------------------------------------------

WORDS = [Word("left", 0.31, True), Word("of", -0.04, False), Word("banana", 0.12, False)]


def count(page: Image.Image, colour: tuple[int, int, int]) -> int:
    """Pixels of exactly this colour."""
    return int((np.asarray(page) == colour).all(axis=2).sum())


def test_a_page_shows_used_words_and_the_threshold() -> None:
    picture = noise((120, 80))
    trace = two_stages([0, 1, 7], [7], WORDS)
    page = draw(picture, trace, question="Left of the banana?", answer="a cat", threshold=0.2)
    without_words = draw(picture, two_stages([0, 1, 7], [7]), question="Left of the banana?", answer="a cat")
    assert page.width > without_words.width
    assert count(page, USED) > 500
    assert count(without_words, USED) == 0
    unused = [Word(w.text, w.score, False) for w in WORDS]
    assert count(draw(picture, two_stages([0], [0], unused), threshold=0.2), USED) == 0
    no_line = draw(picture, trace, question="Left of the banana?", answer="a cat")
    assert ImageChops.difference(page, no_line).getbbox()


@pytest.mark.parametrize("number", [0, 1, 3, 30, 60])
@pytest.mark.parametrize("fallback", [False, True])
def test_nothing_is_clipped_at_the_margins(number: int, fallback: bool) -> None:
    words = [Word(f"extraordinary{i}", (-1) ** i * i / 100, i > 20 and not fallback) for i in range(number)]
    trace = two_stages([0, 1, 7], [7], words)
    trace.fallback[:] = [fallback]
    panels = [Panel("IVTP " * 9, trace, "yes " * 40, "-46.8%")]
    question = "Is it? " * 60
    for page in (
        draw(noise((120, 80)), trace, question=question, answer="no " * 99, threshold=0.2),
        draw_comparison(noise((120, 80)), [(question, panels)], threshold=0.2),
    ):
        pixels = np.asarray(page)
        for margin in (pixels[:, :8], pixels[:, -8:], pixels[:8], pixels[-4:]):
            assert (margin == 255).all()


def test_long_instructions_stay_on_the_page() -> None:
    words = [Word(f"word{i}" * (1 + i % 5), (i * 37 % 100) / 200, i % 7 == 0) for i in range(2000)]
    trace = two_stages([0, 1], [1], words)
    page = draw(noise((50, 50)), trace, question="word " * 2000, answer="x" * 3000, threshold=0.2)
    assert page.width < 2000
    assert page.height < 2000


def test_several_images_side_by_side() -> None:
    trace = PruneTrace(PATCHES, (2,), [stage("llm", [0, PATCHES + 35])])
    pictures = [noise((60, 60), seed) for seed in (1, 2)]
    one = draw(pictures[0], PruneTrace(PATCHES, (1,)))
    assert draw(pictures, trace).width > 1.8 * one.width
    with pytest.raises(ConfigError, match="2 images"):
        draw(pictures[0], trace)


def test_the_row_of_a_batch_is_drawn() -> None:
    trace = PruneTrace(PATCHES, (1, 1), [stage("llm", [0], [35])])
    picture = noise((60, 60))
    assert ImageChops.difference(draw(picture, trace, row=0), draw(picture, trace, row=1)).getbbox()
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        draw(picture, trace, row=2)


def test_a_comparison_grows_with_its_panels_and_questions() -> None:
    picture = noise((60, 60))
    trace = two_stages([0, 1, 7], [7], WORDS)
    panels = [Panel("all tokens", None, "a cat"), Panel("IVTP", trace, "a cat", "-46.8%")]
    one = draw_comparison(picture, [("What is it?", panels)], threshold=0.2)
    wide = draw_comparison(picture, [("What is it?", [panels[0], *panels])], threshold=0.2)
    tall = draw_comparison(picture, [("What is it?", panels), ("And what is that?", panels)], threshold=0.2)
    assert wide.width > one.width
    assert tall.height > 1.8 * one.height
    assert count(one, USED) > 500
    with pytest.raises(ConfigError):
        draw_comparison(picture, [])


@given(st.text(max_size=200), st.integers(40, 400))
def test_text_never_leaves_its_column(text: str, width: int) -> None:
    from ivtp.visualize.text import font

    for line in wrap(text, 16, width, 3):
        assert font(16).getlength(line) <= width
    assert font(16).getlength(shorten(text.replace("\n", " "), 16, width)) <= width
