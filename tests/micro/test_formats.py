"""The twelve formats: found by their files, repeatable, and every answer checked again from the scene graph."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivtp.errors import ConfigError
from ivtp.micro.formats import format_class, list_formats
from ivtp.micro.formats.base import (
    LETTERS,
    Example,
    Format,
    annotate,
    letter_of,
    lettered,
    normalise,
    overlap_f1,
    vqa_score,
)
from ivtp.micro.formats.llava_bench import phrases
from ivtp.micro.world import Scene, SceneObject, patches_of
from ivtp.micro.world.chinese import COLOURS_ZH, NAMES_ZH, PHRASES_ZH, POSITIONS_ZH, ask_chinese
from ivtp.micro.world.compose import compose
from ivtp.micro.world.photo import take_photo
from ivtp.micro.world.vocabulary import COLOURS, NAMES, POSITIONS

FORMATS = list_formats()
indices = st.integers(0, 2**39)


def made(name: str, count: int, split: str = "test") -> list[Example]:
    form: Format = format_class(name)()
    found: list[Example] = []
    index = 0
    while len(found) < count:
        found += form.examples(form.photo(split, index), random.Random(index))
        index += 1
    return found


def test_the_twelve_benchmarks_are_there() -> None:
    titles = {format_class(name).title for name in FORMATS}
    assert titles == {
        *("VQAv2", "GQA", "VizWiz", "ScienceQA-IMG", "TextVQA", "POPE", "MME", "MMBench", "MMBench-CN"),
        *("SEED-Bench", "LLaVA-Bench", "MM-Vet"),
    }
    with pytest.raises(ConfigError, match="unknown format 'gpa'; did you mean gqa"):
        format_class("gpa")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(index=indices)
def test_examples_are_repeatable_and_the_trained_answer_is_right(name: str, index: int) -> None:
    form: Format = format_class(name)()
    photo = form.photo("test", index)
    found = form.examples(photo, random.Random(index))
    assert found == form.examples(photo, random.Random(index))
    for example in found:
        assert example.photo == photo
        assert example.objects or example.group == "scene understanding"
        assert bool(patches_of(photo.scene, example.objects)) == bool(example.objects)
        assert example.prompt.strip() == example.prompt
        if len(example.references) == 1:
            assert form.score(example, example.answer) == 1.0
            assert form.score(example, example.answer.upper() + ".") == 1.0
        assert form.score(example, "nonsense") == 0.0
        assert form.score(example, "") == 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_no_answer_is_given_away_by_the_question(name: str) -> None:
    form: Format = format_class(name)()
    examples = made(name, 400)
    most = Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)
    assert most < {"mme": 0.51, "pope": 0.56}.get(name, 0.45)
    best_guess = max(
        sum(form.score(example, guess) for example in examples) / len(examples)
        for guess in {example.answer for example in examples}
    )
    assert best_guess < 0.56


def option_of(example: Example) -> tuple[str, str, list[str]]:
    """(question, right option, all options) of a multiple-choice prompt."""
    options = re.findall(r"^([A-D])\. (.+)$", example.prompt, re.MULTILINE)
    assert [letter for letter, _ in options] == list(LETTERS[: len(options)])
    assert len({text for _, text in options}) == len(options) >= 2
    question = example.prompt.split("\nA. ")[0]
    return question, dict(options)[example.answer], [text for _, text in options]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn", "scienceqa", "seed"])
def test_choices_have_one_right_option_in_a_random_place(name: str) -> None:
    examples = made(name, 300)
    for example in examples:
        option_of(example)
    letters = Counter(example.answer for example in examples)
    assert set(letters) == set(LETTERS)
    assert max(letters.values()) < 0.36 * len(examples)


def only(scene: Scene, name: str) -> SceneObject:
    (item,) = (item for item in scene.objects if item.name == name)
    return item


def cell(item: SceneObject) -> str:
    x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    row = "top" if y < 112 else "bottom" if y > 224 else ""
    column = "left" if x < 112 else "right" if x > 224 else ""
    return f"{row} {column}".strip() or "center"


def test_scienceqa_needs_the_text_and_the_picture() -> None:
    for example in made("scienceqa", 200):
        question, answer, options = option_of(example)
        owners = {person: thing for thing, person in re.findall(r"the (\w+) belongs to (\w+)\.", question)}
        assert len(owners) >= 2
        item = only(example.photo.scene, owners[re.findall(r"of (\w+)\?$", question)[0]])
        assert answer == (item.colour if "color" in question else cell(item))
        assert example.photo.scene.objects[example.objects[0]] == item
        assert set(options) <= set(COLOURS) or set(options) <= set(POSITIONS)


def test_pope_asks_for_yes_as_often_as_for_no_in_each_sampling() -> None:
    examples = made("pope", 900)
    for group in ("random", "popular", "adversarial"):
        mine = [example for example in examples if example.group == group]
        yes = sum(example.answer == "yes" for example in mine) / len(mine)
        assert 0.4 < yes < 0.6
    for example in examples:
        (name,) = re.findall(r"Is there an? (\w+) in the image\?", example.prompt)
        assert example.answer == ("yes" if name in {o.name for o in example.photo.scene.objects} else "no")


def test_popular_names_are_there_as_often_as_not() -> None:
    mine = [example for example in made("pope", 900) if example.group == "popular"]
    yes = Counter(re.findall(r"an? (\w+) in", e.prompt)[0] for e in mine if e.answer == "yes")
    no = Counter(re.findall(r"an? (\w+) in", e.prompt)[0] for e in mine if e.answer == "no")
    guess = sum(max(yes[name], no[name]) for name in yes | no) / len(mine)
    assert guess < 0.65


def test_numbers_are_no_matter_of_guessing() -> None:
    counts = [option_of(e)[1] for e in made("mmbench_cn", 900) if e.group == "count"]
    assert Counter(counts).most_common(1)[0][1] < 0.65 * len(counts)
    asked = [
        (int(re.findall(r"total of (\d+)", e.prompt)[0]), e.answer) for e in made("mme", 900) if e.group == "count"
    ]
    right = sum((number == 1) == (answer == "yes") for number, answer in asked)
    assert right < 0.7 * len(asked)


def test_walls_of_signs_are_read() -> None:
    walls = [e for e in made("textvqa", 400) if all(o.text is not None for o in e.photo.scene.objects)]
    assert any("most sign say" in example.prompt for example in walls)
    for example in walls:
        if word := re.findall(r"(left|right|top|bottom)most sign", example.prompt):
            axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[word[0]]
            first = min(example.photo.scene.objects, key=lambda o: sign * (o.box[axis] + o.box[axis + 2]))
            assert example.answer == first.text


def test_mme_pairs_are_opposite_and_count_together() -> None:
    form: Format = format_class("mme")()
    examples = made("mme", 200)
    for first, second in zip(examples[::2], examples[1::2], strict=True):
        assert {first.answer, second.answer} == {"yes", "no"}
        assert first.photo == second.photo
        assert first.prompt != second.prompt
    always_yes = [form.score(example, "yes") for example in examples]
    assert form.total(examples, always_yes) == 0.25
    assert form.total(examples, [1.0] * len(examples)) == 1.0


def test_vizwiz_photos_without_anything_to_see_have_no_answer() -> None:
    examples = made("vizwiz", 300)
    for example in examples:
        if not example.photo.readable:
            assert example.answer == "unanswerable"
        elif example.answer == "unanswerable":
            question = example.prompt.split("\n")[0]
            (asked,) = [name for name in NAMES if re.search(rf"\b{name}\b", question)]
            assert asked not in {o.name for o in example.photo.scene.objects}
    share = sum(example.answer == "unanswerable" for example in examples) / len(examples)
    assert 0.2 < share < 0.45


def test_textvqa_lists_ocr_tokens_with_distractors() -> None:
    missed = 0
    for example in made("textvqa", 200):
        (line,) = re.findall(r"^Reference OCR token: (.+)$", example.prompt, re.MULTILINE)
        shown = {item.text for item in example.photo.scene.objects}
        tokens = line.split(", ")
        assert set(tokens) - shown
        assert example.answer in shown
        missed += example.answer not in tokens
    assert 0 < missed < 60


def test_seed_covers_nine_dimensions() -> None:
    examples = made("seed", 600)
    assert len({example.group for example in examples}) == 9
    for example in examples:
        question, answer, options = option_of(example)
        scene = example.photo.scene
        if example.group == "instance identity":
            here = [o.name for o in scene.objects if cell(o) == question.split(": ")[1].rstrip("?")]
            assert here == [answer]
        elif example.group == "spatial relation":
            a, b = (only(scene, name) for name in re.findall(r"the (\w+)", question))
            dx, dy = (a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2] for i in (0, 1))
            true = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            assert answer == true
        elif example.group == "instance interaction":
            item = only(scene, re.findall(r"the (\w+)\?", question)[0])
            assert answer.split(" ", 1)[-1] == ("nothing" if item.colour is None else f"{item.colour} {item.backing}")
        elif example.group == "scene understanding":
            assert answer == scene.background.kind
        elif example.group == "visual reasoning":
            counts = Counter(item.name for item in scene.objects)
            (most, _), (_, _) = counts.most_common(2)
            assert answer.startswith(most[:3])
        assert answer in options


def test_descriptions_are_scored_by_what_they_name() -> None:
    form: Format = format_class("llava_bench")()
    example = next(e for e in made("llava_bench", 50) if len(e.objects) == 3)
    parts = phrases(example.answer)
    assert len(parts) == 3
    shuffled = ", ".join(reversed(parts))
    assert form.score(example, shuffled) == 1.0
    assert form.score(example, parts[0]) == pytest.approx(2 * 1 / 4)
    assert form.score(example, f"{example.answer}, a unicorn") == pytest.approx(2 * 3 / 7)


def test_mmvet_counts_each_part() -> None:
    form: Format = format_class("mmvet")()
    for example in made("mmvet", 50):
        first, second = example.answer.split(", ")
        assert form.score(example, f"{first}, {second}") == 1.0
        assert form.score(example, f"{first}, wrong") == 0.5
        assert form.score(example, first) == 0.5


# ---- compositional questions ------------------------------------------------------------------------------------


def referred(scene: Scene, phrase: str) -> SceneObject:
    """The object that a phrase means, found by other means than the generator's."""
    backed = re.fullmatch(r"the object (?:on|in) the (\w+) (disc|frame)", phrase)
    if backed:
        (item,) = (o for o in scene.objects if (o.colour, o.backing) == backed.groups())
        return item
    way, name = re.fullmatch(r"the object (left of|right of|above|below) the (\w+)", phrase).groups()  # type: ignore[union-attr]
    return towards(scene, only(scene, name), way)


def towards(scene: Scene, here: SceneObject, way: str) -> SceneObject:
    """The nearest object whose main direction from ``here`` is ``way``."""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[way]
    best: list[tuple[float, Any]] = []
    for other in scene.objects:
        delta = [(other.box[i] + other.box[i + 2] - here.box[i] - here.box[i + 2]) / 2 for i in (0, 1)]
        if other is not here and sign * delta[axis] > abs(delta[1 - axis]):
            best.append(((delta[0] ** 2 + delta[1] ** 2) ** 0.5, other))
    return min(best, key=lambda pair: pair[0])[1]  # type: ignore[no-any-return]


REFERENCE = r"(the object (?:(?:on|in) the \w+ (?:disc|frame)|(?:left of|right of|above|below) the \w+))"


def expected(scene: Scene, text: str) -> str:
    if match := re.fullmatch(rf"(?:what|which) color is the \w+ of {REFERENCE}\?", text):
        return str(referred(scene, match[1]).colour)
    if match := re.fullmatch(rf"(?:what|which object) is (left of|right of|above|below) {REFERENCE}\?", text):
        return towards(scene, referred(scene, match[2]), match[1]).name
    if match := re.fullmatch(rf"(?:what is|name) {REFERENCE}[?.]", text):
        return referred(scene, match[1]).name
    if match := re.fullmatch(rf"is {REFERENCE} an? (\w+) or an? (\w+)\?", text):
        name = referred(scene, match[1]).name
        assert name in match.groups()[1:]
        return name
    if match := re.fullmatch(rf"where is {REFERENCE}\?", text):
        return cell(referred(scene, match[1]))
    if match := re.fullmatch(r"(?:is there|do you see) an? (\w+) (left of|right of|above|below) the (\w+)\?", text):
        a, b = only(scene, match[1]), only(scene, match[3])
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[2]]
        return "yes" if sign * (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) > 0 else "no"
    if match := re.fullmatch(r"(?:are|do) the (\w+) and the (\w+) .* the same color\?", text) or re.fullmatch(
        r"are the (\w+) and the (\w+) on the same color\?", text
    ):
        return "yes" if only(scene, match[1]).colour == only(scene, match[2]).colour else "no"
    match = re.fullmatch(r"which is (larger|smaller), the (\w+) or the (\w+)\?", text)
    assert match, text
    sides = {name: only(scene, name).box[2] - only(scene, name).box[0] for name in match.groups()[1:]}
    return (max if match[1] == "larger" else min)(sides, key=sides.__getitem__)


@settings(max_examples=200, deadline=None)
@given(indices)
def test_compositional_answers_are_right(index: int) -> None:
    scene = take_photo("test", index).scene
    for attempt in range(6):
        question = compose(scene, random.Random(attempt))
        if question is not None:
            assert question.answer == expected(scene, question.text), question


# ---- Chinese ----------------------------------------------------------------------------------------------------


def test_chinese_words_are_whole_and_distinct() -> None:
    assert set(NAMES_ZH) == set(NAMES)
    assert set(COLOURS_ZH) == set(COLOURS)
    assert set(POSITIONS_ZH) == set(POSITIONS)
    words = [*NAMES_ZH.values(), *COLOURS_ZH.values(), *POSITIONS_ZH.values()]
    assert len(words) == len(set(words))
    assert all(re.fullmatch(r"[一-鿿]+", word) for word in words)


@settings(max_examples=100, deadline=None)
@given(indices)
def test_chinese_answers_are_right(index: int) -> None:
    scene = take_photo("test", index).scene
    names = {zh: en for en, zh in NAMES_ZH.items()}
    for attempt in range(4):
        stem = ask_chinese(scene, random.Random(attempt))
        if stem is None:
            continue
        assert stem.answer not in stem.others
        asked = [
            names[zh]
            for zh in sorted(names, key=len, reverse=True)
            if stem.text.startswith(zh) or f"个{zh}" in stem.text
        ]
        if stem.kind == "colour":
            assert stem.answer == COLOURS_ZH[str(only(scene, asked[0]).colour)]
        elif stem.kind == "count":
            assert stem.answer == str(sum(item.name == asked[0] for item in scene.objects))
        elif stem.kind == "position":
            assert stem.answer == POSITIONS_ZH[cell(only(scene, asked[0]))]
        elif stem.kind == "sign":
            assert stem.answer in {item.text for item in scene.objects}
        else:
            assert names[stem.answer] in {item.name for item in scene.objects}
        rest = stem.text
        for word in sorted((*NAMES_ZH.values(), *PHRASES_ZH, "左侧", "右侧", "上面", "下面"), key=len, reverse=True):
            rest = rest.replace(word, "")
        assert not re.sub("最大|最小|最左边|最右边|最上面|最下面|最", "", rest), stem.text


# ---- metrics ----------------------------------------------------------------------------------------------------


def test_vqa_accuracy_is_the_official_one() -> None:
    assert vqa_score("Red.", ["red"] * 10) == 1.0
    assert vqa_score("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_score("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_score("the red", ["red"] * 10) == 1.0
    assert vqa_score("green", ["red"] * 10) == 0.0


def test_letters_words_and_bags() -> None:
    assert [letter_of(text) for text in ("B", "b.", " C) dog", "dog", "", "E")] == ["B", "B", "C", "", "", ""]
    assert normalise(" The Red Disc. ") == "red disc"
    assert overlap_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    choice = lettered("what?", "dog", ["cat", "cat", "car"], random.Random(0))
    assert choice.text.count("\n") == 4
    said = [annotate("red", ("blue",), random.Random(i)) for i in range(200)]
    assert all(len(ten) == 10 for ten in said)
    assert 0.06 < sum(ten.count("blue") for ten in said) / 2000 < 0.14
