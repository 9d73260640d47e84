"""Repositories for measurements."""

import subprocess


def git(root, *arguments):
    """Run git there with a known user; return its output."""
    command = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(root):
    """Make a directory a repository, with its whole content committed."""
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=one")
    return root
