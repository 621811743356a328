"""Whole sweeps of the tiny geometry: documents, resuming, interruptions, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import speed_table
from ivtp.benchmark import measure as measuring
from ivtp.benchmark import sweep as sweeping
from ivtp.benchmark.growth import growth_grids, steps
from ivtp.benchmark.plot import plot
from ivtp.benchmark.sweep import rounds, sweep
from ivtp.benchmark.table import grids, markdown, number, summary
from ivtp.errors import ConfigError

ROWS = ["full", "oracle", "ivtp"]


def test_a_document_holds_what_was_asked_where_and_every_number(ask: Any, tmp_path: Path) -> None:
    file, told = tmp_path / "out.json", []
    asked = ask(keeps=(6, 12))
    document = sweep(asked, file=file, command="ivtp bench", report=told.append)
    assert json.loads(file.read_text()) == json.loads(json.dumps(document))
    assert list(tmp_path.iterdir()) == [file]
    assert len(told) == rounds(asked)
    assert document["asked"]["methods"] == ["ivtp"]
    assert document["asked"]["model"] is None
    assert {"device", "threads", "torch", "transformers", "commit", "load"} <= set(document["machine"])
    assert [result["keep"] for result in document["results"]] == [6, 12]
    rows = document["results"][0]["rows"]
    assert [row["run"] for row in rows] == ROWS
    assert [len(row["all"]["times"]) for row in rows] == [2, 2, 2]
    assert all(row["over_oracle"] == 1 for row in rows if row["run"] == "oracle")


def test_tables_have_every_run_and_column(ask: Any) -> None:
    document = sweep(ask())
    tables = grids(document)
    assert [[row[0] for row in table.rows] for table in tables] == [ROWS] * 4
    assert [table.title for table in tables] == ["keep 6, 14 text tokens, 1 image(s), batch 1", "", "", ""]
    assert "decode / stock" in tables[2].header
    whole = summary(document)
    assert all(len(row) == len(whole.header) for row in whole.rows)
    page = markdown(whole).splitlines()
    assert len(page) == 2 + 3
    assert page[0].startswith("| keep | text | images | batch | run | prefill ms |")
    assert {line.count("|") for line in page} == {len(whole.header) + 1}
    assert [number(value) for value in (0.0, 0.01234, 12.345, 123456.0, -2.5, None)] == [
        "0.00",
        "0.0123",
        "12.35",
        "123456",
        "-2.500",
        "-",
    ]


def test_resuming_measures_only_what_is_missing(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measured = tmp_path / "out.json", []
    real = sweeping.measure

    def counted(subject: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(prompt.text_tokens)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(subject, prompt, *args, **kwargs)

    monkeypatch.setattr(sweeping, "measure", counted)
    asked = ask(texts=(14, 15, 16))
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, file=file)
    before = json.loads(file.read_text())
    assert [result["text"] for result in before["results"]] == [14]
    document = sweep(asked, file=file, resume=True)
    assert measured == [14, 15, 15, 16]
    assert [result["text"] for result in document["results"]] == [14, 15, 16]
    assert document["results"][0] == before["results"][0]
    monkeypatch.setattr(sweeping, "load_subject", None)  # nothing is left to do: no model is needed
    assert sweep(asked, file=file, resume=True)["results"] == json.loads(file.read_text())["results"]
    with pytest.raises(ConfigError, match="repeats=2, not 3"):
        sweep(ask(texts=(14, 15, 16), repeats=3), file=file, resume=True)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="no result"):
        sweep(asked, file=file, resume=True)


def test_out_of_memory_is_a_result_and_is_tried_again(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = tmp_path / "out.json", measuring.run_prefill

    def small(model: Any, inputs: Any) -> Any:
        if inputs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError
        return real(model, inputs)

    asked = ask(batches=(2, 1))
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_prefill", small)
        document = sweep(asked, file=file)
    assert [result.get("error") for result in document["results"]] == ["out of memory", None]
    assert grids(document)[0].rows == [("out of memory",)]
    assert summary(document).rows[0][:5] == ("6", "14", "1", "2", "out of memory")
    again = sweep(asked, file=file, resume=True)
    assert [(result["batch"], result.get("error")) for result in again["results"]] == [(1, None), (2, None)]


def test_what_does_not_fit_the_model_is_refused_first(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with pytest.raises(ConfigError, match=r"1\.\.36"):
        sweep(ask(keeps=(6, 600)), file=file)
    assert not file.exists()


def test_a_picture_of_latency_is_drawn(ask: Any, tmp_path: Path) -> None:
    document = sweep(ask(keeps=(6, "50%"), texts=(14, 20), tokens=0))
    plot(document, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_growth_is_tabled_and_drawn(ask: Any, tmp_path: Path) -> None:
    document = sweep(ask(growth=True, texts=(14, 28), images=(1, 2), batches=(1,), tokens=None))
    assert [step.size for step in steps(document, "text")] == [14, 28]
    assert [step.size for step in steps(document, "batch")] == [1]
    tables = growth_grids(document)
    assert [table.title for table in tables] == ["growth with text", "", "growth with images", ""]
    assert tables[0].header[-3:] == ("scoring ms", "attention ms", "scoring / attention")
    assert [row[0] for row in tables[0].rows] == ["14", "28", "x 2"]
    plot(document, tmp_path / "out.svg")
    assert (tmp_path / "out.svg").stat().st_size > 1000


def test_the_page_is_rewritten_between_its_marks(ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, results = tmp_path / "speed.md", tmp_path / "results"
    results.mkdir()
    page.write_text("before\n")
    assert speed_table.main(page, results) == 1
    assert "no results" in capsys.readouterr().err
    sweep(ask(tokens=0), file=results / "tiny.json", command="ivtp bench --geometry tiny --output elsewhere/tiny.json")
    assert speed_table.main(page, results) == 1
    assert "speed:begin" in capsys.readouterr().err
    assert page.read_text() == "before\n"
    page.write_text("before\n<!-- speed:begin (by hand: never) -->\nold\n<!-- speed:end -->\nafter\n")
    assert speed_table.main(page, results) == 0
    written = page.read_text()
    assert speed_table.main(page, results) == 0
    assert page.read_text() == written
    assert written.startswith("before\n<!-- speed:begin (by hand: never) -->\n")
    assert written.endswith("<!-- speed:end -->\nafter\n")
    assert "old" not in written
    assert (
        "`ivtp bench --geometry tiny --output results/speed/tiny.json` ([file](../results/speed/tiny.json))" in written
    )
    assert sum(line.startswith("| 6 | 14 | 1 | 1 |") for line in written.splitlines()) == 3
