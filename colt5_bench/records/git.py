"""Calls of git for a given directory only."""

import os
import subprocess
from pathlib import Path

KEPT = ("GIT_CONFIG", "GIT_EXEC_PATH")
"""Prefix of variables that configure git, including the repositories that it trusts. Other variables of git may direct
it to another repository or another index."""


def environment() -> dict[str, str]:
    """The variables of this process without those that direct git elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name.startswith(KEPT)}


def run(directory: Path, *arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run git in a directory. Its messages are in English, and bytes that are not text become surrogates.

    Raises:
        FileNotFoundError: git is not installed.
        subprocess.TimeoutExpired: git took longer than `seconds`.
    """
    done = subprocess.run(
        ["git", "--no-replace-objects", "-C", str(directory), *arguments],
        env={**environment(), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=seconds,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))
