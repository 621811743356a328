"""The comparison measures what it says, goes on where it stopped, and leaves the model alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ivtp.cli.app import app
from ivtp.errors import ConfigError
from ivtp.evaluation import compare
from tests.recipes.test_evaluate import folder  # noqa: F401

FEW = ("--questions", "12", "--workers", "1", "--threads", "1")


@pytest.fixture
def brief(folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The model, with answers of one token; random weights would never end theirs."""
    copy = shutil.copytree(folder, tmp_path / "brief")
    every_token = list(range(json.loads((copy / "config.json").read_text())["text_config"]["vocab_size"]))
    settings = json.loads((copy / "generation_config.json").read_text()) | {"eos_token_id": every_token}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[compare.Run]:
    """Measures without other processes; what was measured is listed."""
    measured: list[compare.Run] = []

    def measure_all(runs: list[compare.Run], positions: str, workers: int, bench: tuple[Any, ...]) -> Iterator[Any]:
        for run in runs:
            measured.append(run)
            yield compare.measure(compare.Bench(*bench), *run, positions)

    monkeypatch.setattr(compare, "measure_all", measure_all)
    return measured


def command(model: Path, target: Path, *more: str) -> list[str]:
    return [*FEW, "--model", str(model), "--keep", "16", "--output", str(target), *more]


def invoke(arguments: list[str]) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def rows_of(target: Path) -> list[dict[str, Any]]:
    return list(json.loads(target.read_text())["tables"][0]["rows"])


def test_the_command_compares_and_writes_files(brief: Path, tmp_path: Path) -> None:
    target, page = tmp_path / "methods.json", tmp_path / "methods.md"
    asked = command(brief, target, "--method", "topk", "--markdown", str(page))
    done = invoke(asked)
    assert done.exit_code == 0, done.output
    rows = rows_of(target)
    assert [(row["method"], row["keep"]) for row in rows] == [("none", 576), ("topk", 16)]
    assert rows[1]["GFLOPs"] < rows[0]["GFLOPs"]
    assert all(len(row["by format"]) == 12 and row["ms a prefill"] > 0 for row in rows)
    answers = {len(row["scores"].split()) for row in rows}  # in the same order, so that methods can be paired
    assert answers == {json.loads(target.read_text())["about"]["questions"]}
    assert page.read_text().count("###") == 2  # all keeps side by side, and the one keep
    assert page.read_text().count("original positions, float32") == 2
    for row in rows:
        assert list(row["by objects"]) == ["1-3 objects", "4-7 objects", "8-12 objects"]
        assert sum(crowd["questions"] for crowd in row["by objects"].values()) == row["questions"]
        assert all(f["accuracy low"] <= f["accuracy"] <= f["accuracy high"] for f in row["by objects"].values())
    (header,) = [line for line in page.read_text().splitlines() if line.startswith("| method | questions")]
    assert header.startswith("| method | questions | accuracy | 1-3 objects | 4-7 objects | 8-12 objects |")


def test_what_is_finished_is_not_measured_again(brief: Path, tmp_path: Path, here: list[compare.Run]) -> None:
    target = tmp_path / "methods.json"
    asked = command(brief, target, "--method", "topk")
    first = invoke(asked)
    assert first.exit_code == 0, first.output
    assert here == [("none", 576), ("topk", 16)]
    here.clear()
    document = json.loads(target.read_text())
    document["about"]["machine"] = "another one"
    target.write_text(json.dumps(document))
    again = invoke([*asked, "--method", "fastv", "--resume"])
    assert again.exit_code == 0, again.output
    assert here == [("fastv", 16)]
    assert [row["method"] for row in rows_of(target)] == ["none", "topk", "fastv"]
    for other in (["--positions", "compact"], ["--dtype", "bfloat16"]):
        assert isinstance(invoke([*asked, *other, "--resume"]).exception, ConfigError)


def test_rows_of_photos_that_were_drawn_otherwise_are_not_taken_up(
    brief: Path,
    tmp_path: Path,
    here: list[compare.Run],
) -> None:
    target = tmp_path / "methods.json"
    asked = command(brief, target, "--method", "topk")
    assert invoke(asked).exit_code == 0
    document = json.loads(target.read_text())
    del document["about"]["photos"]  # files from before photos were drawn by their number of objects
    target.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="give another --output"):
        raise invoke([*asked, "--resume"]).exception


def test_a_killed_comparison_leaves_no_process_behind(folder: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "ivtp", "compare", *FEW, "--model", str(folder)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as main:
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
        assert _within(120, lambda: len(children.read_text().split()) >= 2)  # the worker, and multiprocessing's tracker
        time.sleep(1)
        main.send_signal(signal.SIGKILL)
    assert _within(120, lambda: not _alive(main.pid))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_methods_are_paired_with_all_tokens_and_with_ivtp(brief: Path, tmp_path: Path, here: list[compare.Run]) -> None:
    target, page = tmp_path / "methods.json", tmp_path / "methods.md"
    methods = ("--method", "ivtp", "--method", "topk", "--markdown", str(page))
    done = invoke(command(brief, target, *methods))
    assert done.exit_code == 0, done.output
    full, ivtp, topk = rows_of(target)
    assert full["to all tokens"] is full["to ivtp"] is ivtp["to ivtp"] is None
    for row, name, other in ((ivtp, "to all tokens", full), (topk, "to all tokens", full), (topk, "to ivtp", ivtp)):
        assert row[name] == pytest.approx(row["accuracy"] - other["accuracy"])
        assert row[f"{name} low"] <= row[name] <= row[f"{name} high"]
    assert "| to all tokens | to ivtp |" in page.read_text()
