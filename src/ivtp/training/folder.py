"""The folder of a run: what the run was asked, and where one that was killed goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ivtp.errors import ConfigError, OutputError, short_reason
from ivtp.files.sidecar import read_json

ASKED = "training.json"
"""What the run was asked, which has to be the same when it is resumed."""
_MAY_CHANGE = frozenset({"resume", "report_to", "out"})


def where_to_go_on(folder: Path, asked: Mapping[str, Any], *, resume: bool) -> Path | None:
    """The last whole checkpoint; None from the start. Raises `ConfigError` for a folder that holds another run."""
    before = read_json(folder / ASKED)
    if before and not resume:
        raise ConfigError(f"--out {folder} holds a run already; go on with it by --resume, or name another folder")
    if not before:
        return None
    other = next((name for name in asked if name not in _MAY_CHANGE and asked[name] != before.get(name)), None)
    if other is not None:
        raise ConfigError(
            f"--resume goes on with what was asked: {other} was {before.get(other)!r} and is {asked[other]!r}; "
            "ask the same again, or name another --out"
        )
    return last_checkpoint(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole: the trainer's state is written last, each rank's own before."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8")):
                return path
        except (OSError, ValueError):
            continue
    return None


def remember(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write what was asked, once every rank has looked into the folder. Raises `OutputError`.

    Needs the processes that `TrainingArguments` sets up.
    """
    PartialState().wait_for_everyone()
    if os.environ.get("RANK", "0") == "0":
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ASKED).write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--out {folder} cannot be written to ({short_reason(error)})") from None
