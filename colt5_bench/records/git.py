"""git, asked about the directory that is named and no other."""

import os
import subprocess
from pathlib import Path

KEPT = ("GIT_CONFIG", "GIT_EXEC_PATH")
"""Beginning of variables that say how git works, among them which repositories it trusts. All other ones of git may
lead it to another repository, another index or another answer."""


def environment() -> dict[str, str]:
    """The variables of this process without those that lead git elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name.startswith(KEPT)}


def run(directory: Path, *arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run git in a directory. Its messages are in English, and bytes that are no text become surrogates.

    Raises:
        FileNotFoundError: there is no git.
        subprocess.TimeoutExpired: it took longer than `seconds`.
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
