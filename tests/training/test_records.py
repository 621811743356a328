"""LLaVA's data format: what is read, and what is refused in one line with the record's id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivtp.errors import ConfigError
from ivtp.training.records import Turn, read_records, refuse

ASKED, ANSWERED = {"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}


def read(folder: Path, **entry: Any) -> tuple[list[Any], list[Any]]:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "broken.png").write_text("no image")
    (folder / "data.json").write_text(json.dumps([{"id": "x1", **entry}]))
    return read_records(folder / "data.json", folder, needs_image=False)


def test_all_kinds_of_records_are_read(mix: Any) -> None:
    records = mix.records()
    assert len(records) == 32
    assert sum(bool(r.images) for r in records) == 24
    assert records[1].turns[0] == Turn("user", "How many bananas are there?", 1)  # the mark may stand behind the text
    assert [turn.role for turn in records[2].turns] == ["user", "assistant"] * 3
    assert records[3].turns[0] == Turn("user", "Is it a cat?", 0)
    assert all(image.is_file() for record in records for image in record.images)


def test_several_images_and_an_answer_in_front(tmp_path: Path) -> None:
    turns = [ANSWERED, {"from": "human", "value": "<image><image>Why?"}, ANSWERED]
    (record,), bad = read(tmp_path, image=["a.png", "a.png"], conversations=turns)
    assert not bad
    assert record.turns == (Turn("user", "Why?", 2), Turn("assistant", "So.", 0))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"image": "gone.png", "conversations": [ASKED, ANSWERED]}, "gone.png does not exist"),
        ({"image": "broken.png", "conversations": [ASKED, ANSWERED]}, "no image that can be read"),
        ({"image": "a.png", "conversations": [ASKED]}, "turn 1 has no answer"),
        ({"image": "a.png", "conversations": [ASKED, ANSWERED, ANSWERED]}, "turn 3 is of the same side"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "gpt", "value": " "}]}, "turn 2 is an empty answer"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "bot", "value": "So."}]}, "turn 2 is from 'bot'"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "gpt", "text": "So."}]}, "turn 2 has no text"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "gpt", "value": "<image>"}]}, "an answer, shows an"),
        ({"conversations": [ASKED, ANSWERED]}, "show 1 <image> and it has 0"),
        ({"image": ["a.png", "a.png"], "conversations": [ASKED, ANSWERED]}, "show 1 <image> and it has 2"),
        ({"image": 3, "conversations": [ASKED, ANSWERED]}, '"image" is 3'),
        ({"conversations": []}, "no question"),
        ({}, 'no list "conversations"'),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_bad_record_is_named(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    good, bad = read(tmp_path, **entry)
    assert not good
    (one,) = map(str, bad)
    assert one.startswith("record 0 (id 'x1'): ")
    assert words in one
    with pytest.raises(ConfigError, match="record 0"):
        refuse(bad, tmp_path / "data.json")


def test_only_the_projector_learns_from_images_alone(mix: Any) -> None:
    good, bad = read_records(mix.file, mix.folder, needs_image=True)
    assert (len(good), len(bad)) == (24, 8)
    assert "has no image" in bad[0].reason


@pytest.mark.parametrize(
    ("content", "words"),
    [('[{"id": 1}', "cannot be read as JSON"), ("[]", "an empty list"), ("{}", "a dict"), (None, "is no file")],
)
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_records(tmp_path / "data.json", None, needs_image=False)


def test_images_need_their_folder(mix: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--images DIR"):
        read_records(mix.file, None, needs_image=False)
    with pytest.raises(ConfigError, match="is no folder"):
        read_records(mix.file, tmp_path / "none", needs_image=False)
