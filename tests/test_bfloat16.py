"""In bfloat16 the fast path keeps what the slow reference keeps in bfloat16, but for near-ties at a cut's edge."""

from __future__ import annotations

import statistics

import pytest
import torch
from reference import Reference, prompt_of
from transformers import AutoTokenizer, CLIPModel

import ivtp
from ivtp.files.sidecar import MICRO
from ivtp.generate import prompt_for
from ivtp.micro.world.photo import take_photo

QUESTIONS = ("what color is the disc behind the crown?", "which object is left of the dog?", "read the sign.")


class CutsOnly(Reference):
    """The logits, which are not compared here, take it longer than all cuts."""

    def _answer(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("photos", [4, pytest.param(12, marks=pytest.mark.slow)])
@torch.no_grad()
def test_98_percent_of_the_kept_patches_are_the_slow_references(photos: int) -> None:
    """Over all cuts of prefills of the embedded model."""
    model, processor = ivtp.load("micro", dtype=torch.bfloat16)
    clip = (
        CLIPModel.from_pretrained(MICRO / "clip", dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(MICRO / "clip"),
    )
    shared, margins = [], []
    with ivtp.attach(model, processor, keep=64, clip=clip) as pruner:
        config = pruner.config
    reference = CutsOnly(model, clip, config, dtype=torch.bfloat16)
    for index in range(photos):
        picture, question = take_photo("validation", index).picture(), QUESTIONS[index % len(QUESTIONS)]
        prompt = prompt_for(processor, question, images=1)
        with ivtp.attach(model, processor, keep=64, clip=clip) as pruner:
            model(**processor(images=[picture], text=[prompt], return_tensors="pt").to(torch.bfloat16))
        cuts = reference.run(prompt_of(processor, prompt, question, [picture], 576)).cuts
        for stage, cut in zip(pruner.trace.stages, cuts, strict=True):
            kept, expected = set(stage.kept[0].tolist()), set(cut.kept)
            shared.append(len(kept & expected) / len(expected))
            both = set(stage.candidates[0].tolist()) & set(cut.candidates)
            scores = dict(zip(cut.candidates, cut.scores, strict=True))
            edge = min(scores[patch] for patch in expected)
            margins += [abs(scores[patch] / edge - 1) for patch in (kept ^ expected) & both]
    assert statistics.fmean(shared) >= 0.98
    assert statistics.median(margins) < 0.05, "what differs lies at the edge of its cut, where rounding decides"
