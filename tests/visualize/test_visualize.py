"""The picture shows the patches that the trace names, where the model saw them, and every word's relevance."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw
from tiny import NUM_PATCHES, Tiny, samples

from ivtp.errors import ConfigError
from ivtp.micro import world
from ivtp.trace import PruneTrace, StageTrace, Where, Word
from ivtp.visualize import (
    Fate,
    Panel,
    as_seen,
    count_fates,
    draw,
    draw_comparison,
    draw_patches,
    fates,
    fonts,
    paint,
    swatches,
)
from ivtp.visualize.fonts import drawable, length, write
from ivtp.visualize.page import RIGHT, WRONG
from ivtp.visualize.patches import EDGE, OUTLINE, cut_off
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


def fate(trace: PruneTrace, row: int = 0, image: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """(rows, columns): of an image that is read once."""
    (found,) = fates(trace, row, image)
    return found


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Bright random colours."""
    pixels = np.random.default_rng(seed).integers(100, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- which patch went where -----------------------------------------------------------------------------------


def test_fates_of_two_stages() -> None:
    found = fate(two_stages([0, 1, 7, 35], [1, 35])).ravel()
    assert {i for i in range(PATCHES) if found[i] == Fate.KEPT} == {1, 35}
    assert {i for i in range(PATCHES) if found[i] == Fate.DROPPED_IN_DECODER} == {0, 7}
    assert (found == Fate.DROPPED_IN_ENCODER).sum() == PATCHES - 4


def test_a_stage_that_did_not_run_drops_nothing() -> None:
    only_llm = PruneTrace(PATCHES, (1,), [stage("llm", [3])])
    assert set(fate(only_llm).ravel()) == {Fate.KEPT, Fate.DROPPED_IN_DECODER}
    only_vision = PruneTrace(PATCHES, (1,), [stage("vision", [3])])
    assert set(fate(only_vision).ravel()) == {Fate.KEPT, Fate.DROPPED_IN_ENCODER}
    assert (fate(PruneTrace(PATCHES, (1,))) == Fate.KEPT).all()


@given(st.data())
def test_every_image_of_every_sample_gets_its_own_patches(data: st.DataObject) -> None:
    images = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    rows = [
        sorted(data.draw(st.sets(st.integers(0, count * PATCHES - 1), min_size=1, max_size=20))) for count in images
    ]
    trace = PruneTrace(PATCHES, images, [stage("llm", *rows)])
    for row, count in enumerate(images):
        found = [
            m * PATCHES + i for m in range(count) for i in np.flatnonzero(fate(trace, row, m).ravel() == Fate.KEPT)
        ]
        assert found == rows[row]


@pytest.mark.parametrize(("row", "image"), [(1, 0), (-1, 0), (0, 1)])
def test_samples_and_images_that_are_not_there(row: int, image: int) -> None:
    with pytest.raises(ConfigError):
        fate(PruneTrace(PATCHES, (1,)), row, image)


def merging(where: Where, kept: list[int], sources: dict[int, int], lost: tuple[int, ...] = ()) -> StageTrace:
    """A cut that merges: what is neither kept nor named goes into patch 0 of the kept ones."""
    found = torch.full((1, PATCHES), kept[0])
    found[0, kept] = torch.tensor(kept)
    for patch, into in sources.items():
        found[0, patch] = into
    found[0, list(lost)] = -1
    return dataclasses.replace(stage(where, kept), sources=found)


def test_merged_patches_are_not_dropped() -> None:
    one = PruneTrace(PATCHES, (1,), [merging("vision", [2, 9], {10: 9}, lost=(35,))])
    found = fate(one).ravel()
    assert {i for i in range(PATCHES) if found[i] == Fate.KEPT} == {2, 9}
    assert found[35] == Fate.DROPPED_IN_ENCODER
    assert (found == Fate.MERGED).sum() == PATCHES - 3
    # what went into a patch that is dropped, or merged, later goes with it
    later = fate(PruneTrace(PATCHES, (1,), [*one.stages, stage("llm", [2])])).ravel()
    assert later[9] == later[10] == Fate.DROPPED_IN_DECODER
    assert later[3] == Fate.MERGED
    again = fate(PruneTrace(PATCHES, (1,), [*one.stages, merging("vision", [2], {})])).ravel()
    assert again[9] == again[10] == again[3] == Fate.MERGED
    assert again[35] == Fate.DROPPED_IN_ENCODER


def test_merged_patches_of_a_real_method(tiny: Tiny) -> None:
    with torch.no_grad(), tiny.attach(tiny.model(), method="tome") as pruner:
        pruner.host.model(**tiny.inputs(*samples(tiny, "two images")))
    for number in range(2):
        found = fate(pruner.trace, 0, number)
        assert (found == Fate.KEPT).sum() == 8
        assert (found == Fate.MERGED).sum() == NUM_PATCHES - 8


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
    painted = np.asarray(paint(picture, fate(two_stages([0, 1, 7], [7]))))
    assert painted.shape == (GRID * 16, GRID * 16, 3)

    def centre(patch: int) -> np.ndarray:  # type: ignore[type-arg]
        row, column = divmod(patch, GRID)
        return painted[row * 16 + 3 : row * 16 + 13, column * 16 + 3 : column * 16 + 13].reshape(-1, 3).astype(int)

    assert (centre(7) == (250, 120, 120)).all()
    assert 80 < centre(35).max() < 140  # dropped in the encoder: grey, dark, but not so dark that shapes are lost
    assert np.ptp(centre(35), axis=1).max() == 0
    assert (centre(0)[:, 2] > centre(0)[:, 0] + 40).all()  # dropped in the decoder: blue
    assert len(np.unique(centre(0), axis=0)) > 1  # and hatched


def test_keeping_everything_changes_no_pixel() -> None:
    picture = noise((GRID * 10, GRID * 10))
    assert not ImageChops.difference(paint(picture, fate(PruneTrace(PATCHES, (1,)))), picture).getbbox()


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), OUTLINE])
def test_kept_patches_stand_out_on_any_picture(colour: tuple[int, int, int]) -> None:
    painted = np.asarray(paint(Image.new("RGB", (GRID * 18, GRID * 18), colour), fate(two_stages([7], [7]))))
    patch = painted[18:36, 18:36]
    rim = [tuple(map(int, patch[0, 9])), tuple(map(int, patch[1, 9]))]
    assert rim == [EDGE, OUTLINE]
    assert (patch[4:14, 4:14] == colour).all()
    assert max(np.abs(np.array(line) - colour).max() for line in rim) > 100


def test_shapes_in_dropped_patches_of_a_dark_picture_can_be_seen() -> None:
    dark = np.zeros((GRID * 16, GRID * 16, 3), np.uint8)
    dark[:, ::2] = 80
    painted = np.asarray(paint(Image.fromarray(dark), fate(two_stages([7], [7])))).astype(int)
    dropped = painted[-16:, -16:]
    assert dropped.min() >= 25
    assert np.ptp(dropped) >= 30


def test_what_the_crop_cut_off_is_said() -> None:
    assert cut_off(Image.new("RGB", (50, 50))) == ""
    assert "middle 75% of the width (400 x 300" in cut_off(Image.new("RGB", (400, 300)))
    assert "middle 50% of the height (100 x 200" in cut_off(Image.new("RGB", (100, 200)))
    trace = two_stages([0, 1, 7], [7], WORDS)
    wide, square = (Image.new("RGB", size, "white") for size in ((300, 150), (150, 150)))
    assert draw(wide, trace).height > draw(square, trace).height
    panels = [("Is it?", [Panel("IVTP", trace)])]
    assert draw_comparison(wide, panels).height > draw_comparison(square, panels).height


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


def test_a_note_is_a_line_below_everything() -> None:
    trace = two_stages([0, 1, 7], [7])
    plain, noted = (draw(noise((60, 60)), trace, answer="a cat", note=note) for note in (None, "topk: 1 of 36 " * 20))
    assert plain.width == noted.width
    assert not ImageChops.difference(
        plain.crop((0, 0, plain.width, plain.height - 24)), noted.crop((0, 0, plain.width, plain.height - 24))
    ).getbbox()
    assert (np.asarray(noted)[plain.height - 24 : -8] != 255).any()
    assert (np.asarray(noted)[:, -8:] == 255).all()


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
    page = draw(pictures, trace)
    assert page.width > 1.8 * one.width
    # each has its own legend: here they are the same, and like that of one image alone
    alone = draw(pictures[0], PruneTrace(PATCHES, (1,), [stage("llm", [0])]))
    legends = [np.asarray(page)[470:, left : left + 400] for left in (24, 24 + page.width // 2 - 12)]
    assert (legends[0] == legends[1]).all()
    assert (legends[0] == np.asarray(alone)[470:, 24:424]).all()
    assert (legends[0] != 255).any()
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


def test_a_brief_comparison_has_its_questions_side_by_side_and_neither_words_nor_legends() -> None:
    rows = [
        (f"What is {what}?", [Panel("IVTP", two_stages([0, 1, 7], [7], WORDS), "a cat")]) for what in ("it", "that")
    ]
    brief, full = (draw_comparison(noise((60, 60)), rows, side=96, brief=short) for short in (True, False))
    assert brief.height < full.height / 2
    assert brief.width >= 2 * 96
    assert not count(brief, USED)


@pytest.mark.parametrize(("right", "ink"), [(True, RIGHT), (False, WRONG)])
def test_an_answer_that_is_known_to_be_right_or_wrong_is_told_by_a_colour_and_a_sign(
    right: bool, ink: tuple[int, int, int]
) -> None:
    def drawn(known: bool | None) -> Image.Image:
        return draw_comparison(Image.new("RGB", (60, 60)), [("What is it?", [Panel("IVTP", None, "a cat", "", known)])])

    assert count(drawn(right), ink) > 20
    assert not count(drawn(None), ink)
    assert not count(drawn(not right), ink)


def test_a_picture_without_a_page_has_the_size_that_was_asked_for() -> None:
    trace = two_stages([0, 1, 7], [7], WORDS)
    painted = draw_patches(noise((90, 60)), trace, side=GRID * 16)
    assert painted.size == (GRID * 16, GRID * 16)
    assert count_fates(trace) == {
        "kept": 1,
        "dropped in the decoder (stage 2)": 2,
        "dropped in the vision encoder (stage 1)": PATCHES - 3,
    }
    assert list(count_fates(trace)) == [name for name in swatches() if name in count_fates(trace)]


# ---- any script ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which no font is installed."""
    fonts._font_with.cache_clear()
    monkeypatch.setattr(fonts, "_system_fonts", lambda: ())
    yield
    fonts._font_with.cache_clear()


def rendered(text: str) -> np.ndarray:  # type: ignore[type-arg]
    """Pixels of a line."""
    page = Image.new("L", (600, 40), 255)
    write(ImageDraw.Draw(page), (5, 5), text, 0, 20)  # type: ignore[arg-type]
    return np.asarray(page)


def test_chinese_is_drawn_without_any_installed_font(no_system_fonts: None) -> None:
    assert drawable("标志上写着什么？") == "标志上写着什么？"
    box = rendered("\U0010fffd")
    lines = [rendered(char) for char in "标志上写着什么"]
    assert all((line < 128).sum() > 20 for line in lines)
    assert len({line.tobytes() for line in [*lines, box]}) == len(lines) + 1
    known = set("".join(path.read_text(encoding="utf-8") for path in Path(world.__file__).parent.glob("*.py")))
    assert all(drawable(char) == char for char in known if "\u4e00" <= char <= "\u9fff")


def test_other_alphabets_are_drawn_without_any_installed_font(
    no_system_fonts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("naïve café", "ελληνικά", "русский", "™ → ☃"):
        assert drawable(text) == text
        assert (rendered(text) < 128).sum() > 20
    monkeypatch.setattr(fonts.features, "check", lambda name: True)
    assert drawable("كلب שלום") == "كلب שלום"
    fonts._font_with.cache_clear()
    # without the library that joins and turns its letters, Arabic would be wrong
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    assert drawable("كلب") == "U+0643 U+0644 U+0628"


def test_what_no_font_has_becomes_words_and_never_a_box(no_system_fonts: None) -> None:
    assert drawable("🐶 left of 🏠") == "[dog face] left of [house building]"
    assert drawable("ก็") == "U+0E01 U+0E47"
    assert drawable("\x1b[31m") == "U+001B[31m"
    assert drawable("👩\u200d🚀\ufe0f") == "[woman] [rocket]"
    assert drawable("e\u0301\ta") == "é a"
    page = draw(noise((60, 60)), two_stages([0], [0], [Word("🐶", 0.3, True)]), question="🐶?" * 50, answer="ก็")
    named = draw(
        noise((60, 60)),
        two_stages([0], [0], [Word("[dog face]", 0.3, True)]),
        question="[dog face]?" * 50,
        answer="U+0E01 U+0E47",
    )
    assert not ImageChops.difference(page, named).getbbox()


@given(st.text(max_size=30))
def test_every_character_is_drawn_by_a_font_that_has_it(text: str) -> None:
    shown = drawable(text)
    assert drawable(shown) == shown
    for file, part in fonts._runs(shown):
        assert all(char.isspace() or fonts._has(file, char) for char in part)


def test_a_font_says_which_characters_it_has(tmp_path: Path) -> None:
    with fonts._SHIPPED[1].open("rb") as opened:
        data = opened.read()
    characters = fonts.read_characters(io.BytesIO(data))
    covered = {c for a, b in zip(characters.starts, characters.ends, strict=True) for c in range(a, b + 1)}
    assert {ord(c) for c in "标志の"} <= covered
    assert ord("🐶") not in covered
    assert not covered & set(range(0xAC00, 0xD7A4))
    for broken in (b"", b"ttcf", data[:200], b"\0" * 500):
        (tmp_path / "broken.ttf").write_bytes(broken)
        fonts._characters.cache_clear()
        assert not fonts._has(tmp_path / "broken.ttf", "a")


def test_mixed_scripts_share_a_baseline_and_an_anchor() -> None:
    for anchor in ("la", "lm", "rm", "ms", "rs"):
        page = Image.new("L", (400, 100), 255)
        write(ImageDraw.Draw(page), (200, 50), "H标H", 0, 20, anchor=anchor)  # type: ignore[arg-type]
        plain = Image.new("L", (400, 100), 255)
        write(ImageDraw.Draw(plain), (200, 50), "HHHH", 0, 20, anchor=anchor)  # type: ignore[arg-type]
        bottoms = [np.nonzero((np.asarray(p) < 128).any(axis=1))[0].max() for p in (page, plain)]
        assert abs(bottoms[0] - bottoms[1]) <= 4  # the sign reaches a little below the line
        columns = np.nonzero((np.asarray(page) < 128).any(axis=0))[0]
        wide = length("H标H", 20)
        left = 200 - {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * wide
        assert left - 3 <= columns.min() <= columns.max() <= left + wide + 3


def test_chinese_wraps_without_spaces() -> None:
    lines = wrap("这张图片里的标志上写着什么字" * 4, 20, 300, 4)
    assert len(lines) == 4
    assert "".join(lines) == "这张图片里的标志上写着什么字" * 4


@given(st.text(max_size=200), st.integers(40, 400))
def test_text_never_leaves_its_column(text: str, width: int) -> None:
    for line in wrap(text, 16, width, 3):
        assert length(line, 16) <= width
    assert length(shorten(text.replace("\n", " "), 16, width), 16) <= width
