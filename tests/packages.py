"""Packages that look installed: modules and a `*.dist-info` in a folder on `sys.path`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from ivtp import registry

_REMEMBERED = (
    *(registry.names_in, registry._own_names, registry._installed, registry._all_that_load, registry._composed),
)


class Packages:
    """Installs packages for one test; `forget` must follow it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: list[str] = []
        forget()

    def install(self, name: str, files: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]) -> None:
        """A package of these source files, with `entry_points` as in {"ivtp.methods": {"middle": "middle:Middle"}}."""
        for file, source in files.items():
            (self.folder / file).write_text(source, encoding="utf-8")
            self._modules.append(file.removesuffix(".py"))
        info = self.folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        lines = [
            line
            for group, entries in entry_points.items()
            for line in (f"[{group}]", *(f"{entry} = {target}" for entry, target in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        importlib.invalidate_caches()
        forget()

    def uninstall(self) -> None:
        """Forget all of them."""
        for module in self._modules:
            sys.modules.pop(module, None)
        forget()


def forget() -> None:
    """Empty the registry's memory."""
    for function in _REMEMBERED:
        function.cache_clear()
