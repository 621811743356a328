"""The gates count right, and the shared prefix gives the answers of stock generate."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ivtp.generate import ask, prompt_for
from ivtp.micro import world
from ivtp.micro.answering import answer_about
from ivtp.micro.world.photo import take_photo
from recipes.micro import gates
from recipes.micro.published import like_published
from recipes.micro.units import by_format, collect
from tests.recipes.test_evaluate import folder, lvlm  # noqa: F401

QUESTIONS = ["is there a dog?", "describe the image in detail please.", "图中有什么物体？"]


@pytest.mark.parametrize("with_image", [True, False])
def test_a_shared_prefix_gives_the_answers_of_generate(lvlm: Any, with_image: bool) -> None:  # noqa: F811
    model, processor = lvlm
    picture = take_photo("test", 1).picture() if with_image else None
    prompts = [prompt_for(processor, question, images=int(with_image)) for question in QUESTIONS]
    images = [picture] * len(prompts) if with_image else None
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    assert answer_about(model, processor, picture, QUESTIONS, longest=6) == expected
    if with_image:
        everything = [list(range(576))] * len(QUESTIONS)
        assert answer_about(model, processor, picture, QUESTIONS, patches=everything, longest=6) == expected


def test_every_format_is_asked_about_every_photo_that_offers_it() -> None:
    groups = collect("test", 4)
    again = collect("test", 4)
    assert [[u.examples for u in units] for units in groups] == [[u.examples for u in units] for units in again]
    titles = [unit.form.title for units in groups for unit in units]
    assert {titles.count(title) for title in titles} == {4}
    assert len(set(titles)) == 12
    for units in groups:
        assert len({example.photo for unit in units for example in unit.examples}) == 1


def test_oracle_patches_cover_the_asked_objects_evenly() -> None:
    for units in collect("test", 8):
        for unit in units:
            example = unit.examples[0]
            if not example.objects:
                continue
            for keep in (16, 64):
                chosen = set(gates.oracle_patches(example, keep, random.Random(0)))
                assert len(chosen) == keep
                asked = [set(world.patches_of(example.photo.scene, [i])) for i in example.objects]
                if len(asked) <= keep:
                    assert all(patches & chosen for patches in asked)
                covered = len(set.union(*asked) & chosen)
                assert covered == min(keep, len(set.union(*asked)))


def test_figures_are_the_benchmarks_own() -> None:
    scored = [
        (unit, [1.0, 0.0][: len(unit.examples)] if unit.form.title == "MME" else [1.0] * len(unit.examples))
        for units in collect("test", 3)
        for unit in units
    ]
    rows = by_format(scored, "all")
    assert rows["MME"]["all"] == pytest.approx(0.25)
    assert rows["POPE"]["all"] == rows["POPE"]["all low"] == 1.0
    assert rows["mean"]["all"] == pytest.approx((11 + 0.25) / 12)


def test_the_command_measures_all_gates(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "gates.json"
    # random weights never end an answer by themselves
    monkeypatch.setattr(gates, "answer_about", partial(answer_about, longest=2))
    monkeypatch.setattr(gates, "ask", partial(ask, max_new_tokens=2))
    command = ["--model", str(folder), "--questions", "1", "--threads", "1", "--output", str(target)]
    result = CliRunner().invoke(gates.app, command)
    assert result.exit_code == 0, result.output
    titles = [table["title"] for table in json.loads(target.read_text())["tables"]]
    assert [title.split(",")[0].split(" ")[0] for title in titles] == [
        *("Speed", "Formats", "Patches", "Differences", "CLIP", "CLS", "Objects", "Linear", "Rank", "Percent")
    ]
    assert CliRunner().invoke(gates.app, ["--gate", "8"]).exit_code == 2
    assert CliRunner().invoke(gates.app, ["--dtype", "int4"]).exit_code == 2


def test_speed_is_measured_in_the_dtype_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(gates, "ask", partial(ask, max_new_tokens=1))
    assert [row["dtype"] for row in gates.speed(str(folder), "bfloat16").rows] == ["torch.bfloat16"]


def test_the_gate_prints_what_was_reproduced(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"method": "scope", "published": 95.0, "rank": 1, "here": 90.0, "rank here": 1, "papers": {}}
    ]
    found = {"methods": 1, "Spearman": 0.5, "Spearman low": -0.25, "Spearman high": 0.75}
    (tmp_path / "published.json").write_text(json.dumps({"about": {"correlation": found}, "rows": rows}))
    correlation, figures = like_published(tmp_path / "published.json")
    assert correlation.rows == [{"methods": 1, "Spearman": 0.5, "95% interval": "-0.25 to 0.75"}]
    del rows[0]["papers"]
    assert figures.rows == rows
