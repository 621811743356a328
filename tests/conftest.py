"""Fixtures that every room shares: one tiny model family, built once, handed out as fresh copies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is on no disk is refused at once

import pytest
import torch
from hypothesis import settings
from packages import Packages
from PIL import ImageFile
from tiny import Tiny

from ivtp.hosts.llava import HOST

torch.set_num_threads(1)
# a busy machine must not fail a property, and the same examples on every machine make a failure repeatable
settings.register_profile("ivtp", deadline=None, derandomize=True)
settings.load_profile("ivtp")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two threads on a busy core wait for each other, and a command that a test runs may leave more behind."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def strict_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, once imported, lets Pillow read truncated files in the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Weights, processor and CLIP side of the tiny LLaVA; `tiny.model()` copies them."""
    return Tiny()


@pytest.fixture(scope="session")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the embedded one is built: stock checkpoint, processor, CLIP side, recommendations."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    for part in tiny.clip:
        part.save_pretrained(folder / "clip")
    (folder / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "threshold": 0.06, "clip": "clip"}))
    return folder


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """`packages.install(...)` puts a package that adds methods or families where Python finds it, for one test."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        installer = Packages(folder)
        yield installer
    installer.uninstall()


@pytest.fixture(scope="session")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's sizes as a CONFIG.json."""
    folder = tmp_path_factory.mktemp("geometry")
    HOST.tiny()[0].config.save_pretrained(folder)
    return folder / "config.json"
