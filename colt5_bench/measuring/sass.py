"""Facts about a compiled kernel from NVIDIA's disassembler: registers, and instructions by class."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import triton

from colt5_bench.records.environment import cores

CLASSES = {
    "exponential": "MUFU.EX2",
    "special": "MUFU",
    "conversion": "F2F F2I I2F F2FP I2FP FRND",
    "matrix": "HMMA HGMMA IMMA IGMMA QGMMA DMMA",
    "fp32": "FADD FMUL FFMA FMNMX FSET FSETP FSEL FCHK FSWZADD",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "half": "HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2",
    "shuffle": "SHFL REDUX VOTE MATCH",
    "shared": "LDS STS LDSM STSM ATOMS LDGSTS",
    "local": "LDL STL",
    "global_load": "LDG LD",
    "global_store": "STG ST",
    "atomic": "ATOM ATOMG RED",
    "barrier": "BAR WARPSYNC BSYNC BSSY DEPBAR",
    "branch": "BRA BRX JMP CALL RET EXIT",
}
"""Mnemonics by class, with any modifiers; the first class that matches counts. Loads and stores of global memory are
divided by their width in bits. The rest is `integer`: arithmetic on integers and addresses, moves and predicates."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128)\b")


class Usage(NamedTuple):
    """Registers and memory of one thread of a kernel."""

    registers: int
    spilled_bytes: int


def usage(cubin: bytes) -> Usage:
    """Registers and local memory of a thread. A kernel calls no function, so its stack has only spills."""
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _inspect(cubin, "--dump-resource-usage")))
    return Usage(int(figures["REG"]), int(figures["STACK"]) + int(figures["LOCAL"]))


def instructions(cubins: Iterable[bytes]) -> list[dict[str, int]]:
    """Number of instructions of each class in each kernel, counted once each. Empty classes are left out. Kernels are
    disassembled in parallel, because the disassembler takes most of its time to start."""
    with ThreadPoolExecutor(cores()) as pool:
        return [*pool.map(_counts, cubins)]


def _counts(cubin: bytes) -> dict[str, int]:
    counts = Counter(map(_class_of, _INSTRUCTION.findall(_inspect(cubin, "--dump-sass"))))
    return dict(sorted(counts.items()))


@cache
def _class_of(mnemonic: str) -> str:
    for name, members in CLASSES.items():
        if any(mnemonic == member or mnemonic.startswith(member + ".") for member in members.split()):
            if not name.startswith("global"):
                return name
            width = _WIDTH.search(mnemonic)
            return f"{name}_{width[1] if width else 32}"
    return "integer"


@lru_cache(maxsize=256)
def _inspect(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
