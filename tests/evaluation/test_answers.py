"""What was answered once is found again, whatever killed the run; other weights, options or code ask anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ivtp.errors import ConfigError
from ivtp.evaluation.answers import Answers, file_of, source_of, weights_of
from ivtp.registry import method_class

RUN = {"model": "m", "config": {"method": "ivtp", "keep": 64}}


def test_found_by_the_next_run_and_by_no_other(tmp_path: Path) -> None:
    Answers(tmp_path, RUN).add({"gqa/0": {"text": "a dog"}, "gqa/1": {"text": "ein Hund, 犬"}})
    again = Answers(tmp_path, RUN)
    assert again.get("gqa/0") == {"text": "a dog"}
    assert again.get("gqa/1") == {"text": "ein Hund, 犬"}
    assert again.get("gqa/2") is None
    assert Answers(tmp_path, RUN | {"config": {"method": "ivtp", "keep": 16}}).get("gqa/0") is None


def test_ranks_write_files_of_their_own_and_read_all(tmp_path: Path) -> None:
    for rank in (0, 1):
        Answers(tmp_path, RUN, rank).add({f"gqa/{rank}": {"text": str(rank)}})
    assert [Answers(tmp_path, RUN).get(f"gqa/{rank}") for rank in (0, 1)] == [{"text": "0"}, {"text": "1"}]


@pytest.mark.parametrize("torn", [1, 5, 30])
def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path, torn: int) -> None:
    Answers(tmp_path, RUN).add({"gqa/0": {"text": "whole"}, "gqa/1": {"text": "cut off in the middle"}})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-torn])
    again = Answers(tmp_path, RUN)
    assert again.get("gqa/0") == {"text": "whole"}
    assert torn == 1 or again.get("gqa/1") is None  # without its last sign, the line's end, it is whole
    again.add({"gqa/1": {"text": "new"}})
    assert Answers(tmp_path, RUN).get("gqa/1") == {"text": "new"}


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder"):
        Answers(tmp_path / "file", RUN)


def test_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(50, 50)
    before = weights_of(layer)
    assert weights_of(layer) == before
    assert weights_of(layer.to(torch.bfloat16)) != before  # what was rounded answers otherwise
    layer = nn.Linear(50, 50)
    assert weights_of(layer) != before


def test_weights_of_large_tensors() -> None:
    """Of more values than float32 can count; none of them takes memory here."""
    large = nn.Module()
    large.register_buffer("weight", torch.zeros(1, dtype=torch.int8).expand(45_088_769))
    assert weights_of(large)


def test_code_of_methods_is_told_apart() -> None:
    """Also of the parts of a pair, and of what a method inherits from."""
    names = ("topk", "tome", "ivtp", "visionzip+fastv", "topk+fastv")
    assert len({source_of(method_class(name)) for name in names}) == len(names)
    assert source_of(method_class("topk")) == source_of(method_class("topk"))


def test_files_named_in_options_are_told_apart(tmp_path: Path) -> None:
    weights = tmp_path / "predictors.safetensors"
    weights.write_bytes(b"one")
    before = file_of(str(weights)), file_of(str(tmp_path))
    weights.write_bytes(b"other")
    assert file_of(str(weights)) != before[0]
    assert file_of(str(tmp_path)) != before[1]
    assert file_of("instruction") == "instruction"
    assert file_of(0.2) == "0.2"
