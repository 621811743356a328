"""What `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """A function on texts, clocks and Python numbers, which Dynamo would warn about and could not compile."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch leaves it so
    return disabled
