"""The rule of the architecture: a file imports its own room or a lower floor, never a higher one or a neighbour."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ivtp"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "stock"),
    ("config", "trace"),
    ("plan", "files"),
    ("core",),
    ("methods", "towers", "compressors"),
    ("hosts",),
    ("registry",),
    ("cost",),
    ("prompt",),
    ("guide",),
    ("prefill",),
    ("plug",),
    ("images",),
    ("visualize",),
    ("generate",),
    ("micro",),
    ("benchmark", "evaluation", "training"),
    ("cli", "server", "web"),
    ("__main__",),
)
"""From the lowest. A room imports lower floors alone: not its neighbours on the same floor."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONE_FILE_EACH = ("methods", "hosts", "towers", "compressors")
"""Rooms whose files never import one another, only what they share."""
SHARED = (
    *("base", "groups", "idefics_like", "llama", "llava_like", "outliers", "paligemma", "pixtral", "pre_norm"),
    *("qwen_like", "tagged", "tiles", "tiny", "window"),
)
"""Files that the others of their room share."""
UPWARDS = {("trace", "visualize"): "users expect a trace to draw itself"}
"""Imports of a higher floor, which happen in a function when it is called; each with its reason."""
BY_NAME = ("import_module", "names_in", "load_named")
"""Functions that import a module, or all modules of a room, by its name."""

FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def parts_of(file: Path) -> tuple[str, ...]:
    """`methods/topk.py` is ("methods", "topk")."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(source: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of `ivtp` that the source imports, at any depth of the file, without the leading "ivtp".

    `package` is the package of the file, for relative imports. A name that is imported from a package may
    be a module of it, so `from ivtp.methods import topk` counts as `methods.topk`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("ivtp", *package[: len(package) - node.level + 1]) if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {_module((*base, alias.name)) for alias in node.names}
        elif isinstance(node, ast.Call) and _name(node.func) in BY_NAME and node.args:
            text = node.args[0]
            if isinstance(text, ast.Constant):
                found.add(_module(("ivtp", *str(text.value).removeprefix("ivtp.").split("."))))
    return {module[1:] for module in found if module[0] == "ivtp"}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _module(name: tuple[str, ...]) -> tuple[str, ...]:
    """Drops the last part where it names something inside a module."""
    path = ROOT.joinpath(*name[1:])
    return name if path.is_dir() or path.with_suffix(".py").is_file() else name[:-1]


def complaint(here: tuple[str, ...], target: tuple[str, ...]) -> str | None:
    """What the rule has against `here` importing `target`, both without the leading "ivtp"."""
    top = FLOOR["micro"]  # from here on the façade may be used like a user does
    if not target:
        return "imports the façade, which imports everything" if FLOOR[here[0]] < top else None
    room, other = here[0], target[0]
    if other not in FLOOR:
        return f"imports {other}, which is on no floor"
    if room == other:
        alone = room in ONE_FILE_EACH and len(here) > 1 and len(target) > 1
        return f"imports its neighbour {target[1]}" if alone and target[1] not in (*SHARED, here[1]) else None
    if FLOOR[other] >= FLOOR[room] and (room, other) not in UPWARDS:
        return f"on floor {FLOOR[room]} imports {'.'.join(target)} of floor {FLOOR[other]}"
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda p: "/".join(parts_of(p)))
def test_imports_point_downwards(file: Path) -> None:
    here = parts_of(file)
    assert here[0] in FLOOR, f"{here[0]} is on no floor; say in the architecture where it belongs"
    package = here if file.name == "__init__.py" else here[:-1]
    found = imports(file.read_text(encoding="utf-8"), package)
    assert not [text for target in sorted(found) if (text := complaint(here, target))]


def test_the_package_does_not_lean_on_what_its_wheel_leaves_out() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [m for m in modules if m.split(".")[0] in ("recipes", "benchmarks", "tests")], file


@pytest.mark.parametrize(("room", "other"), UPWARDS)
def test_exceptions_are_needed_and_happen_in_functions_alone(room: str, other: str) -> None:
    tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
    upward = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == f"ivtp.{other}"]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert upward
    assert all(any(node in ast.walk(function) for function in functions) for node in upward)


def test_names_that_are_only_known_at_run_time_are_the_registrys() -> None:
    """Everywhere else an import by name has its name in the source, where the rule sees it."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in BY_NAME and node.args:
                assert isinstance(node.args[0], ast.Constant) or parts_of(file) == ("registry",), file


@pytest.mark.parametrize(
    ("here", "source", "allowed"),
    [
        ("core/rollout", "import torch", True),
        ("core/rollout", "from ivtp.config import PruneConfig", True),
        ("core/rollout", "from ivtp.methods.base import Plan", False),
        ("core/rollout", "def f():\n    from ivtp import plug", False),
        ("core/rollout", "import ivtp", False),
        ("cost/flops", "from ivtp.core import schedule", True),
        ("methods/topk", "from ivtp.methods.base import Method", True),
        ("methods/topk", "from .base import Method", True),
        ("methods/topk", "from ivtp.methods.ivtp import METHOD", False),
        ("methods/topk", "from . import ivtp", False),
        ("methods/topk", "from ivtp.hosts.base import Host", False),
        ("images", "from ivtp.micro import world", False),
        ("benchmark/sweep", "from ivtp.evaluation import run", False),
        ("hosts/llava", "from ivtp.hosts.tiny import settle", True),
        ("hosts/llava_next", "from ivtp.hosts.llava import LlavaHost", False),
        ("hosts/base", "from ivtp.registry import host_class", False),
        ("guide/clip", "from ivtp.prompt.chat import Marks", True),
        ("prompt/chat", "from ivtp.guide.clip import ClipText", False),
        ("prefill/decoder", "from ivtp.methods.base import Cut", True),
        ("visualize/page", "from ivtp.visualize.text import Bars", True),
        ("visualize/page", "from ivtp.micro import world", False),
        ("evaluation/run", "from ivtp.micro import world", True),
        ("micro/model", "from ivtp.evaluation import run", False),
        ("micro/model", "import ivtp", True),
        ("cli/app", "if TYPE_CHECKING:\n    from ivtp.micro.world import write_samples", True),
        ("micro/model", "from ivtp.cli.app import main", False),
        ("core/select", "import importlib\nimportlib.import_module('ivtp.plug')", False),
        ("core/select", "from ivtp.registry import names_in", False),
        ("registry", "load_named('hosts', 'llava', 'HOST')", True),
        ("registry", "load_named('micro.formats', 'mme', 'FORMAT')", False),
    ],
)
def test_the_rule_itself(here: str, source: str, allowed: bool) -> None:
    parts = tuple(here.split("/"))
    found = imports(source, parts[:-1])
    assert all(complaint(parts, target) is None for target in found) is allowed
