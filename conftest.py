"""Options of the whole suite: minutes-long tests on real weights run with --slow."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("temper", deadline=None)
settings.load_profile("temper")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    held = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=held)
    items[:] = [item for item in items if item not in held]
