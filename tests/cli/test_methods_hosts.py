"""`ivtp methods --hosts` says of every family and method what attaching it does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from family import ONE, Family
from terminal import Run

import ivtp
from ivtp.errors import ConfigError
from ivtp.registry import methods_on


@pytest.mark.parametrize("host", ivtp.list_hosts())
def test_what_the_matrix_says_is_what_attaching_does(host: str) -> None:
    cells = methods_on(host)
    assert list(cells) == ivtp.list_methods()
    assert [method for method, cell in cells.items() if cell.options is not None] == ivtp.list_methods(host)
    family = Family(host)
    model, inputs, patches = family.model(), family.inputs(ONE), sum(family.counts(ONE[1]))
    for method, cell in cells.items():
        asked: dict[str, Any] = {"method": method, "keep": "50%", "clip": family.clip}
        assert bool(cell.refusal) == (cell.options != {})
        if cell.refusal:
            with pytest.raises(ConfigError) as caught:
                ivtp.attach(model, family.processor, **asked)
            assert str(caught.value) == cell.refusal
            assert "\n" not in cell.refusal
        if cell.options is not None:
            with torch.no_grad(), ivtp.attach(model, family.processor, **asked, **cell.options) as pruner:
                model(**inputs)
                assert 0 < (pruner.trace.kept() >= 0).sum() < patches, method


def test_the_command_prints_it(run: Run) -> None:
    rows = json.loads(run("methods", "--hosts", "--json").out)
    cells = {(method, host): cell for host in ivtp.list_hosts() for method, cell in methods_on(host).items()}
    assert {(row["method"], row["host"]): (row["options"], row["refusal"]) for row in rows} == {
        key: (cell.options, cell.refusal) for key, cell in cells.items()
    }
    assert all(row["works"] == (row["options"] is not None) for row in rows)
    shown = run("methods", "--hosts").out.splitlines()
    header, *table = (line.split() for line in shown[: 1 + len(ivtp.list_methods())])
    assert header == ["method", *ivtp.list_hosts()]
    texts = {(method, host): text for method, *own in table for host, text in zip(header[1:], own, strict=True)}
    for key, cell in cells.items():
        taken = ",".join(f"{name}={value}" for name, value in (cell.options or {}).items())
        assert texts[key] == ("-" if cell.options is None else taken or "yes")
        assert cell.options is not None or cell.refusal in shown


def test_one_method_alone_and_a_pair_of_them(run: Run) -> None:
    for name in ("IVTP", "visionzip+fastv"):
        rows = json.loads(run("methods", name, "--hosts", "--json").out)
        assert [(row["method"], row["host"]) for row in rows] == [(name.lower(), host) for host in ivtp.list_hosts()]
    assert next(row for row in rows if row["host"] == "llava_siglip")["works"] is False
    assert run("methods", "fastw", "--hosts").code == 2
