"""What README and the other pages say is so: code runs, commands parse, links lead somewhere, tables are up to date."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, commands, links, read, run_python

import ivtp
from benchmarks import speed_table, tables
from benchmarks.blocks import replaced, rewrite
from ivtp.cli.app import app

README = ROOT / "README.md"
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def test_readme_is_short_enough_to_be_read() -> None:
    assert len(read(README).splitlines()) <= 140


def test_readmes_snippets_run_as_they_stand_and_print_what_they_say() -> None:
    assert run_python(README) == 2


def test_readmes_costs_are_those_that_its_command_prints() -> None:
    (command,) = (line for line in commands(README) if line[0] == "flops")
    assert command == ["flops", "--model", "llava-1.5-7b", "--keep", "64", "--text", "512"]
    full, pruned = (
        ivtp.flops("llava-1.5-7b", method=method, keep=64, text_tokens=512).total for method in ("none", "ivtp")
    )
    assert f"{full / 1e12:.1f} to {pruned / 1e12:.1f} TFLOPs" in read(README)


def test_readme_says_whose_figures_are_which() -> None:
    text = " ".join(read(README).replace("*", "").split())
    for said in (
        "Nothing has been measured with real LLaVA weights",
        "no GPU has been measured yet",
        "The paper's headline, -1.0 at 64 tokens over twelve benchmarks, is of retrained models.",
        "No ranking on real models follows",
    ):
        assert said in text


@each_page
def test_links_lead_to_files_that_exist(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


@each_page
def test_names_and_files_that_are_mentioned_exist(page: Path) -> None:
    code = " ".join(re.findall(r"`([^`\n]+)`", read(page))).replace("ivtp.json", "")
    made = re.findall(r"^```python file=(\S+)$", read(page), flags=re.M)
    for dotted in re.findall(r"(?<![\w./])ivtp(?:\.\w+)+", code):
        pkgutil.resolve_name(dotted)
    for file in re.findall(r"(?<![\w./])(?:\w+/)+\w+\.(?:py|json|md|sh|csv)\b", code):
        roots = (ROOT, ROOT / "src", ROOT / "src" / "ivtp", page.parent)
        assert Path(file).name in made or any((root / file).exists() for root in roots), file


@each_page
def test_commands_parse(page: Path) -> None:
    root = typing.cast(typer.core.TyperGroup, typer.main.get_command(app))
    for name, *arguments in commands(page):
        if name.startswith("--"):  # of `ivtp` itself
            assert name in {option for parameter in root.params for option in parameter.opts}
        elif arguments:
            root.commands[name].make_context(name, arguments)  # raises for an option or argument that does not exist
        else:
            assert name in root.commands  # its name alone


def test_a_command_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`ivtp ask photo.png why --keeps 3`\n\n```sh\nivtp flops --text 9  # cheap\n```\n")
    first, second = sorted(commands(page))
    assert second == ["flops", "--text", "9"]
    with pytest.raises(Exception, match="keeps"):
        test_commands_parse(page)
    assert first[0] == "ask"


@each_page
def test_targets_and_modules_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.M)
    assert {line[0] for line in commands(page, "make") if line} <= set(targets)
    for line in commands(page, "python") + commands(page, "torchrun"):
        if "-m" in line:
            assert importlib.util.find_spec(line[line.index("-m") + 1])
        else:
            assert (ROOT / line[0]).is_file()


@pytest.mark.parametrize("page", tables.blocks(), ids=lambda page: page.name)
def test_generated_tables_are_those_of_make_tables(page: Path) -> None:
    text = read(page)
    for name, content in tables.blocks()[page].items():
        assert replaced(text, name, content) == text, f"{page.name}: run `make tables`"


def test_tables_of_speed_are_those_of_make_speed() -> None:
    text = read(ROOT / "docs" / "speed.md")
    files = sorted((ROOT / "results" / "speed").glob("*.json"))
    assert replaced(text, "speed", speed_table.tables(files)) == text, "run `make speed`"


def test_every_method_and_family_has_its_row() -> None:
    pages = (read(ROOT / "docs" / f"{name}.md") for name in ("methods", "families"))
    methods, families = (re.findall(r"^\| `([^`]+)`", page, flags=re.M) for page in pages)
    assert set(methods) >= {*ivtp.list_methods()}
    assert families == ivtp.list_hosts()
    assert all(f"`{name}`" in read(README) for name in (*ivtp.list_methods(), *ivtp.list_hosts()))


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- one:begin -->\n<!-- one:end -->\n")
    with pytest.raises(ValueError, match="two:begin"):
        rewrite(page, {"one": "1", "two": "2"})
    assert page.read_text() == "<!-- one:begin -->\n<!-- one:end -->\n"
    assert rewrite(page, {"one": "1"})
    assert page.read_text() == "<!-- one:begin -->\n1\n<!-- one:end -->\n"
    assert not rewrite(page, {"one": "1"})


def test_tables_show_simple_and_crowded_photos_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(mean: float) -> dict[str, float]:
        return {"mean": mean, "mean low": mean - 10, "mean high": mean + 10}

    crowds = {"1-3 objects": figures(80), "4-7 objects": figures(60), "8-12 objects": figures(40)}
    gaps = {"change": -5.0, "change low": -9.0, "change high": 1.0}
    gaps |= {"to ivtp": 2.0, "to ivtp low": 1.0, "to ivtp high": 3.0}
    common: dict[str, Any] = {**figures(70), "objects": crowds, "tflops": 0.005, **gaps}
    rows = [{"method": "none", "keep": "all", **common}]
    for name in (*tables.IN_README[1:], "tome"):
        rows += [{"method": name, "keep": keep, **common} for keep in (16, 32, 64)]
    monkeypatch.setattr(tables, "COMPARED", tmp_path / "compared.json")
    tables.COMPARED.write_text(json.dumps({"rows": rows}))
    header, _, first, *others = tables.results().splitlines()
    assert header.count("| 1-3 objects | 8-12 objects |") == 2
    assert first.startswith("| all 576 tokens | 70.0 (60.0–80.0) | 80.0 | 40.0 | 5.0 |")
    assert others[-1].startswith("| `tome` |")
    whole = tables.compared()
    assert whole.count("| `ivtp` |") == 5
    assert "32: 8-12 objects" in whole
    assert "| to all tokens | 16 tokens | 32 tokens | 64 tokens |" in whole
    for cells in ("none (-9.0 to +1.0)", "+2.0 (+1.0 to +3.0)", "–"):  # against all tokens, IVTP and the best
        assert f"| `tome` | {' | '.join([cells] * 3)} |" in whole
