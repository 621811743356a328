"""What lies beside a checkpoint's weights: `ivtp.json`, with recommended options and the folder of its CLIP model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivtp.errors import LoadError, short_reason

MICRO = Path(__file__).parents[1] / "micro" / "assets"
"""The folder of the embedded model."""


SIDECAR = "ivtp.json"
COMPRESSOR = "compressor"
"""In `ivtp.json`: the name and the tokens of the compressor that takes the projector's place."""
COMPRESSOR_WEIGHTS = "compressor.safetensors"
"""Beside it: the compressor's weights."""
TRAINED = "trained"
"""In `ivtp.json`: with which method, `keep` and options the checkpoint was trained, by `ivtp train`."""


def local_folder(name: object) -> Path | None:
    """The folder that a model's name means on this machine; None for a hub id, or no name at all."""
    folder = Path(str(name or ""))
    return folder if folder.parts and folder.is_dir() else None


def sidecar(folder: Path | None) -> dict[str, Any]:
    """The `ivtp.json` of a checkpoint: recommended options, and `clip`, the folder of its CLIP model; or nothing.

    Raises `LoadError` for a file that cannot be read or holds something else.
    """
    return read_json(folder / SIDECAR) if folder else {}


def recommended(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint recommends in its `ivtp.json`; methods take those that they know."""
    return {name: value for name, value in sidecar.items() if name not in ("clip", COMPRESSOR)}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read as JSON ({short_reason(error)}); repair or remove it") from None
    if not isinstance(content, dict):
        raise LoadError(f"{file} holds a {type(content).__name__}, no JSON object; repair or remove it")
    return content
