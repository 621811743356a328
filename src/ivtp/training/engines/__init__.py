"""Configurations of FSDP2 and of DeepSpeed, in their own formats, as files beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivtp.errors import ConfigError

FOLDER = Path(__file__).parent
ENGINES = ("ddp", *sorted(file.stem for file in FOLDER.glob("*.json")))
"""Names of what shares a model out among devices; "ddp" has a whole copy on each."""


def engine_arguments(name: str) -> dict[str, Any]:
    """The fields of `TrainingArguments` for an engine: a name, or a file of your own, of FSDP where it has a version.

    Raises `ConfigError`.
    """
    if name == "ddp":
        return {}
    file = FOLDER / f"{name}.json" if name in ENGINES else Path(name)
    if not file.is_file():
        raise ConfigError(f"--engine {name} is unknown; use {', '.join(ENGINES)}, or a JSON file of FSDP or DeepSpeed")
    from ivtp.files.sidecar import read_json

    content = read_json(file)
    return {"fsdp": True, "fsdp_config": content} if "version" in content else {"deepspeed": str(file)}
