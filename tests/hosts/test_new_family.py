"""A family made as docs/add_host.md says, outside the package, is found, counted and pruned like the others."""

from __future__ import annotations

import re

import pytest
import torch
from family import BATCHES, ONE, THREE, Family, generated
from packages import Packages
from pages import DOCS, read
from toy_family import ToyHost
from transformers import CLIPVisionConfig

import ivtp
from benchmarks import tables
from ivtp.errors import UnsupportedModelError
from ivtp.plug import find_host
from ivtp.registry import methods_on


@pytest.fixture
def toy(packages: Packages) -> Family:
    target = re.search(r'^toy = "(\S+)"$', read(DOCS / "add_host.md"), flags=re.MULTILINE)[1]
    packages.install("ivtp-toy", {}, {"ivtp.hosts": {"toy": target}})
    return Family("toy")


def test_it_gives_all_that_the_page_asks_for(toy: Family) -> None:
    asked = re.findall(r"^\| `(\w+)` \| yes \|", read(DOCS / "add_host.md"), flags=re.MULTILINE)
    host = find_host(toy.model())
    assert "default_clip" in asked
    assert [name for name in asked if name not in vars(ToyHost) | vars(host)] == []


def test_it_is_found_counted_and_described(toy: Family) -> None:
    assert "toy" in ivtp.list_hosts()
    model = toy.model()
    before = set(model.__dict__), {name: id(weight) for name, weight in model.named_parameters()}
    host = find_host(model)
    assert type(host) is ToyHost
    assert host.geometry(model.config) == host.size
    assert before == (set(model.__dict__), {name: id(weight) for name, weight in model.named_parameters()})
    assert ivtp.flops("toy-small", method="topk", keep=8).total < ivtp.flops("toy-small", method="none").total
    (row,) = [line for line in tables.families().splitlines() if line.startswith("| `toy` |")]
    assert "the mean row | other vision towers and decoders; methods that need" in row
    model.config.vision_config = CLIPVisionConfig()
    with pytest.raises(UnsupportedModelError, match="can be pruned"):
        ivtp.attach(model, toy.processor, method="topk", keep=8)


def test_it_takes_what_a_family_of_the_same_facts_takes(toy: Family) -> None:
    assert ivtp.list_methods("toy") == ivtp.list_methods("llava_siglip")
    model, inputs = toy.model(), toy.inputs(ONE)
    for method, cell in methods_on("toy").items():
        if cell.options is not None:
            with torch.no_grad(), ivtp.attach(model, toy.processor, method=method, keep=18, **cell.options) as pruner:
                model(**inputs)
                assert 0 < (pruner.trace.kept() >= 0).sum() <= 18, method


def test_with_all_tokens_it_is_the_stock_model_and_a_prompt_is_alone_what_it_is_in_a_batch(toy: Family) -> None:
    model, inputs = toy.model(), toy.inputs(*BATCHES["mixed"])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        for method in ("divprune", "fastv", "ivtp"):
            with toy.attach(model, method, keep="100%"):
                torch.testing.assert_close(model(**inputs).logits[real], stock[real], atol=1e-4, rtol=0)
        with toy.attach(model):
            said = generated(model.generate(**inputs, max_new_tokens=4, do_sample=False), inputs)[-1]
            alone = toy.inputs(THREE)
            assert generated(model.generate(**alone, max_new_tokens=4, do_sample=False), alone)[0].equal(said)
        assert model(**inputs).logits.equal(stock), "detaching leaves nothing"
