"""IVTP on a tower without CLS equals the slow reference: the mean of all rows, and of all patches, stands for CLS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference, check_stages, prompt_of

import ivtp
from ivtp import PruneConfig
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.hosts.llava_siglip import HOST
from ivtp.hosts.tiny import tiny_images

PROMPTS = (("What is left of the dog?", ((50, 40),)), ("How many bananas are there?", ((30, 90), (84, 84))))


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return HOST.tiny()


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"aggregation": how} for how in ("mean", "multiply", "layer")),
        {"guide": "visual"},
        {"stages": "vision", "group_layers": 2},
        {"stages": "llm", "guide": "visual"},
        {"keep": 1, "group_layers": 4},
        {"positions": "compact", "cache": "layered"},
    ],
    ids=str,
)
def test_what_stays_is_what_the_reference_keeps(small: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, processor = small
    options = {"keep": 8, "guide": "text", "llm_layers": 6, **options}
    reference = Reference(model, None, PruneConfig.of(**options))
    expected = []
    for question, sizes in PROMPTS:
        content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = tiny_images(question, sizes)
        expected.append(reference.run(prompt_of(processor, text, question, images, reference.num_patches)))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**HOST.tiny_inputs(model, processor, PROMPTS)).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


def test_the_guide_that_needs_a_text_side_says_what_to_do(small: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match='use guide="text"') as caught:
        ivtp.attach(*small, keep=8)
    assert "\n" not in str(caught.value)


def test_the_strategy_that_would_drop_a_patch_is_refused() -> None:
    config = HOST.tiny()[0].config
    config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match='the strategy "full"'):
        HOST.geometry(config)
