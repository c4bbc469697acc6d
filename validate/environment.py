"""Where and with what something was measured: machine, cores, governor, load, versions. Imports none of them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = (
    "sslc-export",
    "numpy",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "lm_eval",
)
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks_throttle_reasons.active")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPUINFO = Path("/proc/cpuinfo")
_CORES = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Environment:
    """The machine and its software.

    Attributes:
        machine: Operating system and architecture.
        cpu: Model name of the processor.
        logical_cores: As the operating system counts them.
        physical_cores: None where it does not say.
        affinity: Cores that this process may use.
        governor: Of the clock frequency, for example "performance"; None where it cannot be read (virtual machines).
        load_average: Runnable threads of the whole machine, averages over 1, 5 and 15 minutes.
        memory_bytes: Of the machine.
        versions: Python and the packages that are installed.
        gpus: Name, driver, clocks and reasons for throttling of each, as nvidia-smi says them; empty without one.
    """

    machine: str
    cpu: str
    logical_cores: int
    physical_cores: int | None
    affinity: tuple[int, ...]
    governor: str | None
    load_average: tuple[float, ...]
    memory_bytes: int
    versions: dict[str, str]
    gpus: tuple[str, ...] = ()


def describe() -> Environment:
    """The machine that this process runs on, now."""
    return Environment(
        machine=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        logical_cores=psutil.cpu_count() or 1,
        physical_cores=psutil.cpu_count(logical=False),
        affinity=affinity(),
        governor=_GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        load_average=tuple(round(load, 2) for load in psutil.getloadavg()),
        memory_bytes=psutil.virtual_memory().total,
        versions=_versions(),
        gpus=_gpus(),
    )


def affinity() -> tuple[int, ...]:
    """Cores that this process may use."""
    # macOS has no affinity: all cores there.
    process = psutil.Process()
    return tuple(process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(psutil.cpu_count() or 1))


def _gpus() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return tuple(line.strip() for line in said.stdout.splitlines()) if said.returncode == 0 else ()


def _cpu() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class CpuClock:
    """CPU seconds used so far: by everyone (what a hypervisor took included), and by this process with its threads."""

    everyone: float
    own: float


def cpu_clock() -> CpuClock:
    """Reads both."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts guests inside user and nice.
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    own = psutil.Process().cpu_times()
    return CpuClock(everyone=sum(times) - idle - guest, own=own.user + own.system)


def clock_frequency() -> float | None:
    """Of the cores that this process may use, now, in MHz; the mean of them, or None if it is not known."""
    # psutil.cpu_freq is None or missing where there is nothing to read; virtual machines may show a constant.
    cores = psutil.cpu_freq(percpu=True) if hasattr(psutil, "cpu_freq") else []
    usable = [cores[index].current for index in affinity() if index < len(cores)]
    return sum(usable) / len(usable) if usable else None


def throttle_count() -> int | None:
    """How often the cores slowed themselves down for heat since the machine started; None if it is not known."""
    counters = list(_CORES.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    return sum(int(counter.read_text()) for counter in counters) if counters else None
