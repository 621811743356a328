"""Names to classes: files of the package, and what installed packages add by entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from packages import Packages
from tiny import Tiny, samples

import ivtp
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.registry import host_class, host_classes, method_class, method_classes

FIRST = '''
from ivtp.methods.base import Cut, Method, MethodInfo, Plan


class First(Method):
    """Keeps the first patches."""

    info = MethodInfo(
        title="First", year=2026, stage="vision", paper="(test)"
    )

    def make_plan(self):
        return Plan((Cut("vision", self.geometry.vision_layers - 1, self.keep, place="behind"),))

    def score(self, window):
        return -window.patch.float()
'''
FAMILY = """
from ivtp.hosts.llava import LlavaHost


class OtherHost(LlavaHost):
    name = "other"
    model_class = "OtherForConditionalGeneration"
    stock = ("other-7b",)

    @classmethod
    def matches(cls, config):
        return getattr(config, "model_type", None) == "other"

    @classmethod
    def stock_config(cls, name):
        return LlavaHost.stock_config("llava-1.5-7b")
"""
BUILT_IN = ivtp.list_methods()


@pytest.fixture
def first(packages: Packages) -> Packages:
    packages.install("ivtp-first", {"first_method.py": FIRST}, {"ivtp.methods": {"first": "first_method:First"}})
    return packages


def test_a_package_adds_a_method(first: Packages, tiny: Tiny) -> None:
    assert ivtp.list_methods() == sorted([*BUILT_IN, "first"])
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    for method, kept in (("first", [0, 1, 2]), ("first+fastv", None)):
        with torch.no_grad(), ivtp.attach(model, tiny.processor, method=method, keep=3) as pruner:
            model(**inputs)
            assert kept in (None, pruner.trace.kept()[0].tolist())
            assert pruner.trace.kept().shape == (1, 3)
    assert ivtp.flops("llava-1.5-7b", method="first").pruning == 0
    with pytest.raises(ConfigError, match="did you mean first"):
        method_class("frist")


def test_the_command_line_lists_it(first: Packages) -> None:
    command = [sys.executable, "-m", "ivtp", "methods", "--json"]
    path = os.pathsep.join([str(first.folder), *sys.path])
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    assert "first" in {row["name"] for row in json.loads(run.stdout)}


def test_a_package_adds_a_family(packages: Packages) -> None:
    packages.install("ivtp-other", {"other_family.py": FAMILY}, {"ivtp.hosts": {"other": "other_family:OtherHost"}})
    assert {"llava", "other"} <= set(ivtp.list_hosts()) == set(host_classes())
    assert host_class("other").name == "other"
    assert "cdpruner" in ivtp.list_methods("other")
    assert ivtp.flops("other-7b", keep=64).total == ivtp.flops("llava-1.5-7b", keep=64).total
    with pytest.raises(UnsupportedModelError, match=r"families can: .*\bother\b"):
        ivtp.attach(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["topk", "prumerge+", "none"])
def test_a_name_of_ours_stays_ours(packages: Packages, name: str) -> None:
    stock = None if name == "none" else method_class(name)
    packages.install("ivtp-first", {"first_method.py": FIRST}, {"ivtp.methods": {name: "first_method:First"}})
    with pytest.warns(
        UserWarning, match="ivtp-first is left out, because ivtp has one of that name; rename it"
    ) as found:
        assert ivtp.list_methods() == BUILT_IN
    assert len(found) == 1
    assert "\n" not in str(found[0].message)
    if stock is not None:
        assert method_class(name) is stock


def test_of_two_packages_with_one_name_one_is_left_out(first: Packages) -> None:
    first.install("ivtp-second", {"second_method.py": FIRST}, {"ivtp.methods": {"first": "second_method:First"}})
    with pytest.warns(UserWarning, match="method 'first' of the package ivtp-(first|second) is left out"):
        assert ivtp.list_methods().count("first") == 1


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("import no_such_module_at_all", "broken:Method", "cannot be loaded.*no_such_module_at_all"),
        ("x = 1", "broken:Missing", "cannot be loaded.*Missing"),
        ("x = = 1", "broken:x", "cannot be loaded"),
        ("x = 1", "broken:x", r"is broken:x, which is no subclass of ivtp\.methods\.base\.Method"),
        ("def x(): pass", "broken:x", "is broken:x, which is no subclass"),
    ],
)
def test_what_does_not_load_is_one_line_and_breaks_nothing_else(
    first: Packages, tiny: Tiny, source: str, target: str, says: str
) -> None:
    first.install("ivtp-broken", {"broken.py": source}, {"ivtp.methods": {"broken": target}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {"broken", "first", *BUILT_IN} == set(ivtp.list_methods())  # a list of names loads nothing
        assert method_class("first").info.title == "First"
    with pytest.raises(ConfigError, match=f"method 'broken' of the package ivtp-broken {says}") as caught:
        ivtp.attach(tiny.model(), tiny.processor, method="broken", keep=4)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="method 'broken' of the package ivtp-broken"):
        assert set(method_classes()) == {"first", *BUILT_IN}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert "broken" not in ivtp.list_methods("llava")


def test_a_family_that_does_not_load_leaves_the_others(packages: Packages, tiny: Tiny) -> None:
    packages.install("ivtp-broken", {"broken.py": "import nowhere_to_be_found"}, {"ivtp.hosts": {"broken": "broken:X"}})
    model = tiny.model()
    with pytest.warns(UserWarning, match="host 'broken' of the package ivtp-broken cannot be loaded"):
        tiny.attach(model).detach()
    tiny.attach(model).detach()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        host_class("broken")
