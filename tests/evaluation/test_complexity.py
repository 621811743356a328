"""`ivtp reproduce complexity`: the paper's table to the digit, counted without lmms-eval and without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ivtp.cli.app import app
from ivtp.cost.flops import flops
from ivtp.evaluation.reproduce import complexity

PAPER = {  # LLaVA-1.5-7B, 64 visual and 512 text tokens: TFLOPs and the percent that they save
    "all tokens": (15.4, 0.0),
    "random, in the ViT": (8.0, 48.1),
    "TopK, in the ViT": (8.0, 48.1),
    "spatial pooling, after the ViT": (8.1, 47.4),
    "EViT": (8.0, 48.1),
    "ToMe": (8.0, 48.1),
    "Honeybee (C-Abstractor)": (8.1, 47.4),
    "LLaMA-VID": (8.2, 46.8),
    "Qwen-VL (resampler)": (8.1, 47.4),
    "IVTP": (8.2, 46.8),
}


def test_ours_is_the_papers_table_to_the_digit() -> None:
    rows = {row["row"]: row for row in complexity.printed()}
    assert list(rows) == list(PAPER)
    for name, row in rows.items():
        assert (row["published"], round(row["published saving"], 1)) == PAPER[name]
        assert (round(row["tflops"], 1), round(row["tflops saving"], 1)) == PAPER[name]


@pytest.mark.parametrize("model", complexity.MODELS)
def test_short_prompts_and_few_tokens_save_the_most(model: str) -> None:
    asked = list(complexity.points(model, "ivtp"))
    text = [complexity.count(model, "ivtp", *one)["saving"] for one in asked if one[0] == "text"]
    kept = [complexity.count(model, "ivtp", *one)["saving"] for one in asked if one[0] == "keep"]
    assert (len(text), len(kept)) == (len(complexity.TEXTS), len(complexity.KEEPS))
    assert text == sorted(text, reverse=True)
    assert kept == sorted(kept, reverse=True)
    assert text[0] > complexity.SHORT  # the paper: up to 70% for short prompts
    assert kept[-1] < 0  # choosing costs, also where nothing is left out


def test_the_command_needs_neither_lmms_eval_nor_weights(tmp_path: Path) -> None:
    """As a user without the extra `eval` runs it."""
    without = "import sys; sys.modules['lmms_eval'] = None; from ivtp.cli.app import main; main()"
    words = ["reproduce", "complexity", "--method", "FastV", "--output", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "60"}
    ran = subprocess.run([sys.executable, "-c", without, *words], env=env, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "spatial pooling, after the ViT" in ran.stdout  # in one line, however narrow the terminal
    document = json.loads((tmp_path / "complexity.json").read_text(encoding="utf-8"))
    assert document["about"]["models"] == list(complexity.MODELS)
    assert "lmms_eval" not in document["about"]
    assert {row["method"] for row in document["rows"]} == {"none", "fastv"}
    for row in document["rows"]:
        asked = {} if row["method"] == "none" else {"keep": row["keep"]}
        total = flops(row["model"], method=row["method"], text_tokens=row["text"], **asked).total
        assert row["tflops"] == pytest.approx(total / 1e12)
    assert {file.name for file in tmp_path.iterdir()} == {f"complexity.{kind}" for kind in ("json", "md", "png", "svg")}


def test_a_model_of_ones_own_is_counted_and_has_no_published_figures(geometry: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["reproduce", "complexity", "-m", str(geometry), "--method", "topk", "--output", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "complexity.json").read_text(encoding="utf-8"))
    assert document["about"]["published"] == []
    assert {row["keep"] for row in document["rows"] if row["method"] == "topk"} == {16, 32, 36}  # it has 36 patches


@pytest.mark.parametrize("words", [("--limit", "5"), ("--keep", "16"), ("--tasks", "micro12"), ("--workers", "1")])
def test_what_counting_has_no_use_for_is_refused(words: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=f"{words[0]} has no use in complexity"):
        CliRunner().invoke(app, ["reproduce", "complexity", *words, "--output", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
