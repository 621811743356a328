"""Whatever goes wrong, a command says it in one line, with the exit code that belongs to it; never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from terminal import Result, Run, one_line
from tiny import QUESTIONS, Tiny

import ivtp
from ivtp import errors
from ivtp.cli import app as cli
from ivtp.cli import bench as bench_cli
from ivtp.cli.console import guided_by
from ivtp.trace import Word
from recipes.micro import evaluate, gates, train

COMMANDS: dict[str, Callable[[], Any]] = {
    "ivtp": cli.app,
    "gates": gates.app,
    "evaluate": evaluate.app,
    "train": train.app,
}


@pytest.fixture
def run(call: Run) -> Run:
    """Runs a command of the list, or a function, with arguments, in this process."""

    def command(what: str | Callable[[], Any], *arguments: object) -> Result:
        return call(COMMANDS[what] if isinstance(what, str) else what, *arguments)

    return command


# ---- the door itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.ConfigError("keep=0"), 2, "error: keep=0"),
        (errors.ImageError("no image"), 2, "no image"),
        (errors.InputError("no question"), 2, "no question"),
        (errors.LoadError("no model"), 1, "no model"),
        (errors.AttachError("attached"), 1, "attached"),
        (errors.OutputError("full"), 1, "full"),
        (PermissionError(13, "Permission denied", "x.png"), 1, "x.png"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "smaller image"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (TypeError("a\nb"), 1, "internal error: TypeError: a; run again with --traceback"),
        (ZeroDivisionError(), 1, "internal error: ZeroDivisionError"),
        (errors.ConfigError("two\nlines \x1b[31m \udcff"), 2, r"two\nlines \x1b[31m \udcff"),
    ],
    ids=repr,
)
def test_every_error_becomes_one_line(run: Run, error: Exception, code: int, words: str) -> None:
    def command() -> None:
        raise error

    result = run(command)
    assert result.code == code
    assert words in one_line(result.err)
    assert result.out == ""


def test_the_flag_shows_where_an_error_came_from(run: Run) -> None:
    def command() -> None:
        assert sys.argv == ["command", "x", "--", "--traceback"]
        raise TypeError("nothing")

    result = run(command, "--traceback", "x", "--", "--traceback")
    assert result.code == 1
    assert "in command" in result.err
    assert result.err.splitlines()[-1].startswith("error: internal error: TypeError: nothing")
    assert "--traceback" in run("ivtp", "--help").out


def test_an_interruption_is_not_held_up(run: Run) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(command)


# ---- ask ------------------------------------------------------------------------------------------------------


def ask(run: Run, photo: Path, question: str, model: Path, *more: object) -> Result:
    return run("ivtp", "ask", photo, question, "--model", model, "--keep", 8, "--max-new-tokens", 2, *more)


@pytest.mark.parametrize(
    ("question", "words"), [("", "empty"), ("   ", "empty"), ("\n", "empty"), ("what \udcff is it?", r"what \udcff")]
)
def test_questions_that_ask_nothing(run: Run, photo: Path, tmp_path: Path, question: str, words: str) -> None:
    result = ask(run, photo, question, tmp_path / "not read")
    assert result.code == 2
    assert words in one_line(result.err)


def test_the_library_refuses_them_too(tiny: Tiny, photo: Path) -> None:
    for question in ("", " ", "\udcff", None, 3, ["what?"]):
        with pytest.raises(errors.InputError):
            ivtp.ask(tiny.model(), tiny.processor, photo, question)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "random", "--seed", 2**64], "--seed 18446744073709551616"),
        (["--method", "random", "--seed", 10**40], "2**64"),
        (["--method", "dynamicvit", "--option", "predictors=PHOTO"], "no predictors"),
        (["--method", "dynamicvit", "--option", "predictors=5"], "no predictors"),
        (["--method", "dynamicvit", "--option", "predictors=/"], "no predictors"),
    ],
)
def test_values_that_no_method_can_use(
    run: Run, photo: Path, checkpoint: Path, arguments: list[object], words: str
) -> None:
    given = [str(argument).replace("PHOTO", str(photo)) for argument in arguments]
    result = ask(run, photo, "Hello?", checkpoint, *given)
    assert result.code == 2
    assert words in one_line(result.err)
    assert ask(run, photo, "Hello?", checkpoint, "--method", "random", "--seed", 2**64 - 1).code == 0


@pytest.mark.parametrize("damage", ["no template", "broken template", "CLIP shard"])
def test_damaged_checkpoints(run: Run, photo: Path, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    if damage == "CLIP shard":
        file = folder / "clip" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (folder / "chat_template.jinja").unlink()
        if damage == "broken template":
            (folder / "chat_template.jinja").write_text("{% if %}")
    result = ask(run, photo, "Hello?", folder)
    assert result.code != 0
    one_line(result.err)


def test_a_huge_sparse_file_is_refused_unread(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "huge.png"
    with file.open("wb") as opened:
        opened.truncate(40_000_000_000)
    result = ask(run, file, "Hello?", tmp_path)
    assert result.code == 2
    assert "40.0 GB" in one_line(result.err)


def test_an_image_that_memory_does_not_hold(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", exhausted)
    result = ask(run, photo, "Hello?", photo)
    assert result.code == 2
    assert "memory" in one_line(result.err)


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_terminal_without_the_characters_loses_nothing(
    photo: Path, checkpoint: Path, as_json: tuple[str, ...]
) -> None:
    question = "标志 is it 🐶 é?"
    code = "from ivtp.cli.app import main; main()"
    command = [sys.executable, "-c", code, "ask", photo, question, "--model", checkpoint, "--keep", "8", *as_json]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    if as_json:
        words = [word["text"] for word in json.loads(done.stdout)["words"]]
        assert "标" in words
        assert "é" in words


def test_a_prompt_longer_than_the_model_says_so(
    run: Run, photo: Path, tiny: Tiny, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    short = ask(run, photo, "Cat?", folder, "--json")
    assert json.loads(short.out)["notes"] == []
    result = ask(run, photo, QUESTIONS[0] * 3, folder)
    assert result.code == 0
    (line,) = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert "60" in line
    notes = json.loads(ask(run, photo, QUESTIONS[0] * 3, folder, "--json", "--method", "none").out)["notes"]
    assert [f"note: {note}" for note in notes] == [line]


def test_words_that_guide_are_named_once_and_ten_at_most() -> None:
    words = [Word("sign", 0.3, True), Word("of", 0.1, False), Word("sign", 0.4, True), Word("red", 0.35, True)]
    assert guided_by(words) == "sign 0.40, red 0.35"
    many = [Word(f"w{i}", i / 100, True) for i in range(25)] * 80
    text = guided_by(many)
    assert text.startswith("w15 0.15, w16 0.16")
    assert text.endswith("w24 0.24 and 15 less relevant words")
    assert guided_by([Word("\x1b[31m", 0.3, True)]) == r"\x1b[31m 0.30"
    assert guided_by(words[1:2]) == ""


# ---- the other commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("ivtp", ["reproduce", "table2"]),
        ("ivtp", ["reproduce", "table1", "--method", "foo"]),
        ("ivtp", ["reproduce", "table1", "--keep", "0"]),
        ("ivtp", ["reproduce", "table1", "--workers", "0"]),
        ("ivtp", ["reproduce", "table1", "--batch-size", "0"]),
        ("ivtp", ["reproduce", "table1", "--limit", "0"]),
        ("ivtp", ["reproduce", "table1", "--output", "/dev/null/x"]),
        ("gates", ["--questions", "0"]),
        ("gates", ["--threads", "0"]),
        ("gates", ["--gate", "8"]),
        ("gates", ["--output", "/nowhere/x.json"]),
        ("gates", ["--output", "x.json", "--markdown", "x.json"]),
        ("evaluate", ["--by-type", "--threads", "0"]),
        ("evaluate", ["--by-type", "--split", "nothing"]),
        ("evaluate", ["--coverage", "1", "--keep", "999"]),
        ("evaluate", ["--by-type", "--markdown", "/nowhere/x.md"]),
        ("train", ["vision", "--threads", "0"]),
        ("train", ["decoder", "--out", "/proc/new", "--steps", "1"]),
        ("train", ["stage2", "--steps", "0"]),
        ("train", ["export", "--asset", "--threads"]),
        ("ivtp", ["bench", "--seed", str(2**64)]),
        ("ivtp", ["samples", "--", "--count"]),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_code_2_and_no_traceback(run: Run, command: str, arguments: list[str]) -> None:
    result = run(command, *arguments)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    if "Usage" not in result.err:
        one_line(result.err)


@pytest.mark.parametrize("command", ["gates", "evaluate"])
def test_models_that_are_not_there_are_code_1(run: Run, command: str, tmp_path: Path) -> None:
    more = ["--by-type"] if command == "evaluate" else ["--gate", "1"] if command == "gates" else []
    result = run(command, "--model", tmp_path / "nope", *more)
    assert result.code == 1
    assert "nope" in one_line(result.err)


def test_a_device_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("train", "decoder", "--out", tmp_path, "--steps", "1", "--device", "warp")
    assert result.code == 1
    assert "device 'warp'" in one_line(result.err)


def test_drawing_without_matplotlib(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,2.0\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (
        ("train", "plot", "--out", tmp_path),
        ("ivtp", "bench", "--plot", tmp_path / "x.png"),
    ):
        result = run(*command)
        assert result.code == 2
        assert "pip install" in one_line(result.err)


def test_bench_has_one_meaning_of_json(run: Run) -> None:
    result = run("ivtp", "bench", "--json", "out.json")
    assert result.code == 2
    assert "--json" in result.err
    assert bench_cli.bench.__doc__ is not None
    assert "--output" in bench_cli.bench.__doc__
