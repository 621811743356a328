"""What a wheel holds, by what pyproject.toml says: building one takes minutes."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_that_the_package_reads_is_in_the_wheel() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    package = ROOT / "src" / "ivtp"
    packed = {file for pattern in told["tool"]["setuptools"]["package-data"]["ivtp"] for file in package.glob(pattern)}
    there = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert not sorted(str(file) for file in there - packed if file.suffix != ".py")


def test_the_extra_for_evaluations_draws_their_figures() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert any(name.startswith("matplotlib") for name in told["project"]["optional-dependencies"]["eval"])
