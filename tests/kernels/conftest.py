"""Settings and fixtures for tests of kernels."""

from types import ModuleType

import pytest

import tests.kernels.interpreter  # noqa: F401  (makes Triton's interpreter faster)
from kernels._common.launch import LAUNCHERS
from kernels._common.plans import PLANNERS


@pytest.fixture
def set_sizes(monkeypatch):
    """Set sizes with which launchers plan, so that a few entries take the path of many, and forget earlier plans."""

    def forget():
        for planner in PLANNERS:
            planner.cache_clear()
        for launcher in LAUNCHERS:
            launcher.forget()

    def set_sizes(module: ModuleType, **sizes: int) -> None:
        forget()
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)

    yield set_sizes
    forget()
