"""Markers decide which tests are run."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

MARKERS = ("alone", "compiled", "gpu")
MARKED = [marked for number in range(len(MARKERS) + 1) for marked in combinations(MARKERS, number)]


def skipped(marked, workers):
    return ("gpu" in marked and not torch.cuda.is_available()) or (
        "alone" in marked and "compiled" not in marked and workers > 1
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_a_test_is_skipped_where_it_cannot_run(workers, tmp_path):
    """In one of several processes, or in the only one."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_marked.py").write_text(
        "import pytest\n"
        + "".join(
            "".join(f"@pytest.mark.{marker}\n" for marker in marked) + f"def test_{'_'.join(marked)}(): pass\n"
            for marked in MARKED
        )
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_XDIST_WORKER_COUNT": str(workers), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    for marked in MARKED:
        outcome = "SKIPPED" if skipped(marked, workers) else "PASSED"
        assert f"test_{'_'.join(marked)} {outcome}" in run.stdout, run.stdout + run.stderr
