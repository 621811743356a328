"""The pages say what is so: their examples run, and a new method is made by following its page."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packages import Packages
from pages import DOCS, read, run_python
from typer.main import get_command

import ivtp
from ivtp import trace
from ivtp.cli import app as cli


def test_examples_of_the_methods_page() -> None:
    result = doctest.testfile(str(DOCS / "methods.md"), module_relative=False)
    assert result.attempted == 7
    assert result.failed == 0


@pytest.mark.parametrize(
    ("page", "printing"), [("quickstart", 2), ("configuration", 1), ("trace", 2), ("compressors", 1)]
)
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


def test_a_new_method_by_the_page(packages: Packages) -> None:
    text = (DOCS / "add_method.md").read_text(encoding="utf-8")
    name, code = re.search(r"```python file=(\S+)\n(.*?)```", text, flags=re.DOTALL).groups()
    project = tomllib.loads(re.search(r"```toml file=pyproject.toml\n(.*?)```", text, flags=re.DOTALL)[1])
    (group,) = project["project"]["entry-points"]
    packages.install(project["project"]["name"], {name: code}, {group: project["project"]["entry-points"][group]})
    blocks = re.findall(r"```python run\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) > 1
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
