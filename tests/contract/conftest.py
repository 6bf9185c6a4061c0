"""Methods from outside enter the registry for the tests that bring them, and leave it again."""

import importlib
from collections.abc import Iterator

import pytest

from deltatune.core.method import METHODS, Method


def registered(module: str) -> Iterator[dict[str, type[Method]]]:
    """The named methods that `module` defines, in the registry until the generator ends."""
    members = vars(importlib.import_module(module)).values()
    classes = [m for m in members if isinstance(m, type) and issubclass(m, Method) and m.__module__ == module]
    found = {cls.name: cls for cls in classes if cls.name}
    METHODS.update(found)
    yield found
    for name in found:
        del METHODS[name]


@pytest.fixture
def toy() -> Iterator[type[Method]]:
    """The toy method, registered by its import."""
    for found in registered("toy"):
        yield found["toy"]


@pytest.fixture(scope="module")
def broken() -> Iterator[dict[str, type[Method]]]:
    """The deliberately broken methods, by name."""
    yield from registered("sabotage")
