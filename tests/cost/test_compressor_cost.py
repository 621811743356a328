"""What trained projectors cost: the published figures, and a counter that watches a real forward."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import Tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import ivtp
from ivtp.cli.app import app
from ivtp.cost.flops import flops
from ivtp.errors import ConfigError
from ivtp.hosts.llava_next import HOST as NEXT
from ivtp.registry import compressor_class

SEVEN_B = "llava-1.5-7b"
TABLE = {"cabstractor": (8.1, 47.4), "llamavid": (8.2, 46.8), "resampler": (8.1, 47.4)}
"""Of the paper at 64 of 576 visual tokens and 512 text tokens: TFLOPs, and the saving in percent."""


@pytest.mark.parametrize("name", TABLE)
def test_published_figure_and_saving(name: str) -> None:
    found = round(flops(SEVEN_B, compressor=name, keep=64).total / 1e12, 1)
    full = round(flops(SEVEN_B, method="none").total / 1e12, 1)
    assert (found, round(100 * (1 - found / full), 1)) == TABLE[name]


@pytest.mark.parametrize("name", ivtp.list_compressors())
@pytest.mark.parametrize("images", [1, 2])
def test_it_costs_what_a_counter_sees(tiny: Tiny, name: str, images: int) -> None:
    tiny = copy.copy(tiny)
    tiny.processor = copy.deepcopy(tiny.processor)
    model, tokens = tiny.model(attention="eager"), {"mlp": 36, "llamavid": 10}.get(name, 9)
    compression = ivtp.compress(model, tiny.processor, name, tokens=tokens)
    model.requires_grad_(False)  # the counter fails on views of leaves that want gradients
    sample = tiny.sample(images=images)
    inputs, asked = tiny.inputs(sample), []
    compression.compressor.register_forward_hook(
        lambda module, args, kwargs, output: asked.append(kwargs.get("asked")), with_kwargs=True
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    found = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    question = 0 if asked[0] is None else int(asked[0][0].sum())
    assert (question > 0) == compression.compressor.info.reads_question
    text = inputs["input_ids"].shape[1] - images * (tokens - 1)
    report = flops(model, text_tokens=text, images=images, instruction_tokens=question)
    assert report.projector == pytest.approx(
        found["LlavaForConditionalGeneration.model.multi_modal_projector"], rel=0.01
    )
    assert report.head == pytest.approx(found["LlavaForConditionalGeneration.lm_head"], rel=0.01)
    assert report.llm == pytest.approx(found["LlavaForConditionalGeneration.model.language_model"], rel=0.01)
    assert (report.method, report.keep, report.pruning) == (name, tokens, 0)


def test_a_model_a_checkpoint_and_a_name_cost_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny.model(), copy.deepcopy(tiny.processor)
    named = flops(model, compressor="qformer", keep=9, text_tokens=20)
    assert named.total < flops(model, compressor="mlp", keep="100%", text_tokens=20).total
    with ivtp.compress(model, processor, "qformer", tokens=9):
        ivtp.save(model, processor, tmp_path)
        totals = {flops(one, text_tokens=20).total for one in (model, tmp_path, str(tmp_path))}
        assert flops(model, method="none", text_tokens=20).total in totals
    assert totals == {named.total}
    other = flops(tmp_path, compressor="resampler", keep=9, text_tokens=20)
    assert other.method == "resampler"


def test_llavas_own_projector_costs_what_the_untouched_model_does() -> None:
    stock, mlp = flops(SEVEN_B, method="none"), flops(SEVEN_B, compressor="mlp", keep="100%")
    assert (stock.total, stock.projector) == (mlp.total, mlp.projector)


def test_only_what_reads_the_question_costs_more_with_a_longer_one() -> None:
    for name in ivtp.list_compressors():
        keep = "100%" if name == "mlp" else 64
        short, long = (flops(SEVEN_B, compressor=name, keep=keep, instruction_tokens=n).projector for n in (10, 300))
        assert (short < long) == compressor_class(name).info.reads_question
        assert flops(SEVEN_B, compressor=name, keep=keep, batch=3).total == pytest.approx(
            3 * flops(SEVEN_B, compressor=name, keep=keep).total
        )


def test_the_cost_of_an_answer_is_that_of_the_compressed_prefill(tiny: Tiny) -> None:
    from ivtp.cli.console import Cost

    model, processor = tiny.model(), copy.deepcopy(tiny.processor)
    with ivtp.compress(model, processor, "cabstractor", tokens=9):
        answer = ivtp.ask(model, processor, list(tiny.sample().images), "What is it?", max_new_tokens=2)
        cost = Cost.of(model, answer)
        text = answer.prompt_columns - 8
        assert cost.full == cost.pruned == flops(model, text_tokens=text).total
    assert cost.tokens() == "9 of 9"


def test_what_cannot_be_counted_is_one_line() -> None:
    for arguments, words in (
        ({"compressor": "qformer", "method": "topk"}, "prunes nothing behind a compressor"),
        ({"compressor": "mlp", "keep": 64}, "use tokens=576"),
        ({"compressor": "llamavid", "keep": 63}, "for example"),
        ({"compressor": "qformer", "keep": 600}, "exceeds the 576"),
        ({"compressor": "honeybee"}, "available: cabstractor"),
        ({"compressor": "qformer", "threshold": 0.1}, "no option 'threshold'"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            flops(SEVEN_B, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no compressor can stand in"):
        flops(NEXT.tiny()[0].config, compressor="qformer", keep=9)


def test_the_command_line_counts_it(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny.model(), copy.deepcopy(tiny.processor)
    with ivtp.compress(model, processor, "qformer", tokens=9):
        ivtp.save(model, processor, tmp_path)
    run = CliRunner().invoke(app, ["flops", "--model", str(tmp_path), "--text", "20", "--json"])
    found = json.loads(run.stdout)
    assert (found["method"], found["full"]["projector"]) == ("qformer", flops(model, method="none").projector)
    run = CliRunner().invoke(app, ["flops", "--compressor", "llamavid", "--keep", "64", "--json"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert (found["method"], found["keep"]) == ("llamavid", 64)
    assert [round(found[part]["total"] / 1e12, 1) for part in ("full", "pruned")] == [15.4, 8.2]
