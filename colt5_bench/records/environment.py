"""Environment of a run: the machine and the versions, without names of its owner or paths."""

import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import pynvml
import torch

PEERS = (
    *("adasplash", "attn-gym", "colt5-attention", "entmax", "flash-attn", "flash-linear-attention"),
    *("flashinfer-python", "liger-kernel", "quack-kernels", "softtorch"),
)
"""Optional packages that have implementations."""

PACKAGES = ("numpy", "pytest-benchmark", *PEERS)
"""Packages whose versions may affect a result, in addition to torch and Triton."""

THROTTLE_REASONS = {
    "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sw_thermal_slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal_slowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake_slowdown": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
"""Reasons why a GPU may run below its full clock: NVML's bits by a name for the record."""


@dataclass(frozen=True)
class GpuState:
    """Clock, throttling, power and temperature of a GPU at one moment."""

    sm_clock_mhz: int

    reasons: tuple[str, ...]
    """Names from `THROTTLE_REASONS`, of those that are active."""

    power_w: float | None = None
    temperature_c: float | None = None

    @property
    def throttled(self) -> bool:
        """True if times taken now are not valid. The power limit is normal for a busy GPU, and no reason."""
        return any(reason != "sw_power_cap" for reason in self.reasons)


def gpu_state(device: torch.device) -> GpuState | None:
    """The present state of a CUDA device; None for another device, or without NVML."""
    handle = _nvml_handle(device)
    if handle is None:
        return None
    try:
        clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        active = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError:
        return None
    reasons = tuple(name for name, bit in THROTTLE_REASONS.items() if active & bit)
    answers = _ask(
        {
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    )
    return GpuState(clock, reasons, **answers)


class InstrumentError(RuntimeError):
    """NVML cannot measure the energy or the power of a device; the message is for the user."""


class EnergyMeter:
    """NVML's energy counter and power sensor of a GPU.

    Raises:
        InstrumentError: the device does not have them.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = _nvml_handle(device)
        if self._handle is None:
            raise InstrumentError(f"NVML does not find the GPU {device}")
        self.joules()
        self.watts()

    def joules(self) -> float:
        """Reading of the counter, whose zero is arbitrary."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except pynvml.NVMLError as error:
            raise InstrumentError(f"NVML has no energy counter for this GPU: {error}") from error

    def watts(self) -> float:
        """Power at this moment. NVML also has a mean over a second, which is not used."""
        (found,) = pynvml.nvmlDeviceGetFieldValues(self._handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
        if found.nvmlReturn != pynvml.NVML_SUCCESS:
            raise InstrumentError(f"NVML has no power sensor for this GPU: {pynvml.NVMLError(found.nvmlReturn)}")
        return float(found.value.uiVal) / 1e3


def device_name(device: torch.device) -> str:
    """Model name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def describe(device: torch.device) -> dict[str, object]:
    """The environment of a run on a device, ready for JSON. Entries that do not apply or cannot be found out are None.

    Clocks are in MHz, memory and cache in bytes, power in watts. The command line is given without directories.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "licences": {name: _licence(name) for name in PEERS if _version(name)},
        "gpu": _gpu(device) if device.type == "cuda" else None,
        # In milliseconds, so that two runs that begin in the same second have different keys.
        "utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "command": " ".join(_without_directory(argument) for argument in sys.argv),
    }


def _licence(package: str) -> str | None:
    """The licence that an installed package names in its metadata."""
    about = metadata(package)
    classifiers = [each.split(" :: ")[-1] for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    named = about.get_all("License-Expression") or classifiers or about.get_all("License") or []
    return ", ".join(named).strip().partition("\n")[0] or None


def flat(described: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"gpu": {"name": ...}}` as `gpu.name: ...`, for people to read."""
    rows: dict[str, Any] = {}
    for name, value in described.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return rows


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    state = gpu_state(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **_settings(_nvml_handle(device)),
        "at_start": None if state is None else asdict(state),
    }


def _settings(handle: Any) -> dict[str, Any]:
    """Driver, power limit and highest clocks, if NVML provides them."""
    wanted = {
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "max_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "max_memory_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
    }
    return dict.fromkeys(wanted) if handle is None else _ask(wanted)


def _ask(wanted: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Answers of NVML, by name; None where it does not answer."""
    answers: dict[str, Any] = dict.fromkeys(wanted)
    for name, ask in wanted.items():
        try:
            answers[name] = ask()
        except pynvml.NVMLError:
            continue
    return answers


def _nvml_handle(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    return _nvml_handle_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _nvml_handle_of(index: int) -> Any:
    """The GPU by its UUID, because NVML numbers all GPUs of a machine, but CUDA only the visible ones."""
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None


@cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_directory(argument: str) -> str:
    """`--out=/data/me/run.jsonl` becomes `--out=run.jsonl`; paths may begin anywhere in the text."""
    return re.sub(r"(^|[=:,\s'\"])[~/].*/", r"\1", argument.rstrip("/"), flags=re.DOTALL)
