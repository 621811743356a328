"""Every registered family: a test that takes `family` runs for each of them, from the day its file exists."""

from __future__ import annotations

import pytest
from family import Family

import ivtp


@pytest.fixture(scope="session", params=ivtp.list_hosts())
def family(request: pytest.FixtureRequest) -> Family:
    """Its weights, processor and CLIP side are made once."""
    return Family(str(request.param))
