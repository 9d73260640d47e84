"""What tests of kernels share."""

from types import ModuleType

import pytest

import tests.kernels.interpreter  # noqa: F401  (makes Triton's interpreter faster)
from kernels._common.launch import LAUNCHERS
from kernels._common.plans import PLANNERS


@pytest.fixture
def set_sizes(monkeypatch):
    """Set sizes that launchers plan with, so that a few entries go the way of many, and forget what was planned."""

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
