"""Launch settings of kernels, which depend only on sizes and are checked against the limits of a GPU."""

from collections.abc import Callable, Mapping
from functools import cache, lru_cache, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec

import triton

MOST_PROGRAMS = 2**31 - 1
"""Most programs of a launch, in the first dimension of a grid. The limit of the other two dimensions is 65535."""

MOST_THREADS = 1024
"""Most threads of a program."""

REGISTERS = 65536
"""Registers of a multiprocessor, and so the most of a program."""

MOST_REGISTERS = 255
"""Most registers of a thread."""

LARGEST = 2**30
"""Largest size that kernels count in 32 bits, with room for a tile that extends beyond the end. Numbers of rows and
sequences may be larger."""

P = ParamSpec("P")


class Plan(NamedTuple):
    """Launch settings of a kernel, which depend only on sizes."""

    programs: int

    settings: Mapping[str, Any]
    """Tile sizes, and options of the launch."""

    pieces: int = 1
    """Number of pieces of a row, or of anything else that several programs share."""

    @property
    def grid(self) -> tuple[int]:
        """All programs in the first dimension, because the limit of the other two is too low."""
        return (self.programs,)


PLANNERS: list[Any] = []
"""All planners, for tests that try all of their plans."""


def planner(function: Callable[P, Plan]) -> Callable[P, Plan]:
    """Cache the plans of a pure function of sizes, and refuse a plan that no GPU can launch."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Plan:
        sizes = {**dict(zip(names, args, strict=False)), **kwargs}
        check_sizes(sizes)
        plan = function(*args, **kwargs)
        check_plan(plan, sizes)
        return plan

    remembering: Any = lru_cache(maxsize=4096)(checked)
    PLANNERS.append(remembering)
    return remembering


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError that names a size above `LARGEST`."""
    for name, size in sizes.items():
        if name not in ("n_rows", "batch", "n_entries", "total") and size > LARGEST:
            raise NotImplementedError(f"{name} must be at most {LARGEST} for a kernel, got {size}")


def check_plan(plan: Plan, sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError if a plan for these sizes exceeds a limit of all GPUs."""
    threads = 32 * plan.settings.get("num_warps", 4)
    # Without `maxnreg`, the assembler may give a thread its share of all registers.
    registers = plan.settings.get("maxnreg", most_registers(threads // 32))
    wanted = {
        "programs": (plan.programs, MOST_PROGRAMS),
        "threads of a program": (threads, MOST_THREADS),
        "registers of a thread": (registers, MOST_REGISTERS),
        "registers of a program": (threads * registers, REGISTERS),
    }
    for what, (number, most) in wanted.items():
        if number > most:
            given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise NotImplementedError(f"{what} must be at most {most} on a GPU, got {number} for {given}")


def most_registers(num_warps: int) -> int:
    """Most registers of a thread if only one program runs on a multiprocessor."""
    return min(MOST_REGISTERS, REGISTERS // (32 * num_warps))


@cache
def tile_settings(entries: int, in_thread: int) -> Mapping[str, int]:
    """Launch settings for rows of up to `entries`, with `in_thread` of them in each thread.

    At least 4 threads share a row. If a row needs fewer threads than a warp has, several rows share the warp.
    """
    threads = max(triton.next_power_of_2(entries) // in_thread, 4)
    width = 4 * threads
    return {
        "REPEATS": triton.cdiv(triton.next_power_of_2(entries), width),
        "ROWS": max(32 // threads, 1),
        "WIDTH": width,
        "num_warps": max(threads // 32, 1),
    }


def registers_of_addresses(tile: Mapping[str, int], aligned: bool) -> int:
    """Additional registers of a thread if rows are not aligned, because each entry then has its own address.

    A program of several rows or of eight warps gets more. With eight warps, no second program fits in any case.
    """
    if aligned:
        return 0
    return 16 if tile["ROWS"] == 1 and tile["num_warps"] < 8 else 96


def _feature_tile(d: int) -> dict[str, int]:
    """Launch settings for tiles of whole rows of d features.

    A tile has 2048 entries, 16 in each thread, or a single longer row.
    """
    block = triton.next_power_of_2(d)
    return {"ROWS": max(2048 // block, 1), "BLOCK_D": block, "num_warps": max(block, 2048) // 512}


@planner
def plan_rows(n_rows: int, d: int) -> Plan:
    """A program for each tile of rows of d features."""
    tile = _feature_tile(d)
    return Plan(triton.cdiv(n_rows, tile["ROWS"]), tile)


@planner
def plan_sweep(n_rows: int, d: int, available: int) -> Plan:
    """Eight programs per multiprocessor, which loop over the tiles of all rows and add them up."""
    tile = _feature_tile(d)
    return Plan(min(triton.cdiv(n_rows, tile["ROWS"]), 8 * available), tile)


@planner
def plan_wide_sweep(n_rows: int, d: int, available: int) -> Plan:
    """The plan of `plan_sweep` for kernels that need more registers per entry.

    A thread has half as many entries, and there are at most half as many programs.
    """
    sweep = plan_sweep(n_rows, d, available)
    tile = {**sweep.settings, "num_warps": 2 * sweep.settings["num_warps"]}
    return Plan(min(sweep.programs, 4 * available), tile)
