"""A family that lacks what a method needs is refused when the method is attached, in one line."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, samples

import ivtp
from ivtp.errors import ConfigError
from ivtp.hosts.llava import LlavaHost
from ivtp.plan import NEEDS, PLACES
from ivtp.registry import method_class

METHODS = ivtp.list_methods()
WORDS = {"cls": "CLS token", "grid": "grid", "text_side": "text side"}


def test_needs_are_known() -> None:
    assert set(WORDS) == set(NEEDS)
    assert {need for method in METHODS for need in method_class(method).needs} == set(NEEDS)
    assert ivtp.list_methods("llava") == METHODS


@pytest.mark.parametrize("lacking", NEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_family_lacks_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str, lacking: str) -> None:
    monkeypatch.setattr(LlavaHost, "gives", frozenset(NEEDS) - {lacking})
    model = tiny.model()
    if lacking not in method_class(method).needs:
        tiny.attach(model, method=method).detach()
        assert method in ivtp.list_methods("llava")
        return
    with pytest.raises(ConfigError, match=WORDS[lacking]) as caught:
        tiny.attach(model, method=method)
    assert "\n" not in str(caught.value)
    assert f"{method!r} needs" in str(caught.value)
    assert "llava lacks" in str(caught.value)
    assert "see `ivtp methods --hosts`" in str(caught.value)
    assert (method in ivtp.list_methods("llava")) == ('guide="text"' in str(caught.value))
    tiny.attach(model, method="random").detach()  # nothing of the refused one is left


@pytest.mark.parametrize("guide", ["text", "visual"])
def test_a_guide_that_reads_no_text_side_needs_none(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, guide: str) -> None:
    monkeypatch.setattr(LlavaHost, "gives", frozenset({"cls", "grid"}))
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model, guide=guide) as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
        assert pruner.trace.kept().shape == (1, 8)
    with pytest.raises(ConfigError, match='use guide="text"'):
        tiny.attach(model)
    with pytest.raises(ConfigError) as caught:
        tiny.attach(model, method="cdpruner+fastv", keep="16+8")
    assert "guide" not in str(caught.value)


def test_both_parts_of_a_joined_method_count(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlavaHost, "gives", frozenset({"grid"}))
    with pytest.raises(ConfigError, match="CLS token"):
        tiny.attach(tiny.model(), method="visionzip+fastv", keep="16+8")
    tiny.attach(tiny.model(), method="spatial+fastv", keep="16+8").detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_place_where_a_family_cannot_be_cut_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with tiny.attach(tiny.model(), method=method) as pruner:
        places = {cut.place for cut in pruner.method.plan.cuts if cut.where == "vision"}
    for place in PLACES:
        monkeypatch.setattr(LlavaHost, "cuts", frozenset(PLACES) - {place})
        model = tiny.model()
        if place not in places:
            tiny.attach(model, method=method).detach()
            continue
        with pytest.raises(
            ConfigError, match=f"{method!r} cuts {PLACES[place]}, where llava cannot".replace("+", r"\+")
        ):
            tiny.attach(model, method=method)
        tiny.attach(model, method="fastv").detach()  # nothing of the refused one is left
