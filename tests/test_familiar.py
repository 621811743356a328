"""A checkpoint that brings a rule for it says when a picture is none of what it knows; others never do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Tiny, image

import ivtp
from ivtp.errors import LoadError
from ivtp.files.sidecar import MICRO
from ivtp.micro.world.photo import take_photo
from recipes.micro.familiar import KINDS, drawn

ASKED = {"method": "topk", "keep": 8, "max_new_tokens": 1}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    return tmp_path


def rule(folder: Path, bias: float, note: str = "a strange picture") -> None:
    """Write a rule that always (bias 1) or never (bias -1) finds a picture strange."""
    (folder / "ivtp.json").write_text(json.dumps({"familiar": "familiar.json"}))
    (folder / "familiar.json").write_text(json.dumps({"weight": [0.0] * 32, "bias": bias, "note": note}))


@pytest.mark.parametrize("method", ["topk", "none"])
def test_the_note_is_the_checkpoints(folder: Path, method: str) -> None:
    model, processor = ivtp.load(folder)
    asked = {**ASKED, "method": method}
    for bias, notes in ((1.0, ("a strange picture",)), (-1.0, ())):
        rule(folder, bias)
        assert ivtp.ask(model, processor, image(3), "Cat?", **asked).notes == notes
    (folder / "ivtp.json").unlink()
    hooks = dict(model.model.vision_tower._forward_hooks)
    assert ivtp.ask(model, processor, image(3), "Cat?", **asked).notes == ()
    assert model.model.vision_tower._forward_hooks == hooks


def test_a_broken_rule_is_one_line(folder: Path) -> None:
    model, processor = ivtp.load(folder)
    rule(folder, 1.0)
    (folder / "familiar.json").write_text("{}")
    with pytest.raises(LoadError, match="holds no rule"):
        ivtp.ask(model, processor, image(3), "Cat?", **ASKED)


def test_save_takes_the_rule_along(folder: Path, tmp_path: Path) -> None:
    rule(folder, 1.0)
    ivtp.save(*ivtp.load(folder), tmp_path / "copied")
    assert ivtp.ask(*ivtp.load(tmp_path / "copied"), image(3), "Cat?", **ASKED).notes


def test_the_embedded_model_knows_its_world() -> None:
    """Pictures that neither the fit nor its limit saw; how often the rule errs stands beside it, measured."""
    model, processor = ivtp.load("micro")
    with ivtp.asking(model, processor, keep=64, max_new_tokens=1) as ask:
        strange = [ask(drawn(kind, 1, seed=7)[0], "what is it?").notes for kind in KINDS]
        known = [ask(take_photo("test", 1000 + index).picture(), "what is it?").notes for index in range(8)]
    assert all("world of glyphs" in note for notes in strange for note in notes)
    assert strange.count(()) <= 1
    assert known.count(()) >= 7
    assert "measured" in json.loads((MICRO / "familiar.json").read_text())
