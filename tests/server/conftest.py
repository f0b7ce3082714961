from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import Running, make_engine, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(make_engine()) as found:
        yield found
