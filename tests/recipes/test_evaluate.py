"""The evaluation counts right: known answers in, known accuracies, coverages and tables out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

from ivtp.errors import ConfigError
from ivtp.micro import world
from ivtp.micro.model import assemble, build_decoder, build_processor, save_asset
from ivtp.micro.tokenizer import build_tokenizer
from recipes.micro import evaluate
from recipes.micro.corpus import corpus
from recipes.micro.projector import Projector
from recipes.micro.scoring import Table, accuracy_row, exact, mean_interval, sample_items, wilson
from tests.micro.test_model import tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("asset")
    tokenizer = build_tokenizer(corpus())
    clip = tiny_clip(len(tokenizer))
    torch.manual_seed(0)
    model = assemble(build_decoder(tokenizer, layers=6, width=64), clip, tokenizer, Projector(32, 64).stock())
    processor = build_processor(
        tokenizer, CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    )
    save_asset(path, model, processor, clip, tokenizer, threshold=0.0)
    return path


@pytest.fixture(scope="module")
def lvlm(folder: Path):
    return evaluate.load(str(folder))


def test_items_take_the_kinds_in_turn_from_the_split() -> None:
    items = sample_items(20)
    assert [item.question.kind for item in items] == list(world.KINDS) * 2
    assert len({item.photo for item in items}) == 20
    assert [i.question.text for i in items] == [i.question.text for i in sample_items(20)]
    assert [i.question.text for i in items] != [i.question.text for i in sample_items(20, seed=1)]


@pytest.mark.parametrize(("answer", "right"), [("yes", True), (" Yes.", True), ("yes yes", False), ("", False)])
def test_an_answer_counts_only_if_it_is_exact(answer: str, right: bool) -> None:
    assert exact(answer, "yes") is right


def test_intervals() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(10, 10)[1] == 1.0
    mean, low, high = mean_interval([[True] * 30 + [False] * 10, [False] * 5])
    assert mean == pytest.approx(0.375)
    assert low < mean < high
    with pytest.raises(ConfigError, match="no answers"):
        mean_interval([[]])


def test_accuracy_is_counted_by_kind_and_averaged_over_kinds() -> None:
    items = sample_items(20)
    answers = [item.question.answer for item in items]
    answers[0] = "wrong"
    row = accuracy_row(items, answers, items[0].question.kind, "all")
    assert (row["questions"], row["all"]) == (2, 0.5)
    assert accuracy_row(items, answers, "mean", "all")["all"] == pytest.approx(0.95)


def test_a_table_prints_shares_with_their_interval() -> None:
    text = Table("T", [{"kind": "sign", "all": 0.5, "all low": 0.25, "all high": 0.75, "ms": 12.345}]).markdown()
    assert "| kind | all | ms |" in text
    assert "| sign | 50.0 (25.0–75.0) | 12.35 |" in text or "| sign | 50.0 (25.0–75.0) | 12.34 |" in text


class FakeModel:
    """Answers every prompt with "yes"."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tokenizer) -> None:
        self.answer = tokenizer(" yes</s>", add_special_tokens=False, return_tensors="pt").input_ids

    def generate(self, input_ids, **kwargs):
        return torch.cat((input_ids, self.answer.expand(len(input_ids), -1)), dim=1)


def test_answers_are_read_from_generate(lvlm) -> None:
    _, processor = lvlm
    items, done = sample_items(10), []
    fake = FakeModel(processor.tokenizer)
    for image in ("photo", "grey", "none"):
        answers = evaluate.answer_all(fake, processor, items, image=image, batch=4, report=done.append)
        assert answers == ["yes"] * 10
    assert done == [4, 4, 2] * 3
    table = evaluate.by_type(fake, processor, items, batch=4, report=lambda n: None)
    rights = {row["kind"]: row["576 tokens"] for row in table.rows}
    for item in items:
        assert rights[item.question.kind] == float(item.question.answer == "yes")
    assert [row["kind"] for row in table.rows] == [*world.KINDS, "mean"]


def test_the_command_measures_and_writes_files(folder: Path, tmp_path: Path) -> None:
    files = {"--output": tmp_path / "out.json", "--markdown": tmp_path / "out.md"}
    command = ["--model", str(folder), "--by-type", "--coverage", "2", "--questions", "2"]
    command += [str(x) for pair in files.items() for x in pair]
    result = CliRunner().invoke(evaluate.app, command)
    assert result.exit_code == 0, result.output
    content = json.loads(files["--output"].read_text())
    assert len(content["tables"]) == 2
    assert files["--markdown"].read_text().count("###") == 2


@pytest.mark.parametrize("arguments", [[], ["--questions", "x", "--by-type"]])
def test_wrong_use_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(evaluate.app, arguments).exit_code == 2
