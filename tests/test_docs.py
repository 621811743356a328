"""The pages say what is so: their examples run, and a new method is made by following its page."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from typer.main import get_command

import ivtp
from ivtp import registry
from ivtp.cli import app as cli

DOCS = Path(__file__).parents[1] / "docs"


def test_examples_of_the_methods_page() -> None:
    result = doctest.testfile(str(DOCS / "methods.md"), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


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


def test_the_python_of_the_page_on_use_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python run\n(.*?)```", (DOCS / "use.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    known: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "use.md", "exec"), known)
    assert len(known["texts"]) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"kept.png", "trace.png"}


def test_the_commands_of_the_page_on_use_exist() -> None:
    text = (DOCS / "use.md").read_text(encoding="utf-8")
    commands = {name: get_command(cli.app).commands[name] for name in re.findall(r"^ivtp ([a-z]+)", text, re.MULTILINE)}
    assert set(commands) >= {"ask", "batch", "chat", "methods"}
    for line in re.findall(r"^ivtp .*$", text, flags=re.MULTILINE):
        name, flags = line.split()[1], re.findall(r"(--[a-z]+)", line.partition("#")[0])
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(flags) <= options, line
