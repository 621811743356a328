"""IVTP on a tower without CLS equals the slow reference: the mean of all rows, and of all patches, stands for CLS."""

from __future__ import annotations

from typing import Any

import pytest
from family import check_kept
from reference import Reference

import ivtp
from ivtp import PruneConfig
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.hosts.llava_siglip import HOST

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
    options = {"keep": 8, "guide": "text", "llm_layers": 6, **options}
    check_kept(HOST, *small, Reference(small[0], None, PruneConfig.of(**options)), PROMPTS, options)


def test_the_guide_that_needs_a_text_side_says_what_to_do(small: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match='use guide="text"') as caught:
        ivtp.attach(*small, keep=8)
    assert "\n" not in str(caught.value)


def test_the_strategy_that_would_drop_a_patch_is_refused() -> None:
    config = HOST.tiny()[0].config
    config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match='the strategy "full"'):
        HOST.geometry(config)
