"""What the recipe takes out of IVTP+ is out, and nothing else; differences are to the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ivtp.errors import ConfigError
from ivtp.generate import complete
from ivtp.guide.clip import ClipText
from ivtp.methods.base import GuideOptions
from ivtp.methods.ivtp_plus import IvtpPlus
from recipes.micro import bench as asking
from recipes.micro import choose_plus
from recipes.micro.bench import Bench
from recipes.micro.choose_plus import ABLATED, CHOICES, DEFAULT, Variant, named, rows
from recipes.micro.plus_guides import HighestOfWords, MeanOfWords, Peaked
from tests.recipes.test_evaluate import folder  # noqa: F401

KEEP = 16
PROMPTS = 8
"""Of some the words that guide are few, and a variant of the guide changes nothing."""


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:  # noqa: F811
    return Bench(str(folder), 12, 12, "float32", "validation")


def kept(bench: Bench, variant: Variant) -> tuple[list[Any], list[Any], torch.Tensor]:
    """Patches that leave the encoder, those that stay, and the last logits."""
    with variant.attach(bench, KEEP) as pruner, torch.no_grad():
        logits = bench.model(**bench.inputs(bench.examples[:PROMPTS]), logits_to_keep=1).logits
    return pruner.trace.kept("vision").tolist(), pruner.trace.kept().tolist(), logits


@pytest.mark.parametrize("variant", [*CHOICES, ABLATED[-1]], ids=lambda variant: variant.name)
def test_variants_keep_what_was_asked_and_differ(bench: Bench, variant: Variant) -> None:
    default, own = kept(bench, DEFAULT), kept(bench, variant)
    assert [len(set(row)) for row in own[1]] == [KEEP] * PROMPTS
    if variant is not DEFAULT:
        assert own[0] != default[0] or own[1] != default[1] or not torch.equal(own[2], default[2])


def test_dropping_keeps_the_same_patches_of_the_first_group(bench: Bench) -> None:
    found = []
    for kind in (choose_plus.IvtpPlus, choose_plus.Dropping):
        with bench.attach(kind, KEEP, "original") as pruner, torch.no_grad():
            bench.model(**bench.inputs(bench.examples[:2]), logits_to_keep=1)
        found.append(pruner.trace.stages[0])
    assert torch.equal(found[0].kept, found[1].kept)
    assert (found[0].sources >= 0).all()
    assert (found[1].sources < 0).any()


def test_a_pseudo_cls_token_for_one_word_is_that_of_all(bench: Bench) -> None:
    """Without a relevant word one token stands in for it: the words' way through the layers is the model's."""
    found = []
    for kind in (IvtpPlus, HighestOfWords, MeanOfWords):
        variant = Variant("", kind, {"threshold": 1.0})
        with variant.attach(bench, KEEP) as pruner:
            complete(bench.model, bench.processor, bench.inputs(bench.examples[:PROMPTS]), 1)
        assert all(pruner.trace.fallback)
        found.append([stage.scores for stage in pruner.trace.stages if stage.where == "llm"])
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-4, atol=1e-6)


def test_a_word_like_one_patch_weighs_more_than_a_word_like_all() -> None:
    projection = nn.Linear(3, 3, bias=False)
    nn.init.eye_(projection.weight)
    clip = ClipText(nn.Identity(), projection, projection, None, 77)
    image, one, all_alike, another = torch.eye(3)[:1], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]
    maker = Peaked(GuideOptions(threshold=0.2), cast(Any, None), None, clip, [torch.eye(3)])
    weights = maker.rate(torch.tensor([one, all_alike, another]), image).flatten()
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-5)


def test_only_names_rows_beside_the_default() -> None:
    assert named(["no suppression"], CHOICES)[0] is DEFAULT
    assert [row.name for row in named(["no suppression", "default", "no suppression"], CHOICES)][1:] == [
        "no suppression"
    ]
    with pytest.raises(ConfigError, match="'suppression'; use one of default, dropped"):
        named(["suppression"], CHOICES)


def test_a_row_is_compared_with_the_default(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_ANSWER", 1)
    first, again, other = rows(bench, (DEFAULT, DEFAULT, ABLATED[1]), KEEP)
    assert (again["to the default"], again["to the default low"], again["to the default high"]) == (0, 0, 0)
    assert first["accuracy"] == again["accuracy"]
    assert other["accuracy"] - first["accuracy"] == pytest.approx(other["to the default"])
    assert first["questions"] == len(bench.examples)
