"""Settings that all tests share: reproducible numbers, and conditions of tests."""

import gc
import os
import signal
from collections.abc import Generator
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
"""Number of processes that run tests in parallel, by `-n`."""

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    # Commands started by tests also have one thread.
    os.environ["OMP_NUM_THREADS"] = "1"

# A runner in the background may ignore signals, as with nohup: the commands that tests start would inherit that.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)

# PyTorch's profiler reads its level of messages on first use in a process. Otherwise a test that allows messages would
# cause messages in the output of another one. Commands started by tests do not have this setting.
with patch.dict(os.environ, KINETO_LOG_LEVEL="6"), torch.autograd.profiler.profile():
    pass

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude tests and modules from garbage collection, because they all stay and would be scanned again and again.

    A measurement collects garbage too, each time: with thousands of tests in memory that takes 0.4 s. Otherwise
    collections may be less frequent: tracing a layer makes many objects that stay until the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(20_000)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out compile checks under the interpreter, which has no compiler, and skip tests whose conditions are not
    met."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        left_out = [item for item in items if item.get_closest_marker("compiled")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # Tests of the compiler measure no times.
        if item.get_closest_marker("alone") and not item.get_closest_marker("compiled") and WORKERS > 1:
            item.add_marker(pytest.mark.skip(reason="runs alone, without -n"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
