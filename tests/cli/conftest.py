"""A checkpoint, a photo, and a way to run the command line in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import Tiny, image

from ivtp.cli import app as cli


class Result(NamedTuple):
    """What one command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def ivtp_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `ivtp ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ivtp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="session")
def tiny_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the embedded one is built: stock checkpoint, processor, CLIP side, recommendations."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    for part in tiny.clip:
        part.save_pretrained(folder / "clip")
    (folder / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "threshold": 0.06, "clip": "clip"}))
    return folder


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
