"""Conditions of all records of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colt5_bench.measuring import roofline
from colt5_bench.measuring.host import HostSeconds, measure_host
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_COLUMNS
from colt5_bench.records import environment

Tell = Callable[[str], None]
"""Shows a line to the user while a run goes on."""


def silent(text: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of all records of a run."""

    device: torch.device
    device_name: str

    environment: str
    """Key of the run's environment line."""

    ceilings: Ceilings

    host: HostSeconds | None = None
    """Speed of the host; None if it is not to be recorded."""

    max_seconds: float = 2.0
    """The longest that sampling one time column of a case may take."""

    targets: tuple[int, ...] = ()
    """Compute capabilities times ten for which kernels are compiled if there is no such GPU."""

    energy: bool = False
    """True if the energy of calls on a GPU is measured as well."""

    corpus: Path | None = None
    """Data for suites that train, if the user names it."""

    checkpoints: Path | None = None
    """Directory of the checkpoints from which training is resumed."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The time columns; the first one gives the figure of a case."""
        return GPU_COLUMNS if self.device.type == "cuda" else CPU_COLUMNS

    @classmethod
    def on(cls, device: torch.device, environment_key: str, ceilings: str = "", **options: Any) -> "Conditions":
        """The conditions on a device, which are measured before any point: one may break the context of a GPU.

        The ceilings are read from the JSON if that is for this device. The options are the other fields.
        """
        name = environment.device_name(device)
        found = roofline.read_ceilings(ceilings, name) or roofline.measure_ceilings(device)
        return cls(device, name, environment_key, found, measure_host(device), **options)
