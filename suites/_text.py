"""Bytes for training: the Python source of installed packages, or a file or folder of the user."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sympy", "torch", "triton")
"""Packages that this project or PyTorch needs, so that they are installed; `constraints.txt` pins them."""

SPLITS = {"train": 0.9, "validation": 0.05, "test": 0.05}
"""Shares of the corpus, by number of files, or by bytes of a single file."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of each split, `n`, uint8."""

    splits: dict[str, Tensor]

    digest: str
    """Hash of the content, independent of file names."""


@lru_cache(maxsize=1)
def corpus(path: Path | None) -> Corpus:
    """The corpus of a path, or of the packages.

    Files of a folder are split by a hash of their content, so that equal files are in one split and count once. A
    single file is split in its order, as enwik8 is.

    Raises:
        ValueError: the path has no text, or too little for each split.
    """
    if path is not None and path.is_file():
        content = path.read_bytes()
        splits, digest = _in_order(content), hashlib.sha256(content).hexdigest()
    else:
        splits, digest = _by_hash(_files(path))
    if empty := [name for name, part in splits.items() if not part]:
        where = "the Python source of installed packages" if path is None else path
        raise ValueError(f"--corpus must have data for each split, got {where}, where {', '.join(empty)} is empty")
    # Writable, as PyTorch requires.
    tensors = {name: torch.from_numpy(np.frombuffer(bytearray(part), np.uint8)) for name, part in splits.items()}
    return Corpus(tensors, digest[:16])


def _files(path: Path | None) -> Iterable[Path]:
    if path is None:
        specs = filter(None, map(find_spec, PACKAGES))
        folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
        return [file for folder in folders for file in folder.rglob("*.py")]
    if not path.is_dir():
        raise ValueError(f"--corpus must be an existing file or folder, got {path}")
    return filter(Path.is_file, path.rglob("*"))


def _by_hash(files: Iterable[Path]) -> tuple[dict[str, bytes], str]:
    """The content of files by split, in the order of its hashes, and one hash of all."""
    contents = {hashlib.sha256(content).digest(): content for content in map(Path.read_bytes, files)}
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for digest in sorted(contents):
        parts[split_of(digest)].append(contents[digest])
    return {name: b"".join(part) for name, part in parts.items()}, hashlib.sha256(
        b"".join(sorted(contents))
    ).hexdigest()


def split_of(digest: bytes) -> str:
    """The split of a file by the hash of its content."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return name


def _in_order(content: bytes) -> dict[str, bytes]:
    parts, start = {}, 0.0
    for name, share in SPLITS.items():
        first, last = (round(at * len(content)) for at in (start, start + share))
        parts[name], start = content[first:last], start + share
    return parts
