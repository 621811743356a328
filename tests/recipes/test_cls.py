"""Fine-tuning of the CLS token: what is asked of it is true, what must stay stays, and a resumed run goes on."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPModel, PreTrainedTokenizerFast

from ivtp.errors import ConfigError
from ivtp.micro.world import GRID, canonical_caption
from ivtp.micro.world.photo import take_photo
from recipes.micro.cls import (
    MIXTURES,
    NEGATIVES,
    SHOWN,
    ClsRecipe,
    ClsTrainer,
    caption_and_negatives,
    drop_patches,
    gathering,
    relative_error,
    shown,
    shown_by_patch,
)
from recipes.micro.vision import Stage, export
from recipes.micro.vision_data import keyword_table, make_batch
from recipes.micro.vision_model import build_clip, build_tokenizer

RECIPE = ClsRecipe(steps=2, log_every=1, validation=4, curriculum=(Stage(GRID, 0.0, 3, keep=40),))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def start(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cls") / "clip"
    export(build_clip(tokenizer, width=32, heads=2, layers=3, text_layers=1), tokenizer, folder)
    return folder


@given(st.integers(0, 3000))
def test_what_is_shown_is_what_the_scene_holds(index: int) -> None:
    scene = take_photo("train", index).scene
    found = {SHOWN[i] for i in shown(scene).nonzero().flatten().tolist()}
    wanted = {("object", o.name) for o in scene.objects if o.text is None}
    wanted |= {("text", o.text) for o in scene.objects if o.text is not None}
    assert found == wanted | {(o.backing, o.colour) for o in scene.objects if o.colour is not None}


@given(st.integers(0, 3000), st.integers(0, 99))
def test_negatives_differ_from_a_true_caption_by_one_thing_that_is_not_so(index: int, seed: int) -> None:
    scene = take_photo("train", index).scene
    true, *false = caption_and_negatives(scene, random.Random(seed))
    phrases = [canonical_caption(replace(scene, objects=(item,))) for item in scene.objects]
    assert len(false) == NEGATIVES

    def parts(text: str) -> list[str]:
        return text.replace(" and ", ", ").split(", ")

    assert set(parts(true)) <= set(phrases)
    for text in false:
        (wrong,) = [part for part in parts(text) if part not in phrases]
        assert sorted(set(parts(text)) - {wrong}) == sorted(set(parts(text)) & set(parts(true)))


def test_dropped_patches_leave_the_others_in_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    photos = [take_photo("train", i) for i in range(2)]
    batch = make_batch(photos, GRID, tokenizer, keyword_table(tokenizer))
    thin = drop_patches(batch, 0.25, torch.Generator().manual_seed(0))
    assert thin.positions.shape == (2, 432)
    for row in range(2):
        assert thin.positions[row].tolist() == sorted(set(thin.positions[row].tolist()))
        kept = thin.positions[row]  # all 576 were there
        torch.testing.assert_close(thin.patches[row], batch.patches[row, kept])
        assert all(torch.equal(values[row], batch.labels[key][row, kept]) for key, values in thin.labels.items())
    assert not torch.equal(thin.positions[0], thin.positions[1])


@given(st.integers(0, 3000))
def test_patches_show_together_what_the_scene_shows(tokenizer: PreTrainedTokenizerFast, index: int) -> None:
    batch = make_batch([take_photo("train", index)], GRID, tokenizer, keyword_table(tokenizer))
    whole = shown(batch.scenes[0])
    by_patch = shown_by_patch(batch.labels)[0]
    assert torch.equal(by_patch.any(0), whole)
    assert not by_patch[batch.labels["object"][0] <= 0].any()
    assert by_patch.sum(1).max() <= 2  # a glyph with its backing, or a word


def test_mixtures_are_means_of_known_patches_and_say_what_these_show(start: Path, tmp_path: Path) -> None:
    trainer = ClsTrainer(tmp_path, start, RECIPE, CPU)
    batch = trainer.batch(RECIPE.curriculum[0])
    weights, visible = trainer.mixtures(batch)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, MIXTURES))
    by_patch = shown_by_patch(batch.labels)
    for row in range(3):
        for mixture in range(MIXTURES):
            chosen = weights[row, mixture] > 0
            assert 1 <= chosen.sum() <= 32
            assert (batch.labels["object"][row][chosen] >= 0).all()
            assert torch.equal(visible[row, mixture], by_patch[row][chosen].any(0))


def test_nothing_but_the_heads_learns_from_mixtures(start: Path, tmp_path: Path) -> None:
    trainer = ClsTrainer(tmp_path, start, RECIPE, CPU)
    trainer.losses(trainer.batch(RECIPE.curriculum[0]))["heads"].backward()
    assert all(p.grad is None for p in trainer.clip.parameters())
    assert any(p.grad is not None for p in trainer.heads.parameters())


def test_the_gathering_layers_end_with_the_one_that_is_read() -> None:
    assert gathering(12)[-1] == 10
    assert gathering(3) == [1]


def test_errors_are_in_units_of_each_features_variance() -> None:
    anchor = torch.randn(2, 50, 4) * torch.tensor([1.0, 10.0, 100.0, 0.1])
    assert relative_error(anchor, anchor) == 0
    assert relative_error(anchor + anchor.flatten(0, 1).std(0), anchor) == pytest.approx(1, rel=1e-3)


def test_training_moves_the_tower_leaves_the_words_and_resumes(start: Path, tmp_path: Path) -> None:
    whole = ClsTrainer(tmp_path / "whole", start, RECIPE, CPU)
    assert whole.evaluate()["feature_error"] == pytest.approx(0, abs=1e-9)
    whole.run(lambda fraction, text: None)

    first = ClsTrainer(tmp_path / "parts", start, RECIPE, CPU)
    first.train_step(0.0)
    first.save()
    ClsTrainer(tmp_path / "parts", start, RECIPE, CPU, resume=True).run(lambda fraction, text: None)

    before = CLIPModel.from_pretrained(start).state_dict()
    ends = [CLIPModel.from_pretrained(tmp_path / name / "vision" / "clip").state_dict() for name in ("whole", "parts")]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-6, rtol=1e-5)
        stays = name.startswith(("text", "logit_scale", "vision_model.embeddings", "vision_model.pre"))
        assert torch.equal(value, before[name]) == (stays or ".layers.0." in name), name
    rows = list(csv.DictReader((tmp_path / "whole" / "cls.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["feature_error"]) > 0
    assert rows[0]["feature_error"] == ""


def test_a_run_that_never_began_cannot_resume(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        ClsTrainer(tmp_path, start, RECIPE, CPU, resume=True)
