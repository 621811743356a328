"""`ivtp reproduce`: figures of lmms-eval's own, paired intervals, and a run that may be killed at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")

from ivtp.cli.app import app
from ivtp.cost.flops import flops
from ivtp.cost.sizes import sizes
from ivtp.errors import ConfigError
from ivtp.evaluation import lmms, micro12, sweep
from ivtp.evaluation.lmms import IvtpModel, Prompt
from ivtp.evaluation.reproduce import ablations, base, table1
from ivtp.evaluation.run import Asked
from tests.recipes.test_evaluate import folder  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TWELVE = [column.title for column in micro12.MICRO12]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's, for data sets."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("user")
        patch.setenv("XDG_CACHE_HOME", str(place))
        yield place


@pytest.fixture
def brief(folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A small model with answers of one token; random weights would never end theirs."""
    copy = shutil.copytree(folder, tmp_path / "brief")
    every_token = list(range(json.loads((copy / "config.json").read_text())["text_config"]["vocab_size"]))
    settings = json.loads((copy / "generation_config.json").read_text()) | {"eos_token_id": every_token}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures without other processes."""

    def in_turn(asked: Asked, runs: Sequence[sweep.Run], workers: int, told: sweep.OnAnswers) -> Iterator[Any]:
        yield from ((run, sweep.measured(run.asked(asked), told)) for run in runs)

    monkeypatch.setattr(sweep, "sweep", in_turn)


def words(model: Path, place: Path, *more: str) -> list[str]:
    asked = ["--model", str(model), "--tasks", "micro12", "--limit", "4", "--batch-size", "4"]
    return [*asked, "--cache", str(place / "answers"), "--output", str(place / "out"), *more]


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], catch_exceptions=False)


def rows_of(place: Path, name: str) -> list[dict[str, Any]]:
    return list(json.loads((place / "out" / f"{name}.json").read_text(encoding="utf-8"))["rows"])


METHODS = ("--method", "ivtp", "--method", "topk")


def test_table1(brief: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("reproduce", "table1", *words(brief, tmp_path, *METHODS, "--keep", "16"))
    assert done.exit_code == 0, done.output
    full, *others = rows_of(tmp_path, "table1")
    assert full["method"] == "none"
    assert {row["method"] for row in others} == {"ivtp", "topk"}
    for row in (full, *others):
        assert list(row["benchmarks"]) == TWELVE
        assert row["mean"] == pytest.approx(sum(row["benchmarks"].values()) / 12)
        assert row["mean low"] <= row["mean"] <= row["mean high"]
        assert set(row["objects"]) <= {"1-3 objects", "4-7 objects", "8-12 objects"}
    for row in others:
        assert row["change"] == pytest.approx(row["mean"] - full["mean"])
        assert row["visual_tokens"] == 16 < full["visual_tokens"]
    best, other = others
    assert "to best" not in best
    assert other["to best"] <= 0
    assert other["to best"] == pytest.approx(other["mean"] - best["mean"])
    for row in others:
        assert row["tflops"] < full["tflops"]
    page = (tmp_path / "out" / "table1.md").read_text(encoding="utf-8")
    assert all(f"| {title} |" in page for title in ("mean", "to IVTP", "GQA"))
    monkeypatch.setattr(IvtpModel, "answer", lambda *_: 1 / 0)  # whatever was answered is not asked again
    evaluated = invoke("eval", *words(brief, tmp_path, "--method", "topk", "--keep", "16"))
    assert evaluated.exit_code == 0, evaluated.output
    row = json.loads(next((tmp_path / "out").glob("brief-topk-16-*.json")).read_text(encoding="utf-8"))["row"]
    assert {title: row[title] for title in TWELVE} == pytest.approx(
        next(r["benchmarks"] for r in others if r["method"] == "topk")
    )


def test_figure3(brief: Path, tmp_path: Path, here: None) -> None:
    done = invoke("reproduce", "figure3", *words(brief, tmp_path, "--method", "topk", "--keep", "16", "--keep", "64"))
    assert done.exit_code == 0, done.output
    assert [(row["method"], row["keep"]) for row in rows_of(tmp_path, "figure3")] == [
        ("none", "all"),
        ("topk", 16),
        ("topk", 64),
    ]
    assert (tmp_path / "out" / "figure3.png").stat().st_size > 10_000
    drawn = (tmp_path / "out" / "figure3.svg").read_text(encoding="utf-8")
    for text in ("TFLOPs of a prefill, choosing included", "mean of the benchmarks", "all tokens", "topk"):
        assert f"<!-- {text} -->" in drawn  # glyphs are paths; matplotlib writes above them what they say


def test_killed_and_asked_again_finds_what_an_undisturbed_run_finds(brief: Path, tmp_path: Path, here: None) -> None:
    """Also no process is left behind."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    asked = ["reproduce", "table1", *words(brief, killed, *METHODS, "--keep", "16", "--workers", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "ivtp", *asked]
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as main:
        assert _within(300, lambda: _lines(killed) > 6), "no answers came"
        main.send_signal(signal.SIGKILL)
    assert _within(120, lambda: not _alive(main.pid))
    assert not (killed / "out").exists()
    before = _lines(killed)
    for place in (killed, whole):
        done = invoke("reproduce", "table1", *words(brief, place, *METHODS, "--keep", "16"))
        assert done.exit_code == 0, done.output
    assert _lines(killed) > before
    mine, undisturbed = (rows_of(place, "table1") for place in (killed, whole))
    assert mine == undisturbed


def _lines(place: Path) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in (place / "answers").glob("*.jsonl"))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_other_pictures_under_the_same_question_are_asked_anew() -> None:
    prompts = [
        Prompt("USER: <image> what is it?", (Image.new("RGB", (4, 4), colour),), {}, ()) for colour in ("red", "blue")
    ]
    request = SimpleNamespace(args=("", None, {}, 3, "pope", "test"))
    first, second = (lmms._item(request, prompt) for prompt in prompts)  # type: ignore[arg-type]
    assert first != second
    assert first == lmms._item(request, prompts[0])  # type: ignore[arg-type]
    assert first.startswith("pope/test/3/")


def test_ablations_say_whose_sign_is_whose() -> None:
    def row(says: str, low: float, high: float) -> dict[str, Any]:
        return {"says": says, "to default low": low, "to default high": high}

    worse, none, better = (-3.0, -1.0), (-1.0, 1.0), (1.0, 3.0)
    assert ablations.sign([row("worse", *span) for span in (worse, none, better)]) == (
        "paper's in 1, none in 1, opposite in 1"
    )
    assert ablations.sign([row("no better", *span) for span in (worse, none, better)]) == "paper's in 2, opposite in 1"
    assert ablations.sign([row("", *worse)]) == "–"


@pytest.mark.parametrize("model", ["micro", "llava-1.5-7b"])
def test_every_ablation_can_be_asked(model: str) -> None:
    """All cells are runs that the model's sizes allow, each at its own tokens and stages."""
    found = list(ablations.cells(sizes(model), ablations.KEEPS))
    for *_, run in found:
        assert flops(model, method=run.method, keep=run.keep, text_tokens=64, **run.options).total > 0
    assert {about.partition(" ")[0] for about, *_ in found} >= {
        "how",
        "what",
        "threshold",
        "decoder",
        "layers",
        "tokens",
    }


@pytest.mark.parametrize(
    "asked",
    [
        ["--method", "ivpt"],
        ["--keep", "999"],
        ["--output", "/dev/null/x"],
        ["--tasks", "ocrbench"],
        ["--image", "x.png"],
    ],
)
def test_what_cannot_be_is_one_line(asked: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^.+$"):
        invoke("reproduce", "table1", "--limit", "4", *asked)


def test_differences_inside_their_interval_are_none() -> None:
    row = {"change": 0.4, "change low": -0.3, "change high": 1.2}
    assert base.shown_difference(row, "change") == "none (-0.3 to +1.2)"
    assert base.shown_difference(row | {"change low": 0.1}, "change") == "+0.4 (+0.1 to +1.2)"
    assert base.shown_difference({"change": None}, "change") == "–"


def test_a_run_of_the_full_model_takes_no_options() -> None:
    asked = Asked("m", ("gqa",), "ivtp", 64, options={"guide": "text"})
    assert base.FULL.asked(asked).options is None
    assert sweep.Run("topk", 16, {"seed": 1}).asked(asked).options == {"guide": "text", "seed": 1}


def test_untrained_methods_say_so() -> None:
    assert table1.label({"method": "dynamicvit", "name": "dynamicvit"}) == "dynamicvit (untrained)"
