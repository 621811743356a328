"""The retrained table: the same data at every call, commands that `ivtp train` takes, and rows that are made once."""

from __future__ import annotations

import json
import re
import shlex
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from pages import DOCS, commands
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")

from ivtp.cli.app import app as ivtp_app
from ivtp.errors import ConfigError, IvtpError
from ivtp.evaluation import sweep
from ivtp.evaluation.asked import Asked
from ivtp.evaluation.ratios import Ratios
from ivtp.evaluation.sweep import Measured
from ivtp.micro.formats import list_formats
from ivtp.training.records import read_records
from recipes.micro import retrain_runs, retrain_table
from recipes.micro.retrain import app
from recipes.micro.retrain_runs import FULL, NAMES, FailedError, Part, Settings, arms, parts
from recipes.micro.retrain_table import Found, Table

TWELVE = 12
ROOTS = {"ivtp": ivtp_app, "recipes.micro.retrain": app}


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    done = invoke("records", "--out", place, "--records", 2 * TWELVE)
    assert done.exit_code == 0, done.output
    return place


def test_records_are_the_same_at_every_call_and_can_be_trained_on(data: Path, tmp_path: Path) -> None:
    assert invoke("records", "--out", tmp_path, "--records", 2 * TWELVE - 3).exit_code == 0  # rounded up
    files = sorted(file.relative_to(data) for file in data.rglob("*.*"))
    assert files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    assert all((data / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    for name in ("finetune.json", "pretrain.json"):
        good, bad = read_records(data / name, data, needs_image=True)
        assert not bad
        assert len({turn.text for record in good for turn in record.turns[1:]}) > len(good) / 3
    entries = json.loads((data / "finetune.json").read_text(encoding="utf-8"))
    assert Counter(e["id"].rpartition("-")[0] for e in entries) == dict.fromkeys(list_formats(), 2)
    shown = json.loads((data / "pretrain.json").read_text(encoding="utf-8"))
    assert sorted(e["image"] for e in shown) == sorted({e["image"] for e in entries})


# ---- what is run ------------------------------------------------------------------------------------------------


GROUPS = {module: typing.cast(typer.core.TyperGroup, typer.main.get_command(root)) for module, root in ROOTS.items()}


def parse(module: str, words: Sequence[str]) -> dict[str, Any]:
    """What a command line behind `python -m` means. Raises for an option or argument that does not exist."""
    group = GROUPS[module]
    while isinstance(command := group.commands[words[0]], typer.core.TyperGroup):
        group, words = command, words[1:]
    return command.make_context(words[0], list(words[1:])).params


@pytest.mark.parametrize("lora", [False, True])
def test_every_row_is_made_by_commands_that_parse_and_differ_in_what_is_attached_alone(data: Path, lora: bool) -> None:
    settings = Settings(data, Path("runs"), lora=lora)
    wanted = arms((64, 16), (), 2)
    assert {arm.name for arm in wanted} == set(NAMES)
    assert len({arm.folder for arm in wanted}) == len(wanted)
    shared: dict[int, set[tuple[Any, ...]]] = {}
    for arm in wanted:
        *before, last = parts(arm, settings)
        for part in before:
            assert part.words[0] == "-m"
            parse(part.words[1], part.words[2:])
        assert last.words[:4] == ("-m", "ivtp", "train", "finetune")
        asked = parse("ivtp", last.words[2:])
        assert asked["method"] == ("none" if arm.compressor or arm.name == FULL else arm.name)
        assert asked["method"] == "none" or asked["keep"] == str(arm.keep)
        assert asked["lora"] is lora
        assert asked["model"] == ("micro" if not arm.compressor else f"runs/{arm.folder}/pretrain")
        same = ("data", "batch", "max_steps", "set_", "seed", "checkpointing")
        shared.setdefault(arm.seed, set()).add(tuple(str(asked[name]) for name in same))
        assert last.steps == 2  # 24 records, 16 a step
        stages = {"dynamicvit": ["predictors"]}.get(arm.name, ["start", "pretrain"] if arm.compressor else [])
        assert [part.name for part in before] == stages
    assert [len(kinds) for kinds in shared.values()] == [1, 1]
    assert {arm.name for arm in wanted if arm.seed != 42} == {FULL, "topk", "ivtp"}


def test_commands_of_the_page_parse() -> None:
    found = [line[2:] for line in commands(DOCS / "training.md", "python") if line[1] == "recipes.micro.retrain"]
    assert {line[0] for line in found} == {"records", "choose", "table"}
    for line in found:
        parse("recipes.micro.retrain", line)


def test_a_row_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="--only qfromer: there is no such row; use one of full, random"):
        arms((64,), ("qfromer",), 1)


@pytest.mark.parametrize(
    ("line", "loss"),
    [
        ("{'loss': '0.002884', 'grad_norm': '0.657', 'epoch': '0.1667'}\n", 0.002884),
        ("{'loss': 1.5, 'ratio': 0.1}\n", 1.5),
        ("{'loss': 2.0}\n", 2.0),
        ("{'train_runtime': '229.7', 'train_loss': '0.002884'}\n", None),
        ("6 steps on 96 records, last loss 0.0029\n", None),
    ],
)
def test_steps_are_told_by_their_losses(line: str, loss: float | None) -> None:
    assert retrain_runs.loss_in(line) == loss


def test_what_a_killed_run_repeats_is_counted_once(tmp_path: Path) -> None:
    part = Part("finetune", ("-c", "print({'loss': 9.0}); print({'loss': 8.0})"), tmp_path, 4, lambda: 1.0)
    part.log.write_text("step,loss,seconds\n1,5.0,100\n2,4.0,100\n3,3.0,100\n")
    checkpoint = tmp_path / "finetune" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    told: list[int] = []
    facts = retrain_runs.run_part(part, told.append)
    assert (facts["steps"], facts["losses"]) == (4, [5.0, 4.0, 9.0, 8.0])
    assert 200 / 60 <= facts["minutes"] < 250 / 60
    assert sum(told) == part.steps
    assert not checkpoint.exists()
    assert retrain_runs.run_part(part, told.append) == facts
    assert sum(told) == 2 * part.steps


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    part = Part("finetune", ("-c", "raise SystemExit('error: no room')"), tmp_path / "new", 1, lambda: 1.0)
    with pytest.raises(FailedError, match=r"error: no room; see .*finetune.txt"):
        retrain_runs.run_part(part, lambda more: None)
    assert not part.done.exists()


# ---- rows -------------------------------------------------------------------------------------------------------


def measured(right: Sequence[int]) -> Measured:
    """Of one benchmark."""
    over = np.array(right, float)[:, None]
    part = Ratios(over, np.ones_like(over), tuple(range(len(right))), 100.0)
    return Measured({"GQA": float(part.value())}, {"GQA": part}, {}, {"visual_tokens": 64, "tflops": 0.01})


def test_rows_are_compared_with_their_own_seed_and_with_no_training(data: Path) -> None:
    wanted = arms((64,), (FULL, "topk", "ivtp", "qformer"), 2)
    settings = Settings(data, Path("runs"))
    made = Table.of(settings, Asked("micro", ("micro_gqa",)), wanted)
    facts = {"command": "x", "steps": 2, "minutes": 1.5, "flops": 2e15, "losses": [1.0]}
    right = {(FULL, 42): 9, (FULL, 43): 8, ("topk", 42): 5, ("topk", 43): 6, ("ivtp", 42): 7, ("qformer", 42): 3}
    for (name, seed), count in right.items():
        arm = next(arm for arm in wanted if (arm.name, arm.seed) == (name, seed))
        trained = (facts, facts) if arm.compressor else (facts,)
        made.found[arm] = Found(measured([1] * count + [0] * (10 - count)), trained)
        if not arm.compressor and seed == 42:
            made.untouched[arm.run(settings)] = measured([1] * (count - 2) + [0] * (12 - count))
    untouched, *rows = made.rows()
    assert (untouched["name"], untouched["mean"]) == ("untouched", pytest.approx(70))
    by_name = {(row["name"], row["seed"]): row for row in rows}
    assert by_name.keys() == right.keys()
    topk, ivtp, qformer = by_name["topk", 43], by_name["ivtp", 42], by_name["qformer", 42]
    assert topk["to full"] == pytest.approx(-20)  # of seed 43
    assert topk["to ivtp"] == pytest.approx(-10)  # which was trained with seed 42 alone
    assert topk["to first seed"] == pytest.approx(10)
    assert topk["to untouched"] == pytest.approx(30)
    assert ivtp["to full"] == pytest.approx(-20)
    assert ivtp["to full low"] <= ivtp["to full"] <= ivtp["to full high"]
    assert not {"to ivtp", "to first seed"} & ivtp.keys()
    assert not {"to untouched", "untouched"} & qformer.keys()
    assert (qformer["minutes"], qformer["flops"], qformer["keep"]) == (3.0, 4e15, 64)


def test_what_is_written_has_every_row_with_its_cost(data: Path, tmp_path: Path) -> None:
    made = Table.of(Settings(data, Path("runs")), Asked("micro", ("micro_gqa",)), arms((64,), (FULL, "topk"), 2))
    for arm in made.arms:
        facts = {"command": "python -m ivtp", "steps": 2, "minutes": 1.5, "flops": 2e15, "losses": [1.0]}
        made.found[arm] = Found(measured([1, 0]), (facts,))
    made.write(tmp_path, "the command")
    page = (tmp_path / "retrained.md").read_text(encoding="utf-8")
    assert "`the command`" in page
    assert "2 steps of 16 in `finetune`, at a learning rate of 0.0003" in page
    assert len(re.findall(r"^\| topk \| 4[23] \| 64 \|.*\| 2 \| 1.5 \|$", page, flags=re.M)) == 2
    assert "## Seeds" in page
    document = json.loads((tmp_path / "retrained.json").read_text(encoding="utf-8"))
    assert document["about"]["seeds"] == [42, 43]
    assert {row["name"] for row in document["rows"]} == {FULL, "topk"}
    assert all(row["training"][0]["command"] for row in document["rows"])


# ---- from nothing to a table ------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures without other processes."""

    def in_turn(asked: Asked, runs: Sequence[sweep.Run], workers: int, told: sweep.OnAnswers) -> Iterator[Any]:
        yield from ((run, sweep.measured(run.asked(asked), told)) for run in runs)

    monkeypatch.setattr(retrain_table, "sweep", in_turn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_rows_are_trained_measured_and_not_trained_again(
    data: Path, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    words = ["table", "--data", data, "--runs", tmp_path / "runs", "--output", tmp_path / "out"]
    words += ["--keep", 16, "--seeds", 1, "--max-steps", 1, "--predictor-steps", 1, "--batch", 2]
    words += ["--tasks", "micro_gqa,micro_pope", "--limit", 4]
    names = (FULL, "dynamicvit", "qformer")
    words += [word for name in names for word in ("--only", name)]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "retrained.json").read_text(encoding="utf-8"))
    untouched, *rows = document["rows"]
    assert untouched["name"] == "untouched"
    assert [(row["name"], row["visual_tokens"]) for row in rows[:1]] == [(FULL, 576)]
    assert {row["name"]: row["visual_tokens"] for row in rows[1:]} == {"dynamicvit": 16, "qformer": 16}
    for row in rows:
        assert row["mean low"] <= row["mean"] <= row["mean high"]
        assert row["flops"] > 0 < row["minutes"]
        assert list(row["benchmarks"]) == ["GQA", "POPE"]
    stages = {row["name"]: [shlex.split(part["command"])[2:5] for part in row["training"]] for row in rows}
    assert [words[-1] for words in stages["qformer"]][1:] == ["pretrain", "finetune"]
    monkeypatch.setattr(retrain_runs.subprocess, "Popen", lambda *_, **__: 1 / 0)
    assert invoke(*words).exit_code == 0
    assert json.loads((tmp_path / "out" / "retrained.json").read_text(encoding="utf-8")) == document
    with pytest.raises(IvtpError, match=r"3 of 3 rows failed .*was made by another command"):
        invoke(*words, "--learning-rate", "0.5")
