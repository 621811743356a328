"""`ivtp bench` as a user meets it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from terminal import Run
from tiny import Tiny

from ivtp.benchmark import sweep as sweeping


@pytest.fixture
def bench(run: Run) -> Run:
    """Runs `ivtp bench ARGUMENTS` in this process: exit code, standard output, standard error."""
    return functools.partial(run, "bench")


@pytest.fixture
def few(geometry: Path) -> tuple[object, ...]:
    """Arguments for the fewest runs."""
    return "--geometry", geometry, "--layers", "3,4", "--keep", 6, "--text", 14, "--repeats", 1, "--tokens", 1


def test_tables_on_stdout_and_files_beside(bench: Run, few: tuple[object, ...], tmp_path: Path) -> None:
    numbers, picture = tmp_path / "out.json", tmp_path / "out.png"
    code, out, err = bench(*few, "--method", "ivtp", "--method", "topk", "--output", numbers, "--plot", picture)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(str(few[1]))
    assert "guide=text" in out
    assert "3 of 6 encoder and 4 of 8 decoder layers, llm_layers=3" in out
    for run in ("full", "oracle", "ivtp", "topk"):
        assert sum(line.startswith(f"{run} ") for line in lines) == 4 + 4 * (run == "oracle")  # each has its own
    assert all(title in out for title in ("x oracle", "clock / FLOPs", "first token ms", "peak MB", "decode / stock"))
    document = json.loads(numbers.read_text())
    assert document["command"].startswith("ivtp bench --geometry ")
    assert document["asked"]["layers"] == [3, 4]
    assert picture.stat().st_size > 1000
    assert bench(*few, "--method", "ivtp", "--method", "topk", "--output", numbers, "--resume")[0] == 0
    code, _, err = bench(*few, "--method", "ivtp", "--output", numbers, "--resume")
    assert code == 2
    assert "methods" in err


def test_a_real_checkpoint_reads_its_instruction(bench: Run, tiny: Tiny, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    for part in tiny.clip:
        part.save_pretrained(tmp_path / "clip")
    (tmp_path / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "clip": "clip"}))
    code, out, err = bench("--model", tmp_path, "--keep", 8, "--text", 80, "--repeats", 1, "--tokens", 1)
    assert code == 0, err
    assert "random weights" not in out
    assert "ivtp" in out


def test_growth_prints_how_fast_scoring_grows(bench: Run, few: tuple[object, ...]) -> None:
    code, out, err = bench(*few, "--growth", "--text", 28, "--images", 1, "--batch", 1)
    assert code == 0, err
    assert "growth with text" in out
    assert "scoring / attention" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "ivpt"], "did you mean ivtp"),
        (["--keep", "600"], "1..36"),
        (["--keep", "nan"], "--keep nan"),
        (["--layers", "4"], "VIT,LLM"),
        (["--layers", "9,9"], "1..6,1..8"),
        (["--model", "micro"], "give one of them"),
        (["--dtype", "int8"], "bfloat16"),
        (["--option", "guide"], "NAME=VALUE"),
        (["--option", "keep=8"], "use --keep"),
        (["--option", "where=layers"], "read by none"),
        (["--option", "guide=instruction"], "processor"),
        (["--output", "nowhere/out.json"], "does not exist"),
        (["--output", "/proc/out.json"], "cannot be written"),
        (["--output", "--compile"], "is followed by --compile"),
        (["--plot", "out.docx"], "suffixes"),
        (["--plot", "/proc/out.png"], "cannot be written"),
        (["--output", "out.png", "--plot", "out.png"], "would overwrite"),
        (["--resume"], "--output"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(bench: Run, geometry: Path, arguments: list[str], words: str) -> None:
    keep = [] if "--keep" in arguments else ["--keep", "6"]
    code, out, err = bench("--geometry", geometry, *keep, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert words in err


def test_the_sizes_that_are_read_are_not_overwritten(bench: Run, geometry: Path) -> None:
    before = geometry.read_text()
    code, _, err = bench("--geometry", geometry, "--keep", "6", "--output", geometry)
    assert code == 2
    assert "would overwrite" in err
    assert geometry.read_text() == before


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--batch", "0"], ["--text", "x"], ["--no-such-option"]])
def test_usage_errors_are_code_2(bench: Run, arguments: list[str]) -> None:
    code, _, err = bench(*arguments)
    assert code == 2
    assert "Usage" in err


def test_an_interruption_writes_nothing_half(
    bench: Run, few: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "measure", interrupt)
    code, out, _ = bench(*few, "--output", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert code != 0
    assert out == ""
    assert list(tmp_path.iterdir()) == []
