"""Answers kept on the disk as they come: what was answered once is not asked again, whatever killed the run.

One file a model, method and options, one line an item. A line is written whole or, where the machine dies meanwhile,
is the last one and is not read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ivtp
from ivtp.files.outputs import check_folder

Answer = dict[str, Any]
SAMPLED = 64
"""Values of each tensor that tell weights apart."""


def cache_folder() -> Path:
    """The user's cache of this library: XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivtp"


def weights_of(model: nn.Module) -> str:
    """Tells weights apart, by each tensor's name, shape and SAMPLED values of it, evenly spaced."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(SAMPLED, len(flat))
        picked = flat[torch.arange(count, device=flat.device) * max(len(flat) - 1, 0) // max(count - 1, 1)]
        digest.update(f"{name}{tuple(tensor.shape)}{picked.double().tolist()}".encode())
    return digest.hexdigest()[:16]


def source_of(method: type[Any]) -> str:
    """Tells the code of methods apart, by the files that a class, what it inherits from and its parts stand in."""
    kinds = [kind for part in getattr(method, "parts", (method,)) for kind in part.__mro__ if kind is not object]
    files = dict.fromkeys(Path(inspect.getfile(kind)) for kind in kinds)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def file_of(value: object) -> str:
    """Tells what a file or folder holds apart from what it held before; of anything else its text."""
    path = Path(value) if isinstance(value, str) else None
    if path is None or not path.exists():
        return str(value)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{value} {hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


class Answers:
    """What one model with one method and options answered to items of tasks."""

    def __init__(self, folder: Path, run: Mapping[str, Any], rank: int = 0) -> None:
        """`run` is all that an answer depends on; each of several processes (`rank`) writes a file of its own."""
        check_folder(folder, "cache")
        folder.mkdir(parents=True, exist_ok=True)
        named = json.dumps({"ivtp": ivtp.__version__, **run}, sort_keys=True, default=str)
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        self._known: dict[str, Answer] = {}
        for file in sorted(folder.glob(f"{digest}.*.jsonl")):
            self._read(file)
        self._file = folder / f"{digest}.{rank}.jsonl"
        unfinished = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        self._write("\n" * unfinished + json.dumps({"run": json.loads(named)}))  # behind what a killed process left

    def get(self, item: str) -> Answer | None:
        """The answer to an item; None where it was not asked yet."""
        return self._known.get(item)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep the answers of a batch: all of them or, if this process is killed meanwhile, none or some."""
        self._known.update(answers)
        self._write("\n".join(json.dumps({"item": item, **answer}) for item, answer in answers.items()))

    def _write(self, lines: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(lines + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, file: Path) -> None:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                answer = json.loads(line)
            except ValueError:  # the line in which a process was killed
                continue
            if "item" in answer:
                self._known[answer.pop("item")] = answer
