"""`ivtp train`: bad data is named before anything is loaded, and a plan trains nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from terminal import Run, one_line

import ivtp

TURNS = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "Because it is red."}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four good records, two of them with text alone."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    text = [{**TURNS[0], "value": "Why?"}, TURNS[1]]
    records = [{"id": f"i{n}", "image": "a.png", "conversations": TURNS} for n in range(2)]
    records += [{"id": f"t{n}", "conversations": text} for n in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_check_says_what_can_be_trained_on(run: Run, data: Path) -> None:
    result = run("train", "check", "--data", data, "--images", data.parent)
    assert (result.code, result.out) == (0, "")
    assert "4 records can be trained on (2 with images, 2 with text alone), 0 cannot" in result.err


def test_check_names_every_bad_record(run: Run, data: Path) -> None:
    records = json.loads(data.read_text())
    records[0]["image"] = "gone.png"
    records[2]["conversations"] = records[2]["conversations"][:1]
    data.write_text(json.dumps(records))
    result = run("train", "check", "--data", data, "--images", data.parent)
    assert result.code == 2
    first, second = result.out.splitlines()
    assert re.match(r"record 0 \(id 'i0'\): .*gone.png does not exist", first)
    assert re.match(r"record 2 \(id 't0'\): its turn 1 has no answer", second)
    assert "2 bad record(s)" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("check", "--data", "none.json"), "none.json is no file"),
        (("check", "--data", "none.json", "--stage", "third"), "--stage third is unknown"),
        (("finetune", "--out", "run"), "--data FILE is missing"),
        (("pretrain", "--data", "none.json"), "--out DIR is missing"),
        (("finetune", "--data", "none.json", "--out", "run"), "none.json is no file"),
        (("finetune", "--data", "d", "--out", "r", "--method", "topp"), "topk"),
        (("finetune", "--data", "d", "--out", "r", "--keep", "0"), "--keep 0"),
        (("finetune", "--data", "d", "--out", "r", "--set", "lr"), "--set lr is not NAME=VALUE"),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, line: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", *line)
    assert result.code == 2
    assert words in one_line(result.err)
    assert not list(tmp_path.iterdir())


def test_bad_data_is_refused_before_a_model_is_read(run: Run, data: Path, tmp_path: Path) -> None:
    data.write_text(data.read_text().replace("a.png", "gone.png"))
    files = ("--data", data, "--images", data.parent, "--out", tmp_path / "run")
    result = run("train", "finetune", *files, "--model", "no/model")
    assert result.code == 2
    assert "record 0 (id 'i0')" in one_line(result.err)


def test_a_plan_trains_nothing(run: Run, data: Path, tmp_path: Path) -> None:
    files = ("--data", data, "--images", data.parent, "--out", tmp_path / "run")
    line = ("train", "finetune", *files, "--keep", "64", "--batch", "2", "--devices", "2")
    full, pruned = (run(*line, "--plan", "--method", method) for method in ("none", "ivtp"))
    assert (full.code, pruned.code) == (0, 0)
    assert "4, 2 with images" in full.out
    assert "2 of 2 records, 1 at once on each of 2 device(s)" in full.out
    assert re.search(r"FLOPs of a record .*\(-\d+\.\d% against all tokens\)", pruned.out)
    assert "against" not in full.out
    assert not (tmp_path / "run").exists()


def test_a_plan_without_data_says_what_it_assumes(run: Run) -> None:
    result = run("train", "pretrain", "--plan", "--model", "llava-1.5-7b", "--devices", "8")
    assert result.code == 0
    assert "2181 of 256 records, 32 at once on each of 8 device(s)" in result.out
    assert "558128 records of 32 text tokens are assumed" in result.out


def test_training_goes_from_the_command_to_an_answer(
    run: Run, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--data", data, "--images", data.parent, "--model", checkpoint, "--out", tmp_path / "run")
    result = run("train", "finetune", *files, "--method", "topk", "--keep", 8, "--batch", 2, "--max-steps", 1)
    assert result.code == 0
    assert "1 steps on 4 records, last loss " in result.out
    model, processor = ivtp.load(tmp_path / "run")
    assert ivtp.ask(model, processor, data.parent / "a.png", "Why?", method="topk", keep=8, max_new_tokens=2).trace
