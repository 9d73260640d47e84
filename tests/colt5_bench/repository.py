"""Repositories to measure in."""

import subprocess


def git(root, *arguments):
    """Run git there, as somebody whom it knows; its output."""
    command = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(root):
    """Make a directory a repository, with all that is in it committed."""
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=one")
    return root
