"""A checkpoint, a photo, and a way to run the command line in this process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from terminal import Result, Run
from tiny import image

from ivtp.cli import app as cli
from ivtp.cli import door


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs an app of commands, or a function, with arguments, as its program does, but in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def command(app: Callable[[], Any], *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            door.run(app)
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr())

    return command


@pytest.fixture
def run(call: Callable[..., Result]) -> Run:
    """Runs `ivtp ARGUMENTS` in this process."""
    return functools.partial(call, cli.app)


@pytest.fixture
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file, in a folder of its own."""
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    image(3).save(file)
    return file


@pytest.fixture
def few(checkpoint: Path) -> tuple[object, ...]:
    """Options for a short answer of the tiny model."""
    return "--model", checkpoint, "--keep", 8, "--max-new-tokens", 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images, the middle one broken, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image(3).save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    image(4).save(folder / "c.jpg")
    (folder / "readme.txt").write_text("no image either")
    return folder
