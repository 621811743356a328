"""What is to be measured: a model, a method and tasks. Nothing here needs lmms-eval."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is to be measured; two runs of the same may be compared."""

    model: str
    tasks: tuple[str, ...]
    method: str = "ivtp"
    keep: int | str = 64
    limit: int | None = None
    options: Mapping[str, Any] | None = None
    batch_size: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    clip: str | None = None
    include_path: tuple[str, ...] = ()
    """Folders with further tasks."""
    answers: str | None = None
    """Folder in which they are kept from run to run."""

    @property
    def name(self) -> str:
        """Of its files: the same for the same run, whatever batches and device it ran on."""
        options = sorted((self.options or {}).items())
        same = json.dumps([self.model, self.tasks, self.limit, self.dtype, options, *filter(None, [self.clip])])
        digest = hashlib.sha256(same.encode()).hexdigest()[:8]
        return f"{Path(self.model).name}-{self.method}{'' if self.method == 'none' else f'-{self.keep}'}-{digest}"

    @property
    def full(self) -> Asked:
        """The same of the untouched model."""
        return replace(self, method="none", options=None, clip=None)


@dataclass(frozen=True)
class Run:
    """What differs between the rows of a table."""

    method: str
    keep: int | str = 64
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    name: str = ""
    """Of its row; empty: the method's."""

    def asked(self, of: Asked) -> Asked:
        """Of the same model and tasks."""
        if self.method == "none":
            return of.full
        return replace(of, method=self.method, keep=self.keep, options={**(of.options or {}), **self.options})
