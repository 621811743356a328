"""A plan's numbers are those of the run: parameters, steps, tokens, FLOPs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import ivtp
from ivtp.plug import find_host
from ivtp.training.encode import Conversations, Encoder
from ivtp.training.plan import estimate
from ivtp.training.run import Asked
from ivtp.training.stages import FINETUNE, LORA, PRETRAIN, STAGES, Stage, parts_of


@pytest.mark.parametrize("folder", ["checkpoint", "compressed"])
def test_parameters_are_the_models(asked: Asked, mix: Any, folder: str, request: pytest.FixtureRequest) -> None:
    run = dataclasses.replace(asked, model=str(request.getfixturevalue(folder)))
    model, _ = ivtp.load(run.model)
    found = estimate(run, mix.records(), devices=1)
    for part, names in parts_of(find_host(model)).items():
        assert found.parameters[part] == sum(model.get_parameter(name).numel() for name in names)
    assert found.learned == found.parameters["projector"] + found.parameters["language"]


def test_tokens_are_those_of_the_batches(asked: Asked, mix: Any) -> None:
    model, processor = ivtp.load(asked.model)
    records = mix.records()
    encoder = Encoder(processor, find_host(model).media, plain=False, max_length=2048)
    columns = [encoder([Conversations(records)[place]])["input_ids"].shape[1] for place in range(len(records))]
    found = estimate(asked, records, devices=1)
    assert found.columns == pytest.approx(sum(columns) / len(columns))
    assert found.longest == max(columns)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("stage", "passes"),
    [(None, {"llm": 4, "head": 3}), (PRETRAIN, {"llm": 3, "head": 2}), (LORA, {"llm": 3, "head": 2})],
    ids=["finetune", "pretrain", "lora"],
)
def test_flops_are_passes_of_the_parts(asked: Asked, stage: Stage | None, passes: dict[str, int]) -> None:
    """Forward, recomputed, backward to the activations, and to the weights of what learns."""
    run = dataclasses.replace(asked, stage=stage or asked.stage, model="llava-1.5-7b", batch=16)
    found = estimate(run, [], devices=8)
    text = 33 if stage is PRETRAIN else 257
    forward = ivtp.flops("llava-1.5-7b", method="none", text_tokens=text)
    expected = forward.vision + 3 * forward.projector + passes["llm"] * forward.llm + passes["head"] * forward.head
    assert found.record_flops == pytest.approx(expected)
    assert found.total_flops == pytest.approx(expected * asked.max_steps * 16)
    faster = estimate(run, [], devices=8, sustained=250)
    assert found.hours == pytest.approx(2 * faster.hours)


def test_pruning_and_sharing_out_take_less(asked: Asked) -> None:
    big = dataclasses.replace(asked, model="llava-1.5-13b", bf16=True, batch=128, per_device=16)
    full, pruned = (estimate(dataclasses.replace(big, method=m), [], devices=8) for m in ("none", "ivtp"))
    assert pruned.full_record_flops == pytest.approx(full.record_flops)
    assert pruned.record_flops < 0.5 * full.record_flops
    assert pruned.memory["activations"] < 0.5 * full.memory["activations"]
    taken = [
        sum(estimate(dataclasses.replace(big, engine=name), [], devices=8).memory.values())
        for name in ("ddp", "zero2", "fsdp", "zero3")
    ]
    assert taken == sorted(taken, reverse=True)
    without = estimate(dataclasses.replace(big, checkpointing=False), [], devices=8)
    assert without.memory["activations"] > 3 * full.memory["activations"]
    assert without.record_flops < full.record_flops


def test_the_order_of_the_published_hours() -> None:
    """LLaVA-1.5 names 5.5 and 20 hours for 13B on eight A100: between half and twice of that."""
    for stage, published in ((PRETRAIN, 5.5), (FINETUNE, 20.0)):
        run = Asked(stage, *(None,) * 2, "llava-1.5-13b", None, bf16=True, engine="zero3")
        assert 0.5 < estimate(run, [], devices=8).hours / published < 2


PAGE = Path(__file__).parents[2] / "docs" / "training.md"
ROWS = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8").partition("plans:begin")[2], flags=re.MULTILINE)[2:]


@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_a_plan_says(row: str) -> None:
    stage, model, engine, method, devices, memory, hours, flops = row.split(" | ")
    run = Asked(STAGES[stage], *(None,) * 2, model, None, method=method, engine=engine, bf16=True)
    found = estimate(dataclasses.replace(run, per_device=4 if devices == "32" else None), [], devices=int(devices))
    assert f"{sum(found.memory.values()) / 2**30:.0f}" == memory
    assert f"{found.hours:.1f}" == hours
    assert f"{found.record_flops / 1e12:.1f}" == flops
