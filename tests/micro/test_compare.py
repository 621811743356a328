"""The comparison measures what it says, goes on where it stopped, and leaves the model alone."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from ivtp.micro import compare
from tests.micro.test_evaluate import folder  # noqa: F401


def test_the_command_compares_resumes_and_writes_files(folder: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    target, page = tmp_path / "methods.json", tmp_path / "methods.md"
    command = ["--model", str(folder), "--questions", "12", "--json", str(target), "--markdown", str(page)]
    command += ["--keep", "16", "--method", "topk"]
    monkeypatch.setattr(compare, "LONGEST_ANSWER", 2)
    first = CliRunner().invoke(compare.app, command)
    assert first.exit_code == 0, first.output
    rows = json.loads(target.read_text())["tables"][0]["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [("none", 576), ("topk", 16)]
    assert rows[1]["TFLOPs"] < rows[0]["TFLOPs"]
    assert all(len(row["by format"]) == 12 and row["ms a prefill"] > 0 for row in rows)
    assert page.read_text().count("###") == 1
    measured: list[str] = []
    real = compare.measure
    monkeypatch.setattr(compare, "measure", lambda *a: measured.append(a[3]) or real(*a))
    again = CliRunner().invoke(compare.app, [*command, "--method", "fastv", "--resume"])
    assert again.exit_code == 0, again.output
    assert measured == ["fastv"]
    assert CliRunner().invoke(compare.app, [*command, "--positions", "compact", "--resume"]).exit_code == 2
