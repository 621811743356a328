"""Fixtures that every room shares: one tiny model family, built once, handed out as fresh copies."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Weights, processor and CLIP side of the tiny LLaVA; `tiny.model()` copies them."""
    return Tiny()
