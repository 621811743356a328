"""The embedded model on a GPU, in half precision too, under SDPA and FlashAttention: parity, batching, detaching.

`scripts/gpu_check.sh` runs this file. Half precision rounds each shape of a product differently, so what is compared
there is compared within a few of its last digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

import ivtp
from ivtp.generate import prompt_for
from ivtp.micro.world.photo import take_photo

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PATCHES = 576
QUESTIONS = (
    "what color is the disc behind the crown?",
    "read the sign.",
    "is there a dog?",
    "which object is left of the dog, and what is written on the sign above it?",
)
KINDS = {
    "float32 sdpa": (torch.float32, "sdpa"),
    "bfloat16 sdpa": (torch.bfloat16, "sdpa"),
    "float16 sdpa": (torch.float16, "sdpa"),
    "bfloat16 flash 2": (torch.bfloat16, "flash_attention_2"),
    "bfloat16 flash 3": (torch.bfloat16, "flash_attention_3"),
}
INSTALLED = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


@dataclass(frozen=True)
class Subject:
    """The model on its device, and how far its logits may be off."""

    model: Any
    processor: Any
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Of a logit, as a share of the largest one."""
        return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[self.dtype]

    @property
    def agreement(self) -> float:
        """Least share of kept patches that two ways to compute the same scores have in common."""
        return 0.995 if self.dtype == torch.float32 else 0.97

    def inputs(self, *samples: int) -> Any:
        """Left-padded prompts of these numbers, each about a photo of its own."""
        return self.processor(
            images=[take_photo("test", number).picture() for number in samples],
            text=[prompt_for(self.processor, QUESTIONS[number]) for number in samples],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.dtype)

    def attach(self, **changes: Any) -> ivtp.Pruner:
        return ivtp.attach(self.model, self.processor, **{"keep": 64, **changes})

    def assert_close(self, ours: Tensor, stock: Tensor) -> None:
        atol = self.tolerance * float(stock.abs().max())
        torch.testing.assert_close(ours.float(), stock.float(), atol=atol, rtol=0)


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    dtype, attention = KINDS[request.param]
    if attention in INSTALLED and not INSTALLED[attention]():
        pytest.skip(f"{attention} is not installed")
    model, processor = ivtp.load("micro", dtype=dtype, device=DEVICE)
    model.set_attn_implementation(attention)
    return Subject(model, processor, dtype)


def shared(first: list[Tensor], second: list[Tensor]) -> float:
    """Share of kept patches that two lists of cuts, each (k,), have in common."""
    both = [torch.isin(a, b).float().mean() for a, b in zip(first, second, strict=True)]
    return float(torch.stack(both).mean())


def cuts_of(pruner: ivtp.Pruner, row: int) -> list[Tensor]:
    """(k,) of every cut."""
    return [kept[kept >= 0].cpu() for kept in (stage.kept[row] for stage in pruner.trace.stages)]


@pytest.mark.parametrize("method", ["ivtp", "topk", "fastv", "sparsevlm"])
@torch.no_grad()
def test_keep_all_is_the_stock_model(subject: Subject, method: str) -> None:
    inputs = subject.inputs(0, 1, 2, 3)
    real = inputs["attention_mask"].bool()
    stock = subject.model(**inputs).logits
    with subject.attach(method=method, keep=PATCHES):
        ours = subject.model(**inputs).logits
    subject.assert_close(ours[real], stock[real])


def test_keep_all_says_what_the_stock_model_says(subject: Subject) -> None:
    if subject.dtype != torch.float32:
        pytest.skip("half precision may choose the other of two words that are as good")
    inputs = subject.inputs(0, 1, 2, 3)
    stock = subject.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    with subject.attach(keep=PATCHES):
        assert subject.model.generate(**inputs, do_sample=False, max_new_tokens=8).tolist() == stock.tolist()


@pytest.mark.parametrize("method", ["ivtp", "topk", "fastv"])
@torch.no_grad()
def test_a_sample_is_cut_alone_as_in_a_batch(subject: Subject, method: str) -> None:
    batch, agreed = subject.inputs(0, 1, 2, 3), []
    with subject.attach(method=method) as pruner:
        together = subject.model(**batch).logits[:, -1]
        cuts = [cuts_of(pruner, row) for row in range(4)]
        for row in range(4):
            alone = subject.model(**subject.inputs(row)).logits[0, -1]
            agreed.append(shared(cuts_of(pruner, 0), cuts[row]))
            if agreed[-1] == 1:
                subject.assert_close(alone, together[row])
    assert sum(agreed) / 4 >= subject.agreement


@torch.no_grad()
def test_the_gpu_cuts_as_the_cpu_does(subject: Subject) -> None:
    model, processor = ivtp.load("micro", dtype=torch.float32)
    there = Subject(model, processor, torch.float32)
    with there.attach() as reference:
        model(**there.inputs(0, 1))
    with subject.attach() as pruner:
        subject.model(**subject.inputs(0, 1))
    for row in range(2):
        assert shared(cuts_of(pruner, row), cuts_of(reference, row)) >= subject.agreement - 0.02


@torch.no_grad()
def test_detaching_gives_the_stock_model_back(subject: Subject) -> None:
    inputs = subject.inputs(0, 1)
    stock = subject.model(**inputs).logits
    with subject.attach():
        pruned = subject.model(**inputs).logits
    assert pruned.shape[1] < stock.shape[1]
    assert torch.equal(subject.model(**inputs).logits, stock)
