"""Photographs: disturbances, cutting off, held-out pairs and styles."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivtp.errors import ConfigError
from ivtp.micro.world import GRID, SIZE, patches_of, render, sample_scene, split_seed
from ivtp.micro.world.nuisance import MILD, NUISANCES, SEVERE, Nuisance, disturb, sample_nuisance
from ivtp.micro.world.photo import Photo, held_out, take_photo, visible_share
from ivtp.micro.world.scene import NEW_BACKGROUNDS, Style
from ivtp.micro.world.vocabulary import BACKGROUNDS, GLYPHS

SPLITS = ("train", "validation", "test", "pairs", "styles")
photos = st.tuples(st.sampled_from(SPLITS), st.integers(0, 2**39), st.booleans())


def names(photo: Photo) -> list[str]:
    return [item.name for item in photo.scene.objects]


@settings(max_examples=150, deadline=None)
@given(photos)
def test_a_photo_is_repeatable_and_shows_what_its_split_may_show(where: tuple[str, int, bool]) -> None:
    split, index, bad = where
    photo = take_photo(split, index, bad=bad)
    assert photo == take_photo(split, index, bad=bad)
    picture = photo.picture()
    assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
    assert picture.tobytes() == photo.picture().tobytes()
    assert 1 <= len(photo.scene.objects) <= 12
    assert all(visible_share(item) >= 0.5 for item in photo.scene.objects)
    assert all(0 <= patch < GRID * GRID for patch in patches_of(photo.scene, range(len(photo.scene.objects))))
    met = any(held_out(a, b) for a, b in combinations(names(photo), 2))
    if split == "pairs":
        assert met
    elif split != "styles":
        assert not met
    assert (photo.scene.background.kind in NEW_BACKGROUNDS) == (split == "styles")
    assert photo.readable or bad


def test_splits_differ_in_style_and_never_share_a_seed() -> None:
    seeds = {split: [take_photo(split, i).scene.seed for i in range(50)] for split in SPLITS}
    assert len({seed for found in seeds.values() for seed in found}) == 250
    ordinary = [take_photo("train", i) for i in range(300)]
    sides = [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for p in ordinary for o in p.scene.objects]
    new = [
        max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for i in range(50) for o in take_photo("styles", i).scene.objects
    ]
    assert min(sides) >= 28
    assert max(sides) <= 111
    assert min(new) > 110
    assert {p.scene.background.kind for p in ordinary} == set(BACKGROUNDS)
    assert {len(p.scene.objects) for p in ordinary} == set(range(1, 13))


def test_one_pair_in_twelve_is_held_out() -> None:
    pairs = list(combinations(GLYPHS, 2))
    share = sum(held_out(a, b) for a, b in pairs) / len(pairs)
    assert 1 / 15 < share < 1 / 10
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs[:200])
    assert not any(held_out(name, name) or held_out(name, "sign") for name in GLYPHS)


@pytest.mark.parametrize("kind", list(NUISANCES))
def test_a_mild_disturbance_leaves_the_picture_and_a_severe_one_does_not(kind: str) -> None:
    """The measure: how much better than a wrong picture's outline the disturbed one still fits the clean one."""
    for index in range(5):
        clean = render(sample_scene(split_seed("test", index), min_objects=3))
        mild, severe = (disturb(clean, Nuisance(kind, strength, 1)) for strength in (MILD[1], SEVERE[0]))
        assert mild.tobytes() != clean.tobytes()
        kept = [outline_match(clean, image) for image in (mild, severe)]
        assert kept[0] > 0.5
        assert kept[1] < 0.5 * kept[0]


def outline_match(clean: object, image: object) -> float:
    """Correlation of the horizontal and vertical edges of two pictures."""
    edges = []
    for picture in (clean, image):
        grey = np.asarray(picture, dtype=np.float32).mean(-1)
        grey = grey.reshape(SIZE // 4, 4, SIZE // 4, 4).mean((1, 3))
        edges.append(np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()]))
    return float(np.corrcoef(*edges)[0, 1])


def test_strengths_are_drawn_from_the_ends_only() -> None:
    rng = random.Random(0)
    for severe, (low, high) in ((False, MILD), (True, SEVERE)):
        drawn = [sample_nuisance(rng, severe=severe) for _ in range(200)]
        assert all(low <= nuisance.strength <= high for nuisance in drawn)
        assert {nuisance.kind for nuisance in drawn} == set(NUISANCES)


def test_every_fifth_bad_photo_is_unreadable() -> None:
    bad = [take_photo("test", i, bad=True) for i in range(400)]
    assert 0.14 < sum(not photo.readable for photo in bad) / len(bad) < 0.26
    assert all(photo.nuisances for photo in bad)


def test_a_style_bounds_the_number_of_objects() -> None:
    style = Style(objects=(5, 12))
    with pytest.raises(ConfigError, match="need 5 <= min <= max <= 12"):
        sample_scene(0, min_objects=4, style=style)
    assert 5 <= len(sample_scene(0, style=style).objects) <= 12
