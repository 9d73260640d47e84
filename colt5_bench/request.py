"""Options of a run, declared once for the command line and for pytest."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colt5_bench.selection import PRESETS, WHOLE, Guest, SelectionError, Shard, parse_seconds, split_guests

TARGETS = (80, 86, 89, 90, 100, 120)
"""GPUs that kernels can be compiled for, by compute capability times ten: Ampere, Ada, Hopper and Blackwell."""

TIME_LIMIT = 1800.0
"""Most seconds for a case and direction in its own process, unless an option sets another limit.
`torch.compile` unrolls iterations for minutes, and the fp64 truth of the largest cases takes as long."""

REPORT, NO_REPORT = "COLT5_BENCH_REPORT", "0"
"""An environment variable, and its value for a run that writes only records, without plots and page."""

CEILINGS = "COLT5_BENCH_CEILINGS"
"""An environment variable with the ceilings of the device as JSON, for a run that need not measure them."""


def _option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, settings


_OPTIONS = {
    "suite": _option(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="a suite by name, all for every suite, or the path of a Python file with your own suite; may be repeated",
    ),
    "preset": _option(
        "--preset", choices=PRESETS, default="default", help="how many cases, of which sizes (default: %(default)s)"
    ),
    "impl": _option(
        "--impl",
        action="append",
        default=[],
        metavar="NAME",
        help="an implementation by name; may be repeated (default: all). NAME=file.py:FUNCTION or NAME=module:FUNCTION "
        "adds your own",
    ),
    "cases": _option(
        "-k",
        "--cases",
        default="",
        metavar="EXPR",
        help="only cases whose id contains this, such as n=4096; terms are combined by and, or, not and ( )",
    ),
    "device": _option(
        "--device",
        default="auto",
        help="auto (a GPU if there is one), cpu, cuda or cuda:<index> (default: auto)",
    ),
    "out": _option(
        "--out", type=Path, metavar="DIR", help="directory for the results (default: a new one under reports/)"
    ),
    "resume": _option(
        "--resume",
        action="store_true",
        help="complete the run in --out, begun with the same options; records with an error are measured again",
    ),
    "shard": _option(
        "--shard",
        default=str(WHOLE),
        metavar="I/N",
        help="measure shard I of N of the cases; `merge` joins the results of all shards",
    ),
    "isolate": _option(
        "--isolate",
        action="store_true",
        help="measure each case in its own process, so that the run survives crashes and hangs; a run without it "
        "switches to this if its CUDA context breaks",
    ),
    "time_limit": _option(
        "--time-limit",
        metavar="SECONDS",
        help=f"end the process of a case after this and record an error (default: {TIME_LIMIT:g}); implies --isolate",
    ),
    "energy": _option(
        "--energy",
        action="store_true",
        help="also measure the energy of each call on a GPU, with NVML; takes 4 seconds per call",
    ),
    "corpus": _option(
        "--corpus",
        type=Path,
        metavar="PATH",
        help="file or folder with the data of suites that train (default: the Python source of installed packages)",
    ),
    "compile_for": _option(
        "--compile-for",
        action="append",
        default=[],
        type=int,
        choices=TARGETS,
        metavar="SM",
        help="without a GPU, compile kernels for this compute capability and record facts such as registers: "
        f"{', '.join(map(str, TARGETS))}; may be repeated",
    ),
}

SELECTING = ("suite", "impl", "cases")
"""Options that select from results."""

MEASURING = (
    *("preset", "impl", "cases", "device", "out", "resume", "shard", "isolate", "time_limit", "energy", "corpus"),
    "compile_for",
)
"""Options of a run, except the suites."""


def declare(add: Callable[..., object], names: Iterable[str]) -> None:
    """Declare options by their names with `add`, as `argparse.ArgumentParser.add_argument` does."""
    for name in names:
        flags, settings = _OPTIONS[name]
        add(*flags, **settings)


@dataclass(frozen=True)
class Request:
    """Options of a run; the help of each option explains it."""

    device: str = "auto"
    preset: str = "default"
    implementations: tuple[str, ...] = ()
    """Names of the implementations to measure; empty for all."""

    guests: tuple[Guest, ...] = ()
    cases: str = ""
    points: tuple[tuple[str, str], ...] = ()
    """Cases and directions, among those that `cases` selects; empty for all."""

    shard: Shard = WHOLE
    out: Path | None = None
    resume: bool = False
    isolate: bool = False
    time_limit: float | None = None
    energy: bool = False
    corpus: Path | None = None
    """Data for suites that train, instead of their default."""

    targets: tuple[int, ...] = ()
    """GPUs for which kernels are compiled if there is no GPU."""

    ceilings: str = ""
    """Ceilings from an earlier run on this machine, as JSON."""

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise SelectionError("--resume needs --out DIR, the directory of the run to complete.")

    @classmethod
    def of(cls, options: Namespace) -> "Request":
        """The request of parsed options.

        Raises:
            SelectionError: an option has a value that is not allowed.
        """
        names, guests = split_guests(options.impl)
        return cls(
            device=options.device,
            preset=options.preset,
            implementations=tuple(names),
            guests=tuple(guests),
            cases=options.cases,
            shard=Shard.parse(options.shard),
            # Measured code may change the current directory.
            out=None if options.out is None else options.out.absolute(),
            resume=options.resume,
            isolate=options.isolate,
            time_limit=None if options.time_limit is None else parse_seconds(options.time_limit),
            energy=options.energy,
            corpus=None if options.corpus is None else options.corpus.absolute(),
            targets=tuple(options.compile_for),
            # Read before suites are loaded, because measured code must not set them.
            ceilings=os.environ.get(CEILINGS, ""),
        )

    def arguments(self) -> list[str]:
        """The options that make this request again, except `--out` and `--resume`."""
        return [
            *("--preset", self.preset, "--device", self.device),
            *(f"--impl={name}" for name in self.implementations if name not in {each.name for each in self.guests}),
            *(f"--impl={guest}" for guest in self.guests),
            *(["--cases", self.cases] if self.cases else []),
            *(["--shard", str(self.shard)] if self.shard != WHOLE else []),
            *(["--isolate"] if self.isolate else []),
            *(["--time-limit", f"{self.time_limit:g}"] if self.time_limit is not None else []),
            *(["--energy"] if self.energy else []),
            *(["--corpus", str(self.corpus)] if self.corpus is not None else []),
            *(f"--compile-for={target}" for target in self.targets),
        ]

    def of_results(self, suite: str) -> dict[str, object]:
        """Options that determine the expected records, as written to the results."""
        return {
            "suite": suite,
            "preset": self.preset,
            "implementations": list(self.implementations),
            "cases": self.cases,
            "shard": str(self.shard),
            "targets": list(self.targets),
            **({"points": [list(point) for point in self.points]} if self.points else {}),
        }
