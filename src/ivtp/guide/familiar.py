"""What a checkpoint was made for: a note where a picture is something else, for those that bring a rule for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.errors import LoadError
from ivtp.files.sidecar import local_folder, read_json, sidecar

KEY = "familiar"
"""In `ivtp.json`: the file of the rule, beside it."""


@dataclass(frozen=True)
class Familiar:
    """A linear rule on the vision tower's pooled output: above zero, a picture is none that the model knows."""

    weight: Tensor  # (D_vision,)
    bias: float
    note: str

    @classmethod
    def read(cls, folder: Path | None) -> Familiar | None:
        """The rule of a checkpoint; None without one. Raises `LoadError` for a file that holds none."""
        named = sidecar(folder).get(KEY)
        if folder is None or named is None:
            return None
        content = read_json(folder / str(named))
        try:
            return cls(torch.tensor(content["weight"], dtype=torch.float32), float(content["bias"]), content["note"])
        except (KeyError, TypeError, ValueError):
            raise LoadError(f"{folder / str(named)} holds no rule with weight, bias and note; repair it") from None

    def is_strange(self, pooled: Tensor) -> bool:
        """Whether one of the images, whose pooled outputs are (I, D_vision), is none that the model knows."""
        return bool((pooled.detach().float().cpu() @ self.weight + self.bias > 0).any())


@contextmanager
def watching(model: nn.Module, tower: nn.Module) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Gives a function that says, after a prefill of `model`, what to know of its images; of most checkpoints nothing.

    The vision tower's output is read as it comes by, with all tokens or with those that a method kept.
    """
    rule = Familiar.read(local_folder(getattr(model, "name_or_path", None)))
    if rule is None:
        yield tuple
        return
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[:] = [output.pooler_output]

    handle = tower.register_forward_hook(look)
    try:
        yield lambda: (rule.note,) if seen and rule.is_strange(seen[0]) else ()
    finally:
        handle.remove()
