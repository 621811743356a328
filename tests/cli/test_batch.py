"""Many images and questions: lines of JSON in and out, and going on after an interruption."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from terminal import Run
from tiny import NUM_PATCHES, QUESTIONS

from ivtp.cli import batch as cli_batch


def lines(text: str) -> list[dict[str, Any]]:
    """The documents of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_is_answered_picture_by_picture(run: Run, few: tuple[object, ...], photos: Path) -> None:
    result = run("batch", photos, *QUESTIONS[:2], *few)
    found = lines(result.out)
    names = [(one["image"], one["question"]) for one in found]
    assert names == [(name, question) for name in ("a.png", "b.png", "c.jpg") for question in QUESTIONS[:2]]
    assert [("error" in one) for one in found] == [False, False, True, True, False, False]
    assert found[0]["tokens"] == {"all": NUM_PATCHES, "kept": 8}
    assert result.code == 1
    assert "2 of 6 could not be answered" in result.err
    alone = run("ask", photos / "c.jpg", QUESTIONS[1], *few)
    assert alone.out.strip() == found[-1]["answer"]


def test_ask_takes_a_folder_or_a_list_as_batch_does(run: Run, few: tuple[object, ...], photos: Path) -> None:
    (photos / "b.png").unlink()
    entries = [{"image": name, "question": "Cat?"} for name in ("a.png", "c.jpg")]
    (photos / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    answers = [
        [one["answer"] for one in lines(run(command, source, *asked, *few).out)]
        for command in ("ask", "batch")
        for source, asked in ((photos, ["Cat?"]), (photos / "list.jsonl", []))
    ]
    assert len(answers[0]) == 2
    assert all(answer == answers[0] for answer in answers)
    assert run("ask", photos, "Cat?", "--picture", photos / "x.png", *few).code == 2


def test_lines_keep_what_they_brought(
    run: Run, few: tuple[object, ...], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"id": 7, "image": [str(photos / "a.png"), str(photos / "c.jpg")], "question": "一 two\u2028lines?"}
    text = json.dumps(entry, ensure_ascii=False) + "\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    result = run("batch", "-", *few)
    assert result.code == 0, result.err
    (found,) = (json.loads(line) for line in result.out.split("\n") if line)
    assert {name: found[name] for name in entry} == entry
    assert found["tokens"]["all"] == 2 * NUM_PATCHES


def test_going_on_asks_only_what_is_left(
    run: Run, few: tuple[object, ...], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "b.png").unlink()
    file = tmp_path / "out.jsonl"
    whole = cli_batch._answer
    asked: list[str] = []

    def interrupted(*arguments: Any) -> Any:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(arguments[3]["image"])
        return whole(*arguments)

    monkeypatch.setattr(cli_batch, "_answer", interrupted)
    result = run("batch", photos, "Cat?", *few, "--output", file)
    assert result.code == 130
    assert result.err.strip().splitlines()[-1] == (
        f"interrupted: 1 of 2 answers are in {file}; go on with the same command and --resume"
    )
    with file.open("a") as cut:
        cut.write('{"image": "c.j')  # as a power cut leaves it
    refused = run("batch", photos, "Cat?", *few, "--output", file)
    assert refused.code == 2
    assert "--resume" in refused.err
    asked.clear()
    monkeypatch.setattr(cli_batch, "_answer", lambda *a: asked.append(a[3]["image"]) or whole(*a))
    assert run("batch", photos, "Cat?", *few, "--output", file, "--resume").code == 0
    assert asked == ["c.jpg"]
    assert [one["image"] for one in lines(file.read_text())] == ["a.png", "c.jpg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ('{"question": "x?"}', "names no image"),
        ('{"image": "a.png"}', "asks nothing"),
        ('{"image": 3, "question": "x?"}', "names no image"),
        ("[]", "names no image"),
        ("", "holds no line"),
    ],
)
def test_lists_that_ask_nothing(run: Run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    result = run("batch", tmp_path / "list.jsonl")
    assert result.code == 2
    assert words in result.err
    assert len(result.err.splitlines()) == 1


def test_sources_that_are_none(run: Run, photos: Path, tmp_path: Path) -> None:
    assert run("batch", tmp_path / "gone.jsonl").code == 2
    assert "nothing is asked" in run("batch", photos).err
    (tmp_path / "empty").mkdir()
    assert "holds no image" in run("batch", tmp_path / "empty", "Cat?").err
    (tmp_path / "out.jsonl").write_text("hello\n")
    other = run("batch", photos, "Cat?", "--output", tmp_path / "out.jsonl", "--resume")
    assert other.code == 2
    assert "no lines of ivtp batch" in other.err
    assert (tmp_path / "out.jsonl").read_text() == "hello\n"
