"""The synthetic world: geometry, determinism, and every answer checked again from the boxes alone."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivtp.errors import ConfigError
from ivtp.micro.world import (
    COLOURS,
    GRID,
    KINDS,
    NAMES,
    NUMBERS,
    PATCH,
    POSITIONS,
    SIGN_TEXTS,
    SIZE,
    WORDS,
    Background,
    Question,
    Scene,
    SceneObject,
    ask,
    canonical_caption,
    caption,
    patches_of,
    questions,
    render,
    sample_scene,
    split_seed,
    write_samples,
)
from ivtp.micro.world.render import ATLAS
from ivtp.micro.world.vocabulary import LETTERS, plural

seeds = st.integers(min_value=0, max_value=3 * 2**40 - 1)
SINGULAR = {plural(name): name for name in NAMES}


def centre(item: SceneObject) -> tuple[float, float]:
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def in_words(item: SceneObject) -> str:
    def a(text: str) -> str:
        return ("an " if text[0] in "aeiou" else "a ") + text

    if item.text is not None:
        return f"a sign that says {item.text}"
    if item.backing == "none":
        return a(item.name)
    return f"{a(item.name)} {'on' if item.backing == 'disc' else 'in'} {a(f'{item.colour} {item.backing}')}"


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_scene_is_well_formed(seed: int) -> None:
    scene = sample_scene(seed)
    assert scene.seed == seed
    assert 1 <= len(scene.objects) <= 10
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= SIZE
        assert 0 <= y0 < y1 <= SIZE
        assert 40 <= max(x1 - x0, y1 - y0) <= 110
        assert item.name in NAMES
        assert (item.name == "sign") == (item.text is not None)
        assert (item.colour is None) == (item.backing == "none")
        assert item.colour is None or item.colour in COLOURS
    for a, b in combinations(scene.objects, 2):
        assert a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]


def test_vocabulary() -> None:
    assert len(NAMES) == len(set(NAMES)) == 65
    assert len(COLOURS) == 8
    assert len(set(WORDS)) == 24
    assert len(set(NUMBERS)) == 12
    assert all(re.fullmatch("[a-z]+", name) for name in NAMES)
    # Every keyword means one thing: no sign word is the name of an object or a colour.
    assert not (set(NAMES) | set(COLOURS) | set(SINGULAR)) & set(SIGN_TEXTS)


def test_same_seed_same_scene_and_pixels() -> None:
    scenes = [sample_scene(split_seed("test", i)) for i in range(25)]
    assert scenes == [sample_scene(split_seed("test", i)) for i in range(25)]
    assert {scene.background.kind for scene in scenes} == {"plain", "gradient", "noise", "stripes", "texture"}
    graph = hashlib.sha256(repr(scenes).encode()).hexdigest()
    assert graph[:16] == "29295888811849f8"
    # Whole numbers only on this path (no resampling), so the pixels are the same with every Pillow.
    plain = Scene(0, Background("stripes", ((10, 20, 30), (40, 50, 60)), 7), ())
    pixels = hashlib.sha256(render(plain).tobytes()).hexdigest()
    assert pixels[:16] == "c42528e5c0958d03"
    for scene in scenes:
        image = render(scene)
        assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
        assert image.tobytes() == render(scene).tobytes()


def test_objects_are_drawn_inside_their_boxes() -> None:
    for index in range(20):
        scene = sample_scene(split_seed("test", index))
        empty = Scene(scene.seed, scene.background, ())
        changed = (np.asarray(render(scene)) != np.asarray(render(empty))).any(-1)
        outside = changed.copy()
        for x0, y0, x1, y1 in (item.box for item in scene.objects):
            assert changed[y0:y1, x0:x1].mean() > 0.15
            outside[y0:y1, x0:x1] = False
        assert not outside.any()


def test_splits_are_disjoint() -> None:
    ranges = {split: (split_seed(split, 0), split_seed(split, 2**40 - 1)) for split in ("train", "validation", "test")}
    for (_, (a, b)), (_, (c, d)) in combinations(ranges.items(), 2):
        assert b < c or d < a
    for split, index in (("dev", 0), ("train", -1), ("train", 2**40)):
        with pytest.raises(ConfigError, match="split"):
            split_seed(split, index)


@pytest.mark.parametrize("bounds", [(0, 3), (4, 3), (1, 11)])
def test_impossible_object_counts(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="min_objects"):
        sample_scene(0, min_objects=bounds[0], max_objects=bounds[1])


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_patches_of(seed: int) -> None:
    scene = sample_scene(seed)
    canvas = np.zeros((SIZE, SIZE), dtype=bool)
    for item in scene.objects[::2]:
        canvas[item.box[1] : item.box[3], item.box[0] : item.box[2]] = True
    touched = canvas.reshape(GRID, PATCH, GRID, PATCH).any(axis=(1, 3)).reshape(-1)
    assert patches_of(scene, range(0, len(scene.objects), 2)) == np.flatnonzero(touched).tolist()
    assert patches_of(scene, []) == []


def check(scene: Scene, question: Question) -> None:
    """Answer the question from the boxes by other means than the generator's."""
    text, answer = question.text, question.answer
    assert text == text.lower()
    assert answer == answer.lower()
    assert question.objects
    assert set(question.objects) <= set(range(len(scene.objects)))
    VERIFIERS[question.kind](scene, text, answer)


def only(scene: Scene, name: str) -> SceneObject:
    (item,) = (item for item in scene.objects if item.name == name)
    return item


def check_existence(scene: Scene, text: str, answer: str) -> None:
    match = re.search(r"\ban? (\w+)(?: (?:on|in) an? (\w+) (disc|frame))?(?: in the image)?\?$", text)
    assert match, text
    name, colour, backing = match.groups()
    found = [
        item
        for item in scene.objects
        if item.name == name and (colour is None or (item.colour, item.backing) == (colour, backing))
    ]
    assert answer == ("yes" if found else "no")


def check_colour(scene: Scene, text: str, answer: str) -> None:
    (name,) = {name for name in NAMES if re.search(rf"\b{name}\b", text)}
    assert only(scene, name).colour == answer


def check_count(scene: Scene, text: str, answer: str) -> None:
    backed = re.search(r"objects (?:on|in) an? (\w+) (disc|frame)", text)
    if backed:
        number = sum((item.colour, item.backing) == backed.groups() for item in scene.objects)
    else:
        (word,) = set(re.findall(r"\w+", text)) & set(SINGULAR)
        number = sum(item.name == SINGULAR[word] for item in scene.objects)
    assert answer == str(number)


def check_relation(scene: Scene, text: str, answer: str) -> None:
    match = re.search(r"the (\w+) (?:located )?(left of|right of|above|below) the (\w+)\?$", text)
    assert match, text
    first, way, second = match.groups()
    (ax, ay), (bx, by) = centre(only(scene, first)), centre(only(scene, second))
    gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[way]
    assert abs(gap) >= 30
    assert answer == ("yes" if gap > 0 else "no")


def check_neighbour(scene: Scene, text: str, answer: str) -> None:
    match = re.search(r"(next to|left of|right of|above|below) the (\w+)[?.]$", text)
    assert match, text
    way, name = match.groups()
    here = only(scene, name)
    x, y = centre(here)
    distances = {}
    for index, item in enumerate(scene.objects):
        dx, dy = centre(item)[0] - x, centre(item)[1] - y
        ahead = {"next to": 1.0, "left of": -dx, "right of": dx, "above": -dy, "below": dy}[way]
        across = 0.0 if way == "next to" else min(abs(dx), abs(dy)) if ahead == max(abs(dx), abs(dy)) else 1e9
        if item is not here and ahead > 0 and across < 1e9:
            distances[index] = (dx * dx + dy * dy) ** 0.5
    best, *rest = sorted(distances.values())
    assert scene.objects[min(distances, key=distances.__getitem__)].name == answer
    assert not rest or rest[0] >= 1.29 * best


def check_position(scene: Scene, text: str, answer: str) -> None:
    (name,) = {name for name in NAMES if re.search(rf"\b{name}\b", text)}
    x, y = centre(only(scene, name))
    row, column = (
        ("top" if y < 112 else "bottom" if y > 224 else ""),
        ("left" if x < 112 else "right" if x > 224 else ""),
    )
    assert answer == (f"{row} {column}".strip() or "center")
    assert min(abs(v - b) for v in (x, y) for b in (112, 224)) >= 14


def check_extreme(scene: Scene, text: str, answer: str) -> None:
    (word,) = re.findall(r"largest|smallest|leftmost|rightmost|topmost|bottommost", text)
    key = {
        "largest": lambda item: -(item.box[2] - item.box[0]) * (item.box[3] - item.box[1]),
        "smallest": lambda item: (item.box[2] - item.box[0]) * (item.box[3] - item.box[1]),
        "leftmost": lambda item: centre(item)[0],
        "rightmost": lambda item: -centre(item)[0],
        "topmost": lambda item: centre(item)[1],
        "bottommost": lambda item: -centre(item)[1],
    }[word]
    assert min(scene.objects, key=key).name == answer


def check_sign(scene: Scene, text: str, answer: str) -> None:
    signs = [item for item in scene.objects if item.text is not None]
    near = re.search(r"next to the (\w+)", text)
    if near is None:
        (sign,) = signs
    else:
        x, y = centre(only(scene, near[1]))
        sign = min(signs, key=lambda item: (centre(item)[0] - x) ** 2 + (centre(item)[1] - y) ** 2)
    assert sign.text == answer
    if "number" in text:
        assert answer.isdigit()
    if "what word" in text:
        assert answer.isalpha()


def check_choice(scene: Scene, text: str, answer: str) -> None:
    match = re.fullmatch(r"(.*[?.]) a\. (.+) b\. (.+) c\. (.+) d\. (.+)", text)
    assert match, text
    stem, options = match[1], match.groups()[1:]
    assert len(set(options)) == 4
    chosen = options[LETTERS.index(answer)]
    if stem in ("what is in the image?", "which of these is shown?"):
        names = {item.name for item in scene.objects}
        assert [option in names for option in options] == [option == chosen for option in options]
    elif chosen in COLOURS:
        check_colour(scene, stem, chosen)
    elif chosen in POSITIONS:
        check_position(scene, stem, chosen)
    else:
        check_sign(scene, stem, chosen)


def check_caption(scene: Scene, text: str, answer: str) -> None:
    axis = 1 if "top to bottom" in text else 0
    items = sorted(scene.objects, key=lambda item: centre(item)[axis])
    parts = [item.name if text.startswith("list") else in_words(item) for item in items]
    assert answer == (parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1])


VERIFIERS = {
    "existence": check_existence,
    "colour": check_colour,
    "count": check_count,
    "relation": check_relation,
    "neighbour": check_neighbour,
    "position": check_position,
    "extreme": check_extreme,
    "sign": check_sign,
    "choice": check_choice,
    "caption": check_caption,
}


@settings(max_examples=120, deadline=None)
@given(seeds, st.sampled_from(KINDS))
def test_answers_are_right(seed: int, kind: str) -> None:
    scene = sample_scene(seed)
    rng = random.Random(seed)
    for _ in range(5):
        question = ask(scene, rng, kind)
        if question is not None:
            assert question.kind == kind
            check(scene, question)


def test_questions_are_balanced_distinct_and_repeatable() -> None:
    scenes = [sample_scene(split_seed("validation", i), min_objects=3) for i in range(300)]
    asked = [questions(scene, seed=1, count=10) for scene in scenes]
    assert asked[0] == questions(scenes[0], seed=1, count=10)
    assert asked[0] != questions(scenes[0], seed=2, count=10)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene, found in zip(scenes, asked, strict=True):
        assert len(found) == len({question.text for question in found}) == 10
        for question in found:
            check(scene, question)
            answers[question.kind][question.answer] += 1
    assert set(answers) == set(KINDS)
    for kind, most in {
        "existence": 0.58,
        "relation": 0.58,
        "choice": 0.33,
        "colour": 0.2,
        "position": 0.2,
    }.items():
        assert max(answers[kind].values()) < most * answers[kind].total(), (kind, answers[kind])
    assert max(answers["count"].values()) < 0.5 * answers["count"].total()
    assert max(answers["sign"].values()) < 0.1 * answers["sign"].total()


def test_captions_are_true_and_of_every_length() -> None:
    lengths = set()
    for index in range(200):
        scene = sample_scene(split_seed("test", index))
        words = caption(scene, random.Random(index)).replace(",", "").split()
        lengths.add(len(words))
        named = set(words) & set(NAMES)
        assert named <= {item.name for item in scene.objects}
        assert set(words) & set(SIGN_TEXTS) <= {item.text for item in scene.objects}
        assert set(words) & set(COLOURS) <= {item.colour for item in scene.objects}
    assert 1 in lengths
    assert max(lengths) > 60
    full = canonical_caption(scene)
    assert all(in_words(item) in full for item in scene.objects)


def test_atlas_ships_with_its_licence() -> None:
    assert ATLAS.stat().st_size < 2_000_000
    assert "Noto Color Emoji" in ATLAS.with_name("NOTICE").read_text()
    assert "SIL OPEN FONT LICENSE Version 1.1" in ATLAS.with_name("NOTICE-OFL.txt").read_text()


def test_write_samples(tmp_path: Path) -> None:
    files = write_samples(tmp_path / "samples", 3)
    entries = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [file.name for file in files] == [entry["image"] for entry in entries]
    for file, entry in zip(files, entries, strict=True):
        scene = sample_scene(entry["seed"], min_objects=3)
        with Image.open(file) as image:
            assert image.tobytes() == render(scene).tobytes()
        assert entry["questions"]
        for question in entry["questions"]:
            assert question["patches"] == patches_of(scene, question["objects"])
