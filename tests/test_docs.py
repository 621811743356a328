"""The pages say what is so: their examples run, and a new method is made by following its page."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
from pathlib import Path

import pytest
from pages import DOCS, read, run_python

import ivtp
from ivtp import registry, trace


def test_examples_of_the_methods_page() -> None:
    result = doctest.testfile(str(DOCS / "methods.md"), module_relative=False)
    assert result.attempted == 3
    assert result.failed == 0


@pytest.mark.parametrize(("page", "printing"), [("quickstart", 2), ("configuration", 1), ("trace", 2)])
def test_a_pages_code_runs_and_prints_what_it_says(
    page: str, printing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(DOCS / f"{page}.md") == printing
    assert (page == "quickstart") == (tmp_path / "kept.png").exists()


def test_the_page_of_the_record_names_all_of_it() -> None:
    text = read(DOCS / "trace.md")
    for kind in (trace.PruneTrace, trace.StageTrace, trace.Word, trace.TokensPerLayer):
        fields = {field.name for field in dataclasses.fields(kind)}
        methods = {name for name in vars(kind) if not name.startswith("_") and name not in fields}
        for name in fields | methods:
            assert re.search(rf"`(\w+\.)?{name}\b", text), name


def test_the_methods_page_has_a_row_for_every_method_and_names_what_exists() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z+]+) \|", text, flags=re.MULTILINE)
    assert sorted(set(rows) - {"method"}) == ivtp.list_methods()
    for dotted in re.findall(r"`(ivtp\.(?:core|methods)\.[\w.]+)`", text):
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), dotted


@pytest.fixture
def no_memory():
    """The registry's caches are emptied before and after."""
    caches = (registry.names_in, registry._composed)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_a_new_method_by_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_memory: None) -> None:
    text = (DOCS / "add_method.md").read_text(encoding="utf-8")
    name, code = re.search(r"```python file=(\S+)\n(.*?)```", text, flags=re.DOTALL).groups()
    (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.setattr("ivtp.methods.__path__", [*importlib.import_module("ivtp.methods").__path__, str(tmp_path)])
    registry.names_in.cache_clear()
    blocks = re.findall(r"```python run\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "add_method.md", "exec"), {})
    imported = set(re.findall(r"^from (ivtp[\w.]*) import", code, flags=re.MULTILINE))
    assert imported <= {"ivtp.errors", "ivtp.methods.base"}  # public names only
