"""Configs refuse what makes no sense, in one line that says what would."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from ivtp.config import PruneConfig
from ivtp.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep", 0),
        ("keep", -3),
        ("keep", float("nan")),
        ("keep", 1.5),
        ("keep", True),
        ("keep", None),
        ("keep", "300%"),
        ("keep", "0%"),
        ("keep", "eleven"),
        ("positions", "new"),
        ("cache", "drop"),
        ("budget", "mean"),
        ("repruning", "never"),
        ("schedule", ()),
        ("schedule", (10, 20)),
        ("schedule", (10, 0)),
        ("schedule", 480),
        ("schedule", "20"),
        ("schedule", {20: 8}),
        ("options", 3),
        ("seed", -1),
    ],
)
def test_bad_values(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig(**{field: value})
    message = str(caught.value)
    assert field in message
    assert "use" in message
    assert "\n" not in message


@pytest.mark.parametrize(("keep", "expected"), [(64, 64), ("11%", 63), ("100%", 576), ("0.01%", 1), ("12.5%", 72)])
def test_keep_as_tokens(keep: int | str, expected: int) -> None:
    assert PruneConfig(keep=keep).tokens(576) == expected


def test_keep_beyond_the_model() -> None:
    with pytest.raises(ConfigError, match=r"keep=600 exceeds the 576 visual tokens of this model; use 1\.\.576"):
        PruneConfig(keep=600).tokens(576)


def test_unknown_keywords_become_options_of_the_method() -> None:
    config = PruneConfig.of(method="topk", keep=9, where="layers")
    assert config.options == {"where": "layers"}
    assert PruneConfig.of(cls=1).options == {"cls": 1}
    with pytest.raises(ConfigError, match="options=3"):
        PruneConfig.of(options=3)


def test_spaces_around_a_share_do_not_matter() -> None:
    assert PruneConfig(keep=" 11% ").tokens(576) == 63
    assert PruneConfig(keep=" 11% ") == PruneConfig(keep="11%")


def test_a_config_is_a_value() -> None:
    """It can be a key, it can be copied, and what it was made from cannot change it."""
    given = {"where": "layers"}
    config = PruneConfig(method="topk", schedule=[20, 8], options=given)  # type: ignore[arg-type]
    given["where"] = "after"
    assert config.options == {"where": "layers"}
    assert config.schedule == (20, 8)
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert same == config
        assert hash(same) == hash(config)
    assert dataclasses.asdict(config)["options"] == {"where": "layers"}
