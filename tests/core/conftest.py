"""The toy methods enter the registry for the tests that name them, and leave it again."""

import importlib
from collections.abc import Iterator

import pytest

from deltatune.core.method import METHODS, Method


@pytest.fixture(scope="module")
def toys() -> Iterator[dict[str, type[Method]]]:
    """The methods of `toys.py`, by name."""
    module = importlib.import_module("toys")
    members = [m for m in vars(module).values() if isinstance(m, type) and issubclass(m, Method) and m.name]
    found = {m.name: m for m in members}
    METHODS.update(found)
    yield found
    for name in found:
        del METHODS[name]
