"""A model that is timed in milliseconds, as the benchmark sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivtp.benchmark.asked import Asked
from ivtp.benchmark.models import Subject
from ivtp.hosts.llava import HOST
from ivtp.plug import find_host


@pytest.fixture
def subject() -> Subject:
    """The host's tiny random model, without a processor."""
    model, _ = HOST.tiny()
    return Subject(model, find_host(model), options={"guide": "text", "llm_layers": 6})


@pytest.fixture
def ask(geometry: Path) -> Any:
    """Asks for the fewest runs of the tiny geometry; keywords change that."""

    def asked(**changes: Any) -> Asked:
        few = {"keeps": (6,), "texts": (14,), "tokens": 2, "repeats": 2, "threads": 1, "options": {"llm_layers": 6}}
        return Asked(**{"geometry": str(geometry), **few, **changes})

    return asked
