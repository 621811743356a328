"""The layer rule of the architecture: a file imports its own layer or a lower one, never a higher one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ivtp"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("config", "trace", "errors", "registry", "machine", "outputs", "door"),
    ("core", "cost", "plan", "sizes", "checkpoint"),
    ("methods", "hosts", "compressors"),
    (
        "plug",
        "layers",
        "generate",
        "images",
        "chat",
        "token_text",
        "instruction",
        "guide",
        "probe",
        "prompt",
        "prefill",
        "stage",
        "encoder_stage",
        "decoder_stage",
        "decode",
        "report",
    ),
    ("micro", "evaluation", "training", "visualize", "benchmark"),
    ("cli", "bench_cli", "arguments", "console", "server"),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
ISOLATED = (2, 4)
"""Layers whose rooms stand alone: none imports another of them."""
EXCEPTIONS = {("evaluation", "micro"), ("training", "micro")}
ONE_FILE_EACH = ("methods", "hosts", "compressors")
"""Rooms whose files never import one another, only their `base`."""

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
    return {module[1:] for module in found if module[0] == "ivtp"}


def _module(name: tuple[str, ...]) -> tuple[str, ...]:
    """Drops the last part where it names something inside a module."""
    path = ROOT.joinpath(*name[1:])
    return name if path.is_dir() or path.with_suffix(".py").is_file() else name[:-1]


def complaint(here: tuple[str, ...], target: tuple[str, ...]) -> str | None:
    """What the rule has against `here` importing `target`, both without the leading "ivtp"."""
    if not target:
        return "imports the façade, which imports everything" if LAYER[here[0]] < 4 else None
    room, other = here[0], target[0]
    if other not in LAYER:
        return f"imports {other}, which is in no layer"
    if LAYER[other] > LAYER[room]:
        return f"layer {LAYER[room]} imports {'.'.join(target)} of layer {LAYER[other]}"
    if room == other:
        alone = room in ONE_FILE_EACH and len(here) > 1 and len(target) > 1
        return f"imports its neighbour {target[1]}" if alone and target[1] not in ("base", here[1]) else None
    if LAYER[other] == LAYER[room] and LAYER[room] in ISOLATED and (room, other) not in EXCEPTIONS:
        return f"imports {'.'.join(target)}, a room of its own layer"
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda p: "/".join(parts_of(p)))
def test_imports_point_downwards(file: Path) -> None:
    here = parts_of(file)
    assert here[0] in LAYER, f"{here[0]} is in no layer; say in the architecture where it belongs"
    package = here if file.name == "__init__.py" else here[:-1]
    found = imports(file.read_text(encoding="utf-8"), package)
    assert not [text for target in sorted(found) if (text := complaint(here, target))]


@pytest.mark.parametrize(
    ("here", "source", "allowed"),
    [
        ("core/rollout", "import torch", True),
        ("core/rollout", "from ivtp.config import PruneConfig", True),
        ("core/rollout", "from ivtp.methods.base import Plan", False),
        ("core/rollout", "def f():\n    from ivtp import plug", False),
        ("core/rollout", "import ivtp", False),
        ("cost", "from ivtp.core import schedule", True),
        ("methods/topk", "from ivtp.methods.base import Method", True),
        ("methods/topk", "from .base import Method", True),
        ("methods/topk", "from ivtp.methods.ivtp import METHOD", False),
        ("methods/topk", "from . import ivtp", False),
        ("methods/topk", "from ivtp.hosts.base import Host", False),
        ("images", "from ivtp.micro import world", False),
        ("decoder_stage", "from ivtp.methods.base import Cut", True),
        ("visualize/page", "from ivtp.visualize.text import Bars", True),
        ("visualize/page", "from ivtp.micro import world", False),
        ("evaluation/run", "from ivtp.micro import world", True),
        ("micro/train", "from ivtp.evaluation import run", False),
        ("micro/train", "import ivtp", True),
        ("cli", "if TYPE_CHECKING:\n    from ivtp.micro.world import write_samples", True),
        ("micro/train", "from ivtp.cli import main", False),
    ],
)
def test_the_rule_itself(here: str, source: str, allowed: bool) -> None:
    parts = tuple(here.split("/"))
    found = imports(source, parts[:-1])
    assert all(complaint(parts, target) is None for target in found) is allowed
